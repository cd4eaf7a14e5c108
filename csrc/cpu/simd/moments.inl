// The codec of 8-bit moments (ops/_moments.py): float32 relative to the block's largest, cut short.
namespace fastdistill::FASTDISTILL_LEVEL {

static_assert(kBlock % kMomentBlock == 0, "a block of moments lies in one block");
constexpr int32_t kOne = 0x3f800000 >> 20;  ///< bits of 1.0 in steps of 2^20

/// |x| / scale of a code that is not 0.
template <bool is_signed>
inline float level_of(int32_t size) {
  return float_of(static_cast<uint32_t>(size + kOne - (is_signed ? 127 : 255)) << 20);
}

/// The moments that `count` codes from `begin` on stand for.
template <bool is_signed, class T>
inline void decode(const Codes& codes, int64_t begin, int64_t count, T* out) {
  for (int64_t first = 0; first < count; first += kMomentBlock) {
    const uint8_t* code = codes.code + begin + first;
    const float scale = codes.scale[(begin + first) / kMomentBlock];
    const int64_t size = std::min(kMomentBlock, count - first);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const int32_t magnitude = is_signed ? code[i] & 127 : code[i];
      const float value = (magnitude > 0 ? level_of<is_signed>(magnitude) : 0.0f) * scale;
      out[first + i] = is_signed && code[i] > 127 ? -value : value;
    }
  }
}

/// What is added to the bits of an element before they are cut: 16 of the bits of its random word.
template <bool is_signed>
inline uint32_t rounding(uint32_t word) {
  return is_signed ? word >> 16 << 4 : (word & 0xffffu) << 4;
}

/// Codes and scales of `count` moments that lie from `begin` on.
template <bool is_signed, class T>
inline void encode(const T* moment, const uint32_t* words, int64_t begin, int64_t count,
                   const Codes& codes) {
  for (int64_t first = 0; first < count; first += kMomentBlock) {
    const T* value = moment + first;
    const uint32_t* word = words + first;
    uint8_t* code = codes.code + begin + first;
    const int64_t size = std::min(kMomentBlock, count - first);
    float largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < size; ++i) {
      const float x = std::abs(static_cast<float>(value[i]));
      largest = x > largest ? x : largest;
    }
    const float scale = largest == 0 ? 1.0f : largest;
    codes.scale[(begin + first) / kMomentBlock] = scale;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const float x = static_cast<float>(value[i]);
      const uint32_t bits = bits_of(std::abs(x) / scale) + rounding<is_signed>(word[i]);
      const int32_t step = static_cast<int32_t>(bits >> 20) - kOne;
      const int32_t sign = static_cast<int32_t>(bits_of(x) >> 31 << 7);
      const int32_t size_of_m = 127 + step, size_of_v = std::max(255 + step, 1);
      const int32_t signed_code = size_of_m > 0 ? size_of_m | sign : 0;
      const int32_t unsigned_code = x == 0 ? 0 : size_of_v;
      code[i] = static_cast<uint8_t>(is_signed ? signed_code : unsigned_code);
    }
  }
}

}  // namespace fastdistill::FASTDISTILL_LEVEL
