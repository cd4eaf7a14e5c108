// projection_cotangents (ops/projection.py): E = D_phi - D_psi and R = D_phi - x0 in both passes
// over a sample. The second finds the inputs in the cache; keeping E and R would cost as much.
namespace fastdistill::FASTDISTILL_LEVEL {

/// As torch.sign, 0 for NaN too.
template <class T>
inline T sign(T value) {
  return value > 0 ? T(1) : (value < 0 ? T(-1) : T(0));
}

template <class T>
struct GapAndResidual {
  Scratch<T> gap, residual, x_t_scratch, critic_scratch, scratch;

  /// E = b_psi (F_phi - F_psi) + (b_phi - b_psi) F_phi + (a_phi - a_psi) x_t
  /// R = a_phi x_t + b_phi F_phi - x0
  void form(const Matching<T>& sample, int64_t offset, int64_t count) {
    const T a_phi = sample.a_phi, b_phi = sample.b_phi, b_psi = sample.b_psi;
    const T a_difference = a_phi - sample.a_psi, b_difference = b_phi - b_psi;
    const T* f_phi = load_guided_teacher(sample, offset, count, gap, scratch);
    const T* x0 = load(sample.x0, offset, count, residual);
    const T* f_psi = load(sample.critic, offset, count, critic_scratch);
    const T* x_t = load(sample.x_t, offset, count, x_t_scratch);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const T teacher = f_phi[i], x = x_t[i];
      const T to_clean = a_phi * x + b_phi * teacher - x0[i];
      gap.value[i] = b_psi * (teacher - f_psi[i]) + b_difference * teacher + a_difference * x;
      residual.value[i] = to_clean;
    }
  }
};

template <class T>
ProjectionSums projection_sums(const Matching<T>& sample, bool elementwise, const Chunk& chunk) {
  GapAndResidual<T> block;
  const T *gap = block.gap.value, *residual = block.residual.value;
  ProjectionSums total;
  for_each_block(chunk, [&](int64_t first, int64_t count) {
    block.form(sample, chunk.offset + first, count);
    Lanes<T> squared_gap, gap_along, residual_along, absolute;
    for_each_lane(count, [=, &squared_gap, &gap_along, &residual_along, &absolute](int64_t i,
                                                                                  int lane) {
      const T direction = elementwise ? sign(gap[i]) : gap[i];
      squared_gap.value[lane] += gap[i] * gap[i];
      gap_along.value[lane] += direction * gap[i];
      residual_along.value[lane] += direction * residual[i];
      absolute.value[lane] += std::abs(residual[i]);
    });
    total += {squared_gap.sum(), gap_along.sum(), residual_along.sum(), absolute.sum()};
  });
  return total;
}

template <class T>
void projection_gradients(const Matching<T>& sample, bool elementwise,
                          const ProjectionGradient<T>* gradients, int gradient_count,
                          const Chunk& chunk) {
  GapAndResidual<T> block;
  Scratch<T> out_scratch;
  T *direction = block.gap.value, *residual = block.residual.value;
  for_each_block(chunk, [&](int64_t first, int64_t count) {
    const int64_t offset = chunk.offset + first;
    block.form(sample, offset, count);
    if (elementwise) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) direction[i] = sign(direction[i]);
    }
    for (int k = 0; k < gradient_count; ++k) {
      const ProjectionGradient<T>& gradient = gradients[k];
      const T of_residual = gradient.of_residual, of_direction = gradient.of_direction;
      T* cotangent = destination(gradient.cotangent, offset, out_scratch);
      if (gradient.dropped) {
        std::fill(cotangent, cotangent + count, T(0));
      } else {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i)
          cotangent[i] = of_residual * residual[i] + of_direction * direction[i];
      }
      store(cotangent, gradient.cotangent, offset, count);
    }
  });
}

}  // namespace fastdistill::FASTDISTILL_LEVEL
