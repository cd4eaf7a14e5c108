// consistency_cotangent (ops/consistency.py): E = D - T in both passes over a sample, since the
// second finds the inputs in the cache.
namespace fastdistill::FASTDISTILL_LEVEL {

template <class T>
struct ConsistencyResidual {
  Scratch<T> value, prediction_scratch, x_t_scratch, target_x_scratch;

  /// E = a x_t + b F - T,  T = target or target_a target_x + target_b target
  void form(const Consistency<T>& sample, int64_t offset, int64_t count) {
    const T a = sample.a, b = sample.b, target_a = sample.target_a, target_b = sample.target_b;
    const T* f = load(sample.prediction, offset, count, prediction_scratch);
    const T* x_t = load(sample.x_t, offset, count, x_t_scratch);
    const T* target = load(sample.target, offset, count, value);
    if (sample.target_x) {
      const T* target_x = load(sample.target_x, offset, count, target_x_scratch);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i)
        value.value[i] = a * x_t[i] + b * f[i] - (target_a * target_x[i] + target_b * target[i]);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) value.value[i] = a * x_t[i] + b * f[i] - target[i];
    }
  }
};

template <class T>
double consistency_distance(const Consistency<T>& sample, const Chunk& chunk) {
  ConsistencyResidual<T> residual;
  const T* e = residual.value.value;
  const bool elementwise = sample.elementwise;
  double total = 0;
  for_each_block(chunk, [&](int64_t first, int64_t count) {
    residual.form(sample, chunk.offset + first, count);
    Lanes<T> sum;
    for_each_lane(count, [=, &sum](int64_t i, int lane) {
      sum.value[lane] += elementwise ? std::abs(e[i]) : e[i] * e[i];
    });
    total += sum.sum();
  });
  return total;
}

template <class T>
void consistency_gradient(const Consistency<T>& sample, const Chunk& chunk) {
  ConsistencyResidual<T> residual;
  Scratch<T> out_scratch;
  const T* e = residual.value.value;
  const bool elementwise = sample.elementwise;
  const T b = sample.b, factor = sample.factor;
  for_each_block(chunk, [&](int64_t first, int64_t count) {
    const int64_t offset = chunk.offset + first;
    residual.form(sample, offset, count);
    T* cotangent = destination(sample.cotangent, offset, out_scratch);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      cotangent[i] = factor * (b * (elementwise ? sign(e[i]) : e[i]));
    store(cotangent, sample.cotangent, offset, count);
  });
}

}  // namespace fastdistill::FASTDISTILL_LEVEL
