// One number from one dtype to another, as torch does it: to nearest, ties to even; 16-bit formats
// by way of float32. Infinities stay what they are and NaNs stay NaNs. Free of branches, so that
// loops vectorise, and of arithmetic on subnormal floats, so that flushing them changes nothing.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace fastdistill::arena {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) { return bit_cast<float>(uint32_t{value.bits} << 16); }

inline float widen(Float16 value) {
  constexpr uint32_t kRebias = (127 - 15) << 23, kSmallest = (127 - 14) << 23;
  const uint32_t magnitude = value.bits & 0x7fffu, sign = (value.bits & 0x8000u) << 16;
  const uint32_t normal = (magnitude << 13) + kRebias;
  const float above = bit_cast<float>((magnitude << 13) + kSmallest);
  const uint32_t subnormal = bit_cast<uint32_t>(above - bit_cast<float>(kSmallest));
  uint32_t bits = magnitude < 0x0400 ? subnormal : normal;
  bits = magnitude >= 0x7c00 ? normal + kRebias : bits;  // infinities and NaNs: exponent 255
  return bit_cast<float>(bits | sign);
}

inline BFloat16 to_bfloat16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x0040;
  return {static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded)};
}

inline Float16 to_float16(float value) {
  constexpr uint32_t kRebias = (127 - 15) << 23;
  const uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude - kRebias + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 1/2 leaves multiples of 2^-24, the smallest float16, in the low bits.
  const float above = bit_cast<float>(magnitude) + 0.5f;
  const uint32_t subnormal = bit_cast<uint32_t>(above) - bit_cast<uint32_t>(0.5f);
  uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x47800000 ? 0x7c00 : half;
  half = magnitude > 0x7f800000 ? 0x7e00 : half;
  return {static_cast<uint16_t>(half | (bits >> 16 & 0x8000))};
}

template <class To, class From>
To convert(From value) {
  const auto wide = widen(value);
  if constexpr (std::is_same_v<To, BFloat16>) return to_bfloat16(static_cast<float>(wide));
  else if constexpr (std::is_same_v<To, Float16>) return to_float16(static_cast<float>(wide));
  else return static_cast<To>(wide);
}

}  // namespace fastdistill::arena
