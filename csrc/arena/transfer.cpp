#include "arena/transfer.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <type_traits>

#include "arena/convert.h"
#include "arena/parallel.h"

// A function with the same bits from two instruction sets, of which the loader takes the better.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
#define FASTDISTILL_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define FASTDISTILL_CLONES
#endif

namespace fastdistill::arena {
namespace {

/// Elements that one thread copies at a time; fewer are not worth a second thread.
constexpr int64_t kChunk = 65536;

template <class From, class To>
FASTDISTILL_CLONES void copy(const From* __restrict from, To* __restrict to, int64_t count) {
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(to, from, count * sizeof(To));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = convert<To>(from[i]);
  }
}

/// Calls run(T()) with the type that holds numbers of this dtype.
template <class Run>
auto with_type(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::float64: return run(double());
    case Dtype::bfloat16: return run(BFloat16());
    case Dtype::float16: return run(Float16());
    default: return run(float());
  }
}

void copy(const Piece& piece) {
  with_type(piece.from_dtype, [&](auto from) {
    with_type(piece.to_dtype, [&](auto to) {
      copy(static_cast<const decltype(from)*>(piece.from), static_cast<decltype(to)*>(piece.to),
           piece.count);
    });
  });
}

int64_t element_size(Dtype dtype) {
  return with_type(dtype, [](auto zero) { return static_cast<int64_t>(sizeof(zero)); });
}

/// The pieces, cut so that none has more than kChunk elements.
std::vector<Piece> cut(const std::vector<Piece>& pieces) {
  std::vector<Piece> chunks;
  for (const Piece& piece : pieces) {
    const auto* from = static_cast<const std::byte*>(piece.from);
    auto* to = static_cast<std::byte*>(piece.to);
    for (int64_t done = 0; done < piece.count; done += kChunk) {
      chunks.push_back({from + done * element_size(piece.from_dtype), piece.from_dtype,
                        to + done * element_size(piece.to_dtype), piece.to_dtype,
                        std::min(kChunk, piece.count - done)});
    }
  }
  return chunks;
}

}  // namespace

void transfer(const std::vector<Piece>& pieces, int64_t threads) {
  int64_t elements = 0;
  for (const Piece& piece : pieces) elements += piece.count;
  const std::vector<Piece> chunks = cut(pieces);
  parallel_for(chunks.size(), std::min(threads, elements / kChunk + 1),
               [&](int64_t i) { copy(chunks[i]); });
}

}  // namespace fastdistill::arena
