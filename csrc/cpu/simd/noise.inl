// Counter-based noise (ops/noise.py): Philox-4x32-10, then Box-Muller.
namespace fastdistill::FASTDISTILL_LEVEL {

/// Random words of consecutive Philox blocks, word by word, each in the lower half of its place.
struct Words {
  alignas(64) uint64_t word[4][kBlock / 4];

  uint32_t operator()(int j, int block) const { return static_cast<uint32_t>(word[j][block]); }
};

// One counter in each 64-bit lane, in its lower half; the upper half is not looked at.
#if defined(FASTDISTILL_AVX512)
typedef uint64_t Wide __attribute__((vector_size(64)));
inline Wide multiply(Wide a, Wide b) {
  return Wide(_mm512_maskz_mul_epu32(0xff, __m512i(a), __m512i(b)));
}
#elif defined(FASTDISTILL_AVX2)
typedef uint64_t Wide __attribute__((vector_size(32)));
inline Wide multiply(Wide a, Wide b) { return Wide(_mm256_mul_epu32(__m256i(a), __m256i(b))); }
#elif defined(__SSE2__)
typedef uint64_t Wide __attribute__((vector_size(16)));
inline Wide multiply(Wide a, Wide b) { return Wide(_mm_mul_epu32(__m128i(a), __m128i(b))); }
#else
typedef uint64_t Wide __attribute__((vector_size(16)));
inline Wide multiply(Wide a, Wide b) { return (a & 0xffffffffu) * b; }
#endif
constexpr int kWide = sizeof(Wide) / sizeof(uint64_t);

/// Ten rounds on the counters (block, sample, step, stream) under the key (seed_low, seed_high).
inline void philox(const NoiseKey& key, uint32_t first_block, int blocks, Words& out) {
  Wide round_key[10][2];
  for (uint32_t round = 0; round < 10; ++round) {
    round_key[round][0] = Wide{} + (key.seed_low + round * 0x9E3779B9u);
    round_key[round][1] = Wide{} + (key.seed_high + round * 0xBB67AE85u);
  }
  Wide block;
  for (int lane = 0; lane < kWide; ++lane) block[lane] = first_block + static_cast<uint32_t>(lane);
  for (int i = 0; i < blocks; i += kWide, block += kWide) {
    Wide c0 = block, c1 = Wide{} + key.sample, c2 = Wide{} + key.step, c3 = Wide{} + key.stream;
    for (int round = 0; round < 10; ++round) {
      const Wide p0 = multiply(c0, Wide{} + 0xD2511F53u), p1 = multiply(c2, Wide{} + 0xCD9E8D57u);
      c0 = (p1 >> 32) ^ c1 ^ round_key[round][0];
      c1 = p1;
      c2 = (p0 >> 32) ^ c3 ^ round_key[round][1];
      c3 = p0;
    }
    std::memcpy(out.word[0] + i, &c0, sizeof c0);
    std::memcpy(out.word[1] + i, &c1, sizeof c1);
    std::memcpy(out.word[2] + i, &c2, sizeof c2);
    std::memcpy(out.word[3] + i, &c3, sizeof c3);
  }
}

/// -2 ln u with u = max(float(w), 1/2) / 2^32, relatively accurate also near u = 1.
inline float minus_two_log(uint32_t word) {
  // u = 2^e (1 + r) with 1 + r in [sqrt(1/2), sqrt(2)); -2 ln(1 + r) = -2 r + r^2 q(r) by minimax
  constexpr uint32_t kRootHalf = 0x3f3504f3u, kMantissa = 0x007fffffu;
  const uint32_t bits = bits_of(std::max(static_cast<float>(word), 0.5f)) - kRootHalf - (32u << 23);
  const float e = static_cast<float>(static_cast<int32_t>(bits) >> 23);
  const float r = float_of((bits & kMantissa) + kRootHalf) - 1.0f;
  float q = -0.17344461f;
  q = q * r + 0.28758064f;
  q = q * r - 0.29955977f;
  q = q * r + 0.33128846f;
  q = q * r - 0.39909750f;
  q = q * r + 0.50003397f;
  q = q * r - 0.66668332f;
  q = q * r + 1.0f;
  // 2 ln 2 in two parts, the first exact when multiplied by e
  return (r * r * q + e * 4.2438888e-4f - (r + r)) - e * 1.38671875f;
}

struct Turn {
  float cos, sin;
};

/// cos and sin of 2 pi w / 2^32: the nearest quarter turn exactly, the rest, pi/4 x with x in
/// [-1, 1), by minimax polynomials.
inline Turn turn(uint32_t word) {
  const float x = static_cast<float>(static_cast<int32_t>(word << 2)) * 0x1p-31f, y = x * x;
  const float s =
      x * 0.785398126f + x * y * ((-3.557942e-5f * y + 2.4893708e-3f) * y - 8.074513e-2f);
  const float c =
      (((3.4905204e-6f * y - 3.2586334e-4f) * y + 1.5854282e-2f) * y - 3.0842513e-1f) * y + 1.0f;
  const uint32_t quarter = word + 0x20000000u;  // its number, modulo 4, in the two highest bits
  const bool odd = quarter & 0x40000000u;
  const uint32_t cos_sign = (quarter + 0x40000000u) & 0x80000000u, sin_sign = quarter & 0x80000000u;
  return {float_of(bits_of(odd ? s : c) ^ cos_sign), float_of(bits_of(odd ? c : s) ^ sin_sign)};
}

/// (z_0, z_1) = sqrt(-2 ln u) (cos, sin) from words 0 and 1, (z_2, z_3) from words 2 and 3.
inline void box_muller(const Words& words, int blocks, float* out) {
#pragma omp simd
  for (int i = 0; i < blocks; ++i) {
    const float radius_a = std::sqrt(minus_two_log(words(0, i)));
    const float radius_b = std::sqrt(minus_two_log(words(2, i)));
    const Turn a = turn(words(1, i)), b = turn(words(3, i));
    out[4 * i] = radius_a * a.cos;
    out[4 * i + 1] = radius_a * a.sin;
    out[4 * i + 2] = radius_b * b.cos;
    out[4 * i + 3] = radius_b * b.sin;
  }
}

/// The same in double, by the reference's own formula.
inline void box_muller(const Words& words, int blocks, double* out) {
  constexpr double kTurn = 2 * 3.14159265358979323846 * 0x1p-32;
  for (int i = 0; i < blocks; ++i) {
    for (int j = 0; j < 4; j += 2) {
      const double u = std::max(static_cast<float>(words(j, i)), 0.5f) * 0x1p-32;
      const double radius = std::sqrt(-2.0 * std::log(u)), angle = words(j + 1, i) * kTurn;
      out[4 * i + j] = radius * std::cos(angle);
      out[4 * i + j + 1] = radius * std::sin(angle);
    }
  }
}

/// u = (floor(w / 2^9) + 1/2) / 2^23, exact in float.
template <class T>
inline T unit_interval(uint32_t word) {
  return (static_cast<T>(static_cast<int32_t>(word >> 9)) + T(0.5)) * T(0x1p-23);
}

template <class T>
inline void uniforms(const Words& words, int blocks, T* out) {
#pragma omp simd
  for (int i = 0; i < blocks; ++i) {
    out[4 * i] = unit_interval<T>(words(0, i));
    out[4 * i + 1] = unit_interval<T>(words(1, i));
    out[4 * i + 2] = unit_interval<T>(words(2, i));
    out[4 * i + 3] = unit_interval<T>(words(3, i));
  }
}

template <class T>
using FromWords = void (*)(const Words&, int blocks, T* out);

/// Noise of the `count` elements from `first` on, counted within the sample; up to three more are
/// written, since a Philox block makes four.
template <class T, FromWords<T> from_words>
inline void draw(const NoiseKey& key, int64_t first, int64_t count, T* out) {
  const int blocks = static_cast<int>((count + 3) / 4);
  Words words;
  philox(key, static_cast<uint32_t>(first / 4), blocks, words);
  from_words(words, blocks, out);
}

template <class T, FromWords<T> from_words>
void noise(const NoiseKey& key, const Chunk& chunk, const Sink& sink) {
  Scratch<T> scratch;
  for_each_block(chunk, [&](int64_t first, int64_t count) {
    const bool whole = count % 4 == 0;
    T* out = whole ? destination(sink, chunk.offset + first, scratch) : scratch.value;
    draw<T, from_words>(key, chunk.first + first, count, out);
    store(out, sink, chunk.offset + first, count);
  });
}

}  // namespace fastdistill::FASTDISTILL_LEVEL
