// renoise: the forward process and the network's input in one pass (fastdistill/ops/renoise.py).
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/noise.h"
#include "cpu/parallel.h"

namespace fastdistill {
namespace {

// x_t         = alpha x0 + sigma eps,   eps = normal(key, sample)
// model_input = c_in x_t
std::tuple<Tensor, Tensor> renoise(const Tensor& x0, const Tensor& alpha, const Tensor& sigma,
                                   const Tensor& key, const Tensor& sample,
                                   const std::optional<Tensor>& input_scale,
                                   const std::optional<ScalarType>& input_dtype) {
  const Shape shape(x0);
  const NoiseKeys keys(key, sample, shape.samples);
  const Source x0_source = source(x0, shape, "x0");
  const Tensor x_t = empty(x0, x0.scalar_type());
  const Tensor model_input =
      input_dtype ? empty(x0, *input_dtype) : empty(x0, {shape.samples, 0}, x0.scalar_type());
  const Sink x_t_sink = final_sink(x_t, shape, 2),
             input_sink = input_dtype ? final_sink(model_input, shape, 2) : Sink{};

  with_compute_type(x0.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Numbers<T> a = per_sample<T>(alpha, shape, "alpha");
    const Numbers<T> s = per_sample<T>(sigma, shape, "sigma");
    const Numbers<T> c_in = per_sample<T>(input_scale, shape, "input_scale");
    const auto kernel = kernels<T>().renoise;
    parallel_over_chunks(Chunks(shape), 0, shape.samples, [&](const Chunk& chunk) {
      const int64_t i = chunk.sample;
      kernel({x0_source, x_t_sink, input_sink, keys[i], a[i], s[i], c_in[i]}, chunk);
    });
  });
  return {x_t, model_input};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastdistill_cpu, m) {
  m.def(
      "renoise(Tensor x0, Tensor alpha, Tensor sigma, Tensor key, Tensor sample, "
      "Tensor? input_scale, ScalarType? input_dtype) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastdistill_cpu, CPU, m) { m.impl("renoise", TORCH_BOX(&renoise)); }

}  // namespace fastdistill
