// denoising_cotangent (ops/denoising.py).
namespace fastdistill::FASTDISTILL_LEVEL {

template <class T>
double denoising(const Denoising<T>& sample, const Chunk& chunk) {
  Scratch<T> f_scratch, x0_scratch, x_t_scratch, out_scratch;
  const T a = sample.a, b = sample.b, weight = sample.weight, factor = sample.gradient_scale * b;
  double total = 0;
  for_each_block(chunk, [&](int64_t first, int64_t count) {
    const int64_t offset = chunk.offset + first;
    const T* f = load(sample.prediction, offset, count, f_scratch);
    const T* x0 = load(sample.x0, offset, count, x0_scratch);
    const T* x_t = load(sample.x_t, offset, count, x_t_scratch);
    T* cotangent = destination(sample.cotangent, offset, out_scratch);
    Lanes<T> squared;
    // residual = a x_t + b F - x0,  cotangent = weight * (2 scale / N) b residual
    for_each_lane(count, [=, &squared](int64_t i, int lane) {
      const T residual = a * x_t[i] + b * f[i] - x0[i];
      squared.value[lane] += residual * residual;
      cotangent[i] = weight * (factor * residual);
    });
    store(cotangent, sample.cotangent, offset, count);
    total += squared.sum();
  });
  return total;
}

}  // namespace fastdistill::FASTDISTILL_LEVEL
