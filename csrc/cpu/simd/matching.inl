// matching_cotangent (ops/matching.py): the gap and the residual's sum in a first pass over a
// sample, the gradient in a second one, when the sample's normaliser is known.
namespace fastdistill::FASTDISTILL_LEVEL {

/// base + scale * (other - base), or base alone where there is no other.
template <class T>
inline const T* load_mixed(const Source& base, const Source& other, T scale, int64_t offset,
                           int64_t count, Scratch<T>& out, Scratch<T>& other_scratch) {
  const T* from = load(base, offset, count, out);
  if (!other) return from;
  const T* to = load(other, offset, count, other_scratch);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out.value[i] = from[i] + scale * (to[i] - from[i]);
  return out.value;
}

template <class T>
inline const T* load_guided_teacher(const Matching<T>& sample, int64_t offset, int64_t count,
                                    Scratch<T>& out, Scratch<T>& scratch) {
  const Source& uncond = sample.teacher_uncond;
  return uncond ? load_mixed(uncond, sample.teacher, sample.guidance_scale, offset, count, out,
                             scratch)
                : load(sample.teacher, offset, count, out);
}

template <class T>
double matching_gap(const Matching<T>& sample, const Chunk& chunk, T* gap) {
  Scratch<T> x0_scratch, x_t_scratch, teacher_scratch, critic_scratch, scratch;
  const T a_phi = sample.a_phi, b_phi = sample.b_phi, b_psi = sample.b_psi;
  const T a_difference = sample.a_psi - a_phi, b_difference = b_psi - b_phi;
  double total = 0;
  for_each_block(chunk, [&](int64_t first, int64_t count) {
    const int64_t offset = chunk.offset + first;
    const T* f_phi = load_guided_teacher(sample, offset, count, teacher_scratch, scratch);
    const T* f_psi = load_mixed(sample.critic, sample.critic_uncond, sample.esd_lambda, offset,
                                count, critic_scratch, scratch);
    const T* x0 = load(sample.x0, offset, count, x0_scratch);
    const T* x_t = load(sample.x_t, offset, count, x_t_scratch);
    T* out = gap + first;
    Lanes<T> residual;
    // gap      = b_psi (F_psi - F_phi) + (b_psi - b_phi) F_phi + (a_psi - a_phi) x_t
    // residual = sum |x0 - (a_phi x_t + b_phi F_phi)|
    for_each_lane(count, [=, &residual](int64_t i, int lane) {
      out[i] = b_psi * (f_psi[i] - f_phi[i]) + b_difference * f_phi[i] + a_difference * x_t[i];
      residual.value[lane] += std::abs(x0[i] - (a_phi * x_t[i] + b_phi * f_phi[i]));
    });
    total += residual.sum();
  });
  return total;
}

template <class T>
MatchingSums matching_gradient(const MatchingGradient<T>& sample, const Chunk& chunk,
                               const T* gap) {
  Scratch<T> out_scratch;
  const T factor = sample.factor, scale = sample.scale, largest = std::numeric_limits<T>::max();
  MatchingSums total;
  for_each_block(chunk, [&](int64_t first, int64_t count) {
    const T* in = gap + first;
    T* cotangent = destination(sample.cotangent, chunk.offset + first, out_scratch);
    Lanes<T> squared_g, squared_gap;
    Lanes<int32_t> nonfinite;
    // g = factor gap, 0 where it is not finite;  cotangent = g scale / N
    for_each_lane(count, [=, &squared_g, &squared_gap, &nonfinite](int64_t i, int lane) {
      const T delta = in[i], raw = factor * delta;
      const bool finite = std::abs(raw) <= largest;
      const T g = finite ? raw : T(0), kept = finite ? delta : T(0);
      squared_g.value[lane] += g * g;
      squared_gap.value[lane] += kept * kept;
      nonfinite.value[lane] += !finite;
      cotangent[i] = g * scale;
    });
    store(cotangent, sample.cotangent, chunk.offset + first, count);
    total += {squared_g.sum(), squared_gap.sum(), nonfinite.sum()};
  });
  return total;
}

}  // namespace fastdistill::FASTDISTILL_LEVEL
