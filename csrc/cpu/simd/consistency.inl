// consistency_cotangent (ops/consistency.py): E and its distance in a first pass over a sample, the
// gradient in a second one, when the sample's distance is known.
namespace fastdistill::FASTDISTILL_LEVEL {

template <class T>
double consistency_distance(const Consistency<T>& sample, const Chunk& chunk, T* residual) {
  Scratch<T> prediction_scratch, x_t_scratch, target_scratch, target_x_scratch;
  const T a = sample.a, b = sample.b, target_a = sample.target_a, target_b = sample.target_b;
  const bool elementwise = sample.elementwise;
  double total = 0;
  for_each_block(chunk, [&](int64_t first, int64_t count) {
    const int64_t offset = chunk.offset + first;
    const T* f = load(sample.prediction, offset, count, prediction_scratch);
    const T* x_t = load(sample.x_t, offset, count, x_t_scratch);
    const T* target = load(sample.target, offset, count, target_scratch);
    T* e = residual + first;
    // E = a x_t + b F - T,  T = target or target_a target_x + target_b target
    if (sample.target_x) {
      const T* target_x = load(sample.target_x, offset, count, target_x_scratch);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i)
        e[i] = a * x_t[i] + b * f[i] - (target_a * target_x[i] + target_b * target[i]);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) e[i] = a * x_t[i] + b * f[i] - target[i];
    }
    Lanes<T> sum;
    for_each_lane(count, [=, &sum](int64_t i, int lane) {
      sum.value[lane] += elementwise ? std::abs(e[i]) : e[i] * e[i];
    });
    total += sum.sum();
  });
  return total;
}

template <class T>
void consistency_gradient(const Consistency<T>& sample, const Chunk& chunk, const T* residual) {
  Scratch<T> out_scratch;
  const bool elementwise = sample.elementwise;
  const T b = sample.b, factor = sample.factor;
  for_each_block(chunk, [&](int64_t first, int64_t count) {
    const T* e = residual + first;
    T* cotangent = destination(sample.cotangent, chunk.offset + first, out_scratch);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      cotangent[i] = factor * (b * (elementwise ? sign(e[i]) : e[i]));
    store(cotangent, sample.cotangent, chunk.offset + first, count);
  });
}

}  // namespace fastdistill::FASTDISTILL_LEVEL
