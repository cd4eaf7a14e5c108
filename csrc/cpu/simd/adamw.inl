// adamw_ema_ (ops/adamw.py): one block after the other, each of which stays in the first-level cache
// from its gradient to its copy.
namespace fastdistill::FASTDISTILL_LEVEL {

/// a b + c in one rounding.
inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

/// a + weight (b - a), begun from the nearer end, as torch.lerp does.
template <class T>
struct Lerp {
  bool near_a;
  T factor;

  explicit Lerp(T weight)
      : near_a(std::abs(weight) < T(0.5)), factor(near_a ? weight : weight - 1) {}
  T operator()(T a, T b) const { return fused(factor, b - a, near_a ? a : b); }
};

/// The block of one range. Fused where torch's AdamW is on x86-64, with which it agrees bit by bit.
template <class T>
inline void update(const Adam<T>& of, const AdamRange<T>& range, const T* gradient, int64_t count,
                   T* p, T* m, T* v) {
  const Lerp<T> toward(of.weight1);
  const T factor = of.gradient_factor, beta2 = of.beta2, weight2 = of.weight2;
  const T root = of.correction2_root, eps = of.eps, decay = range.decay, rate = range.rate;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const T g = gradient[i] * factor;
    m[i] = toward(m[i], g);
    v[i] = fused(weight2 * g, g, beta2 * v[i]);
    p[i] = p[i] * decay - rate * m[i] / (std::sqrt(v[i]) / root + eps);
  }
}

/// The upper halves of each Philox block's words, side by side in the order of its elements.
inline void high_halves(const Words& words, int blocks, uint16_t* out) {
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  constexpr int kFirst = 48, kNext = -16;
#else
  constexpr int kFirst = 0, kNext = 16;
#endif
#pragma omp simd
  for (int i = 0; i < blocks; ++i) {
    uint64_t four = 0;
    for (int j = 0; j < 4; ++j)
      four |= (words.word[j][i] >> 16 & 0xffffu) << (kFirst + j * kNext);
    std::memcpy(out + 4 * i, &four, sizeof four);
  }
}

/// Rounds to bfloat16, up with the probability of what is cut off.
template <class T>
inline void store_stochastically(const T* block, const Adam<T>& of, int64_t element,
                                 int64_t count) {
  Scratch<uint16_t> noise;
  Scratch<float> rounded;
  NoiseKey key = of.key;
  key.sample = static_cast<uint32_t>(element >> 34);
  draw<uint16_t, high_halves>(key, element, count, noise.value);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float value = static_cast<float>(block[i]);
    const uint32_t bits = bits_of(value), up = (bits + noise.value[i]) & 0xffff0000u;
    const bool finite = (bits & 0x7fffffffu) < 0x7f800000u;
    rounded.value[i] = float_of(finite ? up : bits);
  }
  store(rounded.value, of.copy, element, count);
}

/// The words of each Philox block side by side, in the order of its elements.
inline void in_order(const Words& words, int blocks, uint32_t* out) {
#pragma omp simd
  for (int i = 0; i < blocks; ++i)
    for (int j = 0; j < 4; ++j) out[4 * i + j] = words(j, i);
}

/// Moments of one block: where they lie, or decoded.
template <class T>
struct Moments {
  T *m, *v;
  Scratch<T> scratch_m, scratch_v;

  Moments(const Adam<T>& of, int64_t begin, int64_t count) {
    m = of.exp_avg ? of.exp_avg + begin : scratch_m.value;
    v = of.exp_avg ? of.exp_avg_sq + begin : scratch_v.value;
    if (of.exp_avg) return;
    decode<true>(of.exp_avg_codes, begin, count, m);
    decode<false>(of.exp_avg_sq_codes, begin, count, v);
  }

  void keep(const Adam<T>& of, int64_t begin, int64_t count) const {
    if (of.exp_avg) return;
    Scratch<uint32_t> words;
    NoiseKey key = of.moment_key;
    key.sample = static_cast<uint32_t>(begin >> 34);
    draw<uint32_t, in_order>(key, begin, count, words.value);
    encode<true>(m, words.value, begin, count, of.exp_avg_codes);
    encode<false>(v, words.value, begin, count, of.exp_avg_sq_codes);
  }
};

template <class T>
void adamw(const Adam<T>& of, const Chunk& chunk) {
  Scratch<T> scratch;
  const AdamRange<T>*last = of.ranges + of.range_count - 1, *range = of.ranges;
  for_each_block(chunk, [&](int64_t first, int64_t count) {
    const int64_t begin = chunk.offset + first, end = begin + count;
    const T* gradient = load(of.gradient, begin, count, scratch);
    T* p = of.parameter + begin;
    Moments<T> moments(of, begin, count);
    for (int64_t i = begin; i < end;) {
      while (range < last && range[1].begin <= i) ++range;
      const int64_t next = range < last ? std::min(end, range[1].begin) : end, at = i - begin;
      update(of, *range, gradient + at, next - i, p + at, moments.m + at, moments.v + at);
      i = next;
    }
    moments.keep(of, begin, count);
    for (int64_t k = 0; k < of.average_count; ++k) {
      const Lerp<T> toward(of.averages[k].weight);
      T* average = of.averages[k].average + begin;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) average[i] = toward(average[i], p[i]);
    }
    if (of.stochastic)
      store_stochastically(p, of, begin, count);
    else if (of.copy)
      store(p, of.copy, begin, count);
  });
}

}  // namespace fastdistill::FASTDISTILL_LEVEL
