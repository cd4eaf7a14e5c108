// density_ratio_weight: discriminator logits to the weight h(r) of an f-divergence
// (fastdistill/ops/density_ratio.py). Everything is [B]-sized: one thread, plain loops.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "cpu/tensor.h"

namespace fastdistill {
namespace {

/// The constants of h = r^power (c0 + c1 r)^exponent and of the calibration of r.
struct Constants {
  double power, c0, c1, exponent, decay, prior, logit_clamp, ratio_min, ratio_max;
};

/// As torch.clamp: NaN stays NaN.
template <class T>
T clamp(T value, double low, double high) {
  return std::isnan(value) ? value : std::min(std::max(value, T(low)), T(high));
}

template <class T>
T mean_of(const Numbers<T>& values, int64_t begin, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[begin + i];
  return static_cast<T>(sum / static_cast<double>(count));
}

/// `history` is (sum of ratios, count) of each bin, already decayed; it receives this batch.
template <class T>
void run(const Numbers<T>& logits, const Integers& bin, int64_t samples, int64_t heads,
         int64_t bins, const Constants& c, T* weight, T* ratio, T* history) {
  // r = clamp(exp(clamp(mean_k l_k))),  (S, C)_b += (r, 1)
  for (int64_t i = 0; i < samples; ++i) {
    STD_TORCH_CHECK(bin[i] >= 0 && bin[i] < bins, "bin_index holds ", bin[i],
                    "; expected numbers from 0 to ", bins - 1);
    const T logit = clamp(mean_of(logits, i * heads, heads), -c.logit_clamp, c.logit_clamp);
    ratio[i] = clamp(std::exp(logit), c.ratio_min, c.ratio_max);
    history[2 * bin[i]] += ratio[i];
    history[2 * bin[i] + 1] += 1;
  }
  // r_i = r_i / mean_b,  mean_b = (S_b + prior) / (C_b + prior),  h = r^p (c0 + c1 r)^q
  double sum = 0;
  for (int64_t i = 0; i < samples; ++i) {
    const T* seen = history + 2 * bin[i];
    ratio[i] /= (seen[0] + T(c.prior)) / (seen[1] + T(c.prior));
    weight[i] =
        std::pow(ratio[i], T(c.power)) * std::pow(T(c.c0) + T(c.c1) * ratio[i], T(c.exponent));
    sum += weight[i];
  }
  const T mean = static_cast<T>(sum / static_cast<double>(samples));
  for (int64_t i = 0; i < samples; ++i) weight[i] /= mean;
}

std::tuple<Tensor, Tensor, Tensor> density_ratio_weight(
    const Tensor& logits, const Tensor& bin_index, const Tensor& history, double power, double c0,
    double c1, double exponent, double decay, double prior, double logit_clamp, double ratio_min,
    double ratio_max) {
  const ScalarType dtype = history.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "history is ",
                  torch::headeronly::toString(dtype), "; expected float32 or float64");
  STD_TORCH_CHECK(logits.dim() == 2 && history.dim() == 2 && history.size(1) == 2,
                  "expected logits [B, heads] and history [bins, 2]");
  const Constants constants{power, c0,          c1,        exponent, decay,
                            prior, logit_clamp, ratio_min, ratio_max};
  const int64_t samples = logits.size(0), heads = logits.size(1), bins = history.size(0);
  const Tensor weight = empty(history, {samples}, dtype), ratio = empty(history, {samples}, dtype);
  const Tensor new_history = empty(history, dtype);
  with_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    T* seen = static_cast<T*>(new_history.mutable_data_ptr());
    const Numbers<T> before(source(history, Shape(history), "history"), 1);
    const Numbers<T> logit(source(logits, Shape(logits), "logits"), 1);
    for (int64_t i = 0; i < 2 * bins; ++i) seen[i] = T(decay) * before[i];
    run(logit, Integers(bin_index, samples, "bin_index"), samples, heads, bins, constants,
        static_cast<T*>(weight.mutable_data_ptr()), static_cast<T*>(ratio.mutable_data_ptr()),
        seen);
  });
  return {weight, ratio, new_history};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastdistill_cpu, m) {
  m.def(
      "density_ratio_weight(Tensor logits, Tensor bin_index, Tensor history, float power, "
      "float c0, float c1, float exponent, float decay, float prior, float logit_clamp, "
      "float ratio_min, float ratio_max) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastdistill_cpu, CPU, m) {
  m.impl("density_ratio_weight", TORCH_BOX(&density_ratio_weight));
}

}  // namespace fastdistill
