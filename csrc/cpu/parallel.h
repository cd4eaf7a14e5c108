// How a batch is divided among threads: into chunks of a size that does not depend on their number.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/tensor.h"

namespace fastdistill {

/// Fewer elements than this are not worth a second thread.
constexpr int64_t kGrain = 16384;

/// Makes what was written past the cache visible to other threads.
inline void finish_stores() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// The chunks of a batch, numbered sample by sample.
struct Chunks {
  Shape shape;
  int64_t per_sample;

  explicit Chunks(const Shape& shape)
      : shape(shape), per_sample(divide_up(shape.elements, kChunk)) {}

  Chunk operator[](int64_t number) const {
    const int64_t sample = number / per_sample, first = number % per_sample * kChunk;
    return {number, sample, first, sample * shape.elements + first,
            std::min(kChunk, shape.elements - first)};
  }
};

/// One sum for each chunk of samples begin..end-1, added up in the order of the chunks.
template <class Sum>
class PartialSums {
 public:
  PartialSums(const Chunks& chunks, int64_t begin, int64_t end)
      : per_sample_(chunks.per_sample),
        begin_(begin * per_sample_),
        sums_((end - begin) * per_sample_) {}

  Sum& operator[](const Chunk& chunk) { return sums_[chunk.number - begin_]; }

  Sum total(int64_t sample) const {
    const Sum* sum = sums_.data() + sample * per_sample_ - begin_;
    Sum total{};
    for (int64_t i = 0; i < per_sample_; ++i) total += sum[i];
    return total;
  }

 private:
  int64_t per_sample_, begin_;
  std::vector<Sum> sums_;
};

/// Calls body(chunk) for every chunk of samples begin..end-1, on all threads.
template <class Body>
void parallel_over_chunks(const Chunks& chunks, int64_t begin, int64_t end, const Body& body) {
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t number = first; number < last; ++number) body(chunks[number]);
    finish_stores();
  };
  const int64_t first = begin * chunks.per_sample, last = end * chunks.per_sample;
  if (last - first <= 1) return run(first, last);
  const int64_t grain = divide_up(kGrain, std::min(kChunk, chunks.shape.elements));
  torch::stable::parallel_for(first, last, grain, run);
}

/// Calls body(begin, end) for groups of samples that are to be finished one after the other, so
/// that a second pass over a sample finds it in the cache: single samples where there are enough
/// of them to keep all threads busy, else the whole batch, whose chunks are then run in parallel.
template <class Body>
void parallel_over_samples(const Shape& shape, const Body& body) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t rounds = divide_up(shape.samples, threads);
  if (4 * rounds * threads > 5 * shape.samples) return body(0, shape.samples);
  const int64_t grain = divide_up(kGrain, std::max<int64_t>(shape.elements, 1));
  torch::stable::parallel_for(0, shape.samples, grain, [&](int64_t first, int64_t last) {
    for (int64_t sample = first; sample < last; ++sample) body(sample, sample + 1);
  });
}

}  // namespace fastdistill
