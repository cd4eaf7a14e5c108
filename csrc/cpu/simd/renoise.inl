// renoise (ops/renoise.py): the noise exists only as a block in the first-level cache.
namespace fastdistill::FASTDISTILL_LEVEL {

template <class T>
void renoise(const Renoise<T>& sample, const Chunk& chunk) {
  Scratch<T> x0_scratch, x_t_scratch, input_scratch, eps;
  const T alpha = sample.alpha, sigma = sample.sigma, input_scale = sample.input_scale;
  for_each_block(chunk, [&](int64_t first, int64_t count) {
    const int64_t offset = chunk.offset + first;
    draw<T, box_muller>(sample.key, chunk.first + first, count, eps.value);
    const T* x0 = load(sample.x0, offset, count, x0_scratch);
    T* x_t = destination(sample.x_t, offset, x_t_scratch);
    // x_t = alpha x0 + sigma eps
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) x_t[i] = alpha * x0[i] + sigma * eps.value[i];
    store(x_t, sample.x_t, offset, count);
    if (!sample.model_input) return;
    // model_input = c_in x_t, from the x_t that is not yet rounded
    T* input = destination(sample.model_input, offset, input_scratch);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) input[i] = input_scale * x_t[i];
    store(input, sample.model_input, offset, count);
  });
}

}  // namespace fastdistill::FASTDISTILL_LEVEL
