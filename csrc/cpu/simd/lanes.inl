// Sums in a fixed number of lanes: the same order of additions, and so the same bits, for every
// instruction set and every compiler.
namespace fastdistill::FASTDISTILL_LEVEL {

constexpr int kLanes = 32;

template <class T>
struct Lanes {
  alignas(64) T value[kLanes] = {};

  double sum() {
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int lane = 0; lane < width; ++lane) value[lane] += value[lane + width];
    return value[0];
  }
};

/// Calls body(i, lane) with lane = i mod kLanes for i = 0..count-1, whole rows of lanes at once.
template <class Body>
inline __attribute__((always_inline)) void for_each_lane(int64_t count, Body body) {
  int64_t row = 0;
  for (; row + kLanes <= count; row += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) body(row + lane, lane);
    __asm__ volatile("");  // or GCC takes two rows at a time and keeps the sums in memory
  }
  for (int lane = 0; row + lane < count; ++lane) body(row + lane, lane);
}

}  // namespace fastdistill::FASTDISTILL_LEVEL
