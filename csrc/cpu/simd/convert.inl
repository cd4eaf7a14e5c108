// Storage conversion by blocks that stay in the first-level cache: whatever mixture of types the
// tensors have, the arithmetic loops see only T. Rounding is to nearest even; NaN stays NaN.
namespace fastdistill::FASTDISTILL_LEVEL {

constexpr int64_t kBlock = 1024;

/// Room for one block in the compute type.
template <class T>
struct Scratch {
  alignas(64) T value[kBlock];
};

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) { return float_of(uint32_t{value.bits} << 16); }

inline float widen(Float16 value) {
  const uint32_t rest = (value.bits & 0x7fffu) << 13, exponent = rest & 0x0f800000u;
  const float normal = float_of(rest + (112u << 23));  // exponent bias 127 instead of 15
  const float subnormal = float_of(rest + (113u << 23)) - 0x1p-14f;
  const float special = float_of(rest | 0x7f800000u);  // infinity or NaN
  const float magnitude = exponent == 0 ? subnormal : (exponent == 0x0f800000u ? special : normal);
  return float_of(bits_of(magnitude) | (value.bits & 0x8000u) << 16);
}

inline void narrow(float value, float& out) { out = value; }
inline void narrow(float value, double& out) { out = value; }
inline void narrow(double value, double& out) { out = value; }
inline void narrow(double value, float& out) { out = static_cast<float>(value); }

inline void narrow(float value, BFloat16& out) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const uint32_t nan = bits >> 16 | 0x40u;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

inline void narrow(float value, Float16& out) {
  const uint32_t bits = bits_of(value), rest = bits & 0x7fffffffu;
  const uint32_t normal = (rest + 0xc8000fffu + (rest >> 13 & 1u)) >> 13;   // exponent bias 15
  const uint32_t subnormal = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;  // rounds at 2^-24
  const uint32_t special = rest > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = rest < (113u << 23) ? subnormal : normal;
  const uint32_t half = rest >= (143u << 23) ? special : finite;
  out.bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
}

template <class Out>
inline void narrow(double value, Out& out) {
  narrow(static_cast<float>(value), out);  // in two roundings, as torch does
}

/// Fetches what follows a block, for the next one: blocks are too short for the processor to see by
/// itself that they continue. Beyond the tensor's end this does nothing.
template <class Stored>
inline void prefetch_next(const Stored* block) {
  constexpr int64_t kLine = 64 / sizeof(Stored);
  for (int64_t i = kBlock; i < 2 * kBlock; i += kLine) __builtin_prefetch(block + i);
}

template <class Stored, class T>
inline void widen_block(const Stored* in, T* out, int64_t count) {
  prefetch_next(in);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(widen(in[i]));
}

template <class T, class Stored>
inline void narrow_block(const T* in, Stored* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) narrow(in[i], out[i]);
}

#ifdef FASTDISTILL_F16C
inline void widen_block(const Float16* in, float* out, int64_t count) {
  prefetch_next(in);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
  }
  for (; i < count; ++i) out[i] = widen(in[i]);
}

inline void narrow_block(const float* in, Float16* out, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
  }
  for (; i < count; ++i) narrow(in[i], out[i]);
}
#endif

/// The elements offset..offset+count-1 of a tensor in the compute type: where they lie if they are
/// stored so, else converted into `scratch`.
template <class T>
__attribute__((noinline)) const T* load(const Source& source, int64_t offset, int64_t count,
                                        Scratch<T>& scratch) {
  if (source.storage == kStorageOf<T>) return static_cast<const T*>(source.data) + offset;
  T* out = scratch.value;
  switch (source.storage) {
    case Storage::float32:
      widen_block(static_cast<const float*>(source.data) + offset, out, count);
      break;
    case Storage::bfloat16:
      widen_block(static_cast<const BFloat16*>(source.data) + offset, out, count);
      break;
    case Storage::float16:
      widen_block(static_cast<const Float16*>(source.data) + offset, out, count);
      break;
    case Storage::float64:
      widen_block(static_cast<const double*>(source.data) + offset, out, count);
      break;
  }
  return out;
}

/// Where to compute a block that `store` will put into `sink`: in place if it is stored in T.
template <class T>
inline T* destination(const Sink& sink, int64_t offset, Scratch<T>& scratch) {
  const bool in_place = sink.storage == kStorageOf<T> && !sink.past_cache;
  return in_place ? static_cast<T*>(sink.data) + offset : scratch.value;
}

/// Copies to memory without reading its lines into the cache; `out` starts such a line.
inline void copy_past_cache(const void* in, void* out, int64_t bytes) {
  int64_t i = 0;
#if defined(FASTDISTILL_AVX512)
  for (; i + 64 <= bytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(static_cast<char*>(out) + i),
                        _mm512_loadu_si512(static_cast<const char*>(in) + i));
#elif defined(FASTDISTILL_AVX2)
  for (; i + 32 <= bytes; i += 32)
    _mm256_stream_si256(
        reinterpret_cast<__m256i*>(static_cast<char*>(out) + i),
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const char*>(in) + i)));
#endif
  std::memcpy(static_cast<char*>(out) + i, static_cast<const char*>(in) + i, bytes - i);
}

/// Rounds a block to where it is stored, past the cache if the sink says so.
template <class Stored, class T>
inline void narrow_to(const Sink& sink, const T* block, int64_t offset, int64_t count) {
  Stored* out = static_cast<Stored*>(sink.data) + offset;
  if (!sink.past_cache) return narrow_block(block, out, count);
  alignas(64) Stored rounded[kBlock];
  narrow_block(block, rounded, count);
  copy_past_cache(rounded, out, count * sizeof(Stored));
}

/// Rounds a computed block into `sink`; nothing to do where it was computed in place.
template <class T>
__attribute__((noinline)) void store(const T* block, const Sink& sink, int64_t offset,
                                     int64_t count) {
  if (sink.storage == kStorageOf<T>) {
    T* out = static_cast<T*>(sink.data) + offset;
    if (sink.past_cache) copy_past_cache(block, out, count * sizeof(T));
    if (sink.past_cache || block == out) return;
  }
  switch (sink.storage) {
    case Storage::float32:
      narrow_to<float>(sink, block, offset, count);
      break;
    case Storage::bfloat16:
      narrow_to<BFloat16>(sink, block, offset, count);
      break;
    case Storage::float16:
      narrow_to<Float16>(sink, block, offset, count);
      break;
    case Storage::float64:
      narrow_to<double>(sink, block, offset, count);
      break;
  }
}

/// Calls body(first, count) for the blocks of a chunk, `first` counted from the chunk's begin.
template <class Body>
inline void for_each_block(const Chunk& chunk, Body body) {
  for (int64_t first = 0; first < chunk.count; first += kBlock)
    body(first, std::min(kBlock, chunk.count - first));
}

}  // namespace fastdistill::FASTDISTILL_LEVEL
