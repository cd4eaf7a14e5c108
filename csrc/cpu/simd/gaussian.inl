// gaussian_transport (ops/gaussian.py): what stands around its two products.
namespace fastdistill::FASTDISTILL_LEVEL {

/// result = of_x x + of_mean mu + addend, where there is one
template <class T>
void affine(const Affine<T>& sample, const Chunk& chunk) {
  Scratch<T> x_scratch, mean_scratch, addend_scratch, out_scratch;
  const T of_x = sample.of_x, of_mean = sample.of_mean;
  for_each_block(chunk, [&](int64_t first, int64_t count) {
    const int64_t offset = chunk.offset + first;
    const T* x = load(sample.x, offset, count, x_scratch);
    const T* mean = load(sample.mean, chunk.first + first, count, mean_scratch);
    T* out = destination(sample.result, offset, out_scratch);
    if (sample.addend) {
      const T* addend = load(sample.addend, offset, count, addend_scratch);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) out[i] = of_x * x[i] + of_mean * mean[i] + addend[i];
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) out[i] = of_x * x[i] + of_mean * mean[i];
    }
    store(out, sample.result, offset, count);
  });
}

/// result = (gains - rest) c
template <class T>
void scale_by_gains(const ScaleByGains<T>& sample, const Chunk& chunk) {
  Scratch<T> c_scratch, gains_scratch, out_scratch;
  const T rest = sample.rest;
  for_each_block(chunk, [&](int64_t first, int64_t count) {
    const int64_t offset = chunk.offset + first;
    const T* c = load(sample.c, offset, count, c_scratch);
    const T* gains = load(sample.gains, offset, count, gains_scratch);
    T* out = destination(sample.result, offset, out_scratch);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = (gains[i] - rest) * c[i];
    store(out, sample.result, offset, count);
  });
}

}  // namespace fastdistill::FASTDISTILL_LEVEL
