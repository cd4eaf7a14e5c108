// Packing and unpacking of flat ranges. Free of Python and torch.
#pragma once

#include <cstdint>
#include <vector>

namespace fastdistill::arena {

enum class Dtype : uint8_t { float32, float64, bfloat16, float16 };

/// So many elements that go from one place to another, converted on the way.
struct Piece {
  const void* from;
  Dtype from_dtype;
  void* to;
  Dtype to_dtype;
  int64_t count;
};

/// Copies all pieces on at most `threads` threads, which share them by size: few large ones and
/// many small ones take the same time. No piece may be written where another is read or written.
void transfer(const std::vector<Piece>& pieces, int64_t threads);

}  // namespace fastdistill::arena
