// adamw_ema_: a parameter update with its clipping, averages and copy (fastdistill/ops/adamw.py).
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "cpu/noise.h"
#include "cpu/parallel.h"

namespace fastdistill {
namespace {

constexpr double kClipFloor = 1e-6;

/// A range of T as long as the parameters, updated in place.
template <class T>
T* state(const Tensor& tensor, const Shape& shape, const char* name) {
  STD_TORCH_CHECK(source(tensor, shape, name).storage == kStorageOf<T>, name, " is ",
                  torch::headeronly::toString(tensor.scalar_type()), "; expected the parameters' ",
                  sizeof(T) == 8 ? "float64" : "float32");
  return static_cast<T*>(tensor.mutable_data_ptr());
}

/// The value of a tensor with one element, or `otherwise` for an optional one that was not given.
double scalar(const std::optional<Tensor>& tensor, double otherwise, const char* name) {
  if (!tensor) return otherwise;
  return Numbers<double>(source(*tensor, Shape(1, 1), name), 0)[0];
}

/// step += 1
void count_up(const Tensor& step, double done) {
  if (step.scalar_type() == ScalarType::Double)
    *static_cast<double*>(step.mutable_data_ptr()) = done + 1;
  else
    *static_cast<float*>(step.mutable_data_ptr()) = static_cast<float>(done + 1);
}

void check_ranges(const std::vector<int64_t>& starts, const std::vector<int64_t>& groups,
                  const std::vector<double>& lr, const std::vector<double>& weight_decay) {
  bool ascending = !starts.empty() && starts[0] == 0;
  for (size_t i = 1; i < starts.size(); ++i) ascending = ascending && starts[i - 1] < starts[i];
  STD_TORCH_CHECK(ascending, "starts are not ascending from 0");
  STD_TORCH_CHECK(groups.size() == starts.size(), "expected one group for each of the ",
                  starts.size(), " ranges; got ", groups.size());
  const auto known = [&](int64_t group) {
    return group >= 0 && group < static_cast<int64_t>(lr.size());
  };
  STD_TORCH_CHECK(
      lr.size() == weight_decay.size() && std::all_of(groups.begin(), groups.end(), known),
      "expected one lr and one weight_decay for each group; got ", lr.size(), " and ",
      weight_decay.size());
}

/// 8-bit codes of a moment and the scales of their blocks.
Codes codes(const Tensor& code, const Tensor& scale, const Shape& shape, const char* name) {
  check_cpu(code, name);
  check_cpu(scale, name);
  const int64_t blocks = divide_up(shape.elements, kMomentBlock);
  STD_TORCH_CHECK(code.scalar_type() == ScalarType::Byte && code.numel() == shape.elements &&
                      code.is_contiguous() && scale.scalar_type() == ScalarType::Float &&
                      scale.numel() == blocks && scale.is_contiguous(),
                  name, " is not uint8 codes of ", shape.elements, " elements with ", blocks,
                  " float32 scales");
  return {static_cast<uint8_t*>(code.mutable_data_ptr()),
          static_cast<float*>(scale.mutable_data_ptr())};
}

/// The number of skipped updates, the first of the counters; null if nobody counts them.
int32_t* skipped_of(const std::optional<Tensor>& counters) {
  if (!counters) return nullptr;
  check_cpu(*counters, "counters");
  STD_TORCH_CHECK(counters->scalar_type() == ScalarType::Int && counters->numel() == 2,
                  "counters is not int32 [2]");
  return static_cast<int32_t*>(counters->mutable_data_ptr());
}

/// 1 / grad_scale, and what clipping multiplies it by: min(1, max_norm / (norm + 1e-6))
double gradient_factor(const std::optional<Tensor>& grad_scale, double squared_norm,
                       const std::optional<double>& max_norm) {
  const double factor = 1 / scalar(grad_scale, 1, "grad_scale");
  if (!max_norm) return factor;
  const double norm = std::sqrt(squared_norm) * factor;
  return factor * std::min(1.0, *max_norm / (norm + kClipFloor));
}

void adamw_ema_(const Tensor& parameter, const Tensor& gradient, const Tensor& exp_avg,
                const Tensor& exp_avg_sq, const Tensor& step, const std::vector<Tensor>& emas,
                const std::optional<Tensor>& copy, const std::optional<Tensor>& exp_avg_scale,
                const std::optional<Tensor>& exp_avg_sq_scale,
                const std::optional<Tensor>& counters, const std::optional<Tensor>& squared_norm,
                const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& lr_factor,
                const std::optional<Tensor>& key, const std::optional<Tensor>& moment_key,
                const std::vector<int64_t>& starts, const std::vector<int64_t>& groups,
                const std::vector<double>& lr, const std::vector<double>& weight_decay,
                double beta1, double beta2, double eps, std::optional<double> max_norm,
                const std::vector<double>& ema_decays, bool ema_warmup) {
  const Shape shape = Shape::flat(parameter);
  const ScalarType dtype = parameter.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "parameter is ",
                  torch::headeronly::toString(dtype), "; expected float32 or float64");
  STD_TORCH_CHECK(
      step.scalar_type() == ScalarType::Float || step.scalar_type() == ScalarType::Double,
      "step is ", torch::headeronly::toString(step.scalar_type()),
      "; expected float32 or float64");
  STD_TORCH_CHECK(emas.size() == ema_decays.size(), "there are ", emas.size(), " emas and ",
                  ema_decays.size(), " ema_decays");
  STD_TORCH_CHECK(!max_norm || squared_norm, "max_norm needs squared_norm");
  STD_TORCH_CHECK(!key || (copy && copy->scalar_type() == ScalarType::BFloat16),
                  "key rounds a bfloat16 copy stochastically; there is none");
  const bool coded = moment_key.has_value();
  STD_TORCH_CHECK(exp_avg_scale.has_value() == coded && exp_avg_sq_scale.has_value() == coded,
                  "8-bit moments need exp_avg_scale, exp_avg_sq_scale and moment_key");
  check_ranges(starts, groups, lr, weight_decay);
  int32_t* const skipped = skipped_of(counters);

  with_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    Adam<T> of{};
    of.parameter = state<T>(parameter, shape, "parameter");
    if (coded) {
      of.moment_key = common_key(*moment_key);
      of.exp_avg_codes = codes(exp_avg, *exp_avg_scale, shape, "exp_avg");
      of.exp_avg_sq_codes = codes(exp_avg_sq, *exp_avg_sq_scale, shape, "exp_avg_sq");
    } else {
      of.exp_avg = state<T>(exp_avg, shape, "exp_avg");
      of.exp_avg_sq = state<T>(exp_avg_sq, shape, "exp_avg_sq");
    }
    of.gradient = source(gradient, shape, "gradient");
    if (copy) {
      source(*copy, shape, "copy");
      of.copy = final_sink(*copy, shape);
    }
    if (key) of.key = common_key(*key);
    of.stochastic = key.has_value();

    const double done = scalar(step, 0, "step"), squared = scalar(squared_norm, 0, "squared_norm");
    const double correction1 = 1 - std::pow(beta1, done + 1);
    const double correction2 = 1 - std::pow(beta2, done + 1);
    of.gradient_factor = static_cast<T>(gradient_factor(grad_scale, squared, max_norm));
    of.weight1 = static_cast<T>(1 - beta1);
    of.beta2 = static_cast<T>(beta2);
    of.weight2 = static_cast<T>(1 - beta2);
    of.correction2_root = static_cast<T>(std::sqrt(correction2));
    of.eps = static_cast<T>(eps);

    std::vector<AdamRange<T>> ranges;
    const double factor = scalar(lr_factor, 1, "lr_factor");
    for (size_t i = 0; i < starts.size(); ++i) {
      const double rate = lr[groups[i]] * factor;
      ranges.push_back({starts[i], static_cast<T>(1 - rate * weight_decay[groups[i]]),
                        static_cast<T>(rate / correction1)});
    }
    of.ranges = ranges.data();
    of.range_count = static_cast<int64_t>(ranges.size());

    std::vector<AdamAverage<T>> averages;
    const double early = (1 + done) / (10 + done);
    for (size_t k = 0; k < emas.size(); ++k) {
      const double kept = ema_warmup ? std::min(early, ema_decays[k]) : ema_decays[k];
      averages.push_back({state<T>(emas[k], shape, "ema"), static_cast<T>(1 - kept)});
    }
    of.averages = averages.data();
    of.average_count = static_cast<int64_t>(averages.size());

    if (!std::isfinite(squared)) {
      if (skipped) ++*skipped;
      return;
    }
    const auto kernel = kernels<T>().adamw;
    parallel_over_chunks(Chunks(shape), 0, 1, [&](const Chunk& chunk) { kernel(of, chunk); });
    count_up(step, done);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastdistill_cpu, m) {
  m.def(
      "adamw_ema_(Tensor(a!) parameter, Tensor gradient, Tensor(b!) exp_avg, "
      "Tensor(c!) exp_avg_sq, Tensor(d!) step, Tensor(e!)[] emas, Tensor(f!)? copy, "
      "Tensor(g!)? exp_avg_scale, Tensor(h!)? exp_avg_sq_scale, Tensor(i!)? counters, "
      "Tensor? squared_norm, Tensor? grad_scale, Tensor? lr_factor, Tensor? key, "
      "Tensor? moment_key, int[] starts, int[] groups, float[] lr, float[] weight_decay, "
      "float beta1, float beta2, float eps, float? max_norm, float[] ema_decays, "
      "bool ema_warmup) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastdistill_cpu, CPU, m) {
  m.impl("adamw_ema_", TORCH_BOX(&adamw_ema_));
}

}  // namespace fastdistill
