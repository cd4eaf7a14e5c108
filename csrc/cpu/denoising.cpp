// denoising_cotangent: weighted denoising loss and its gradient (fastdistill/ops/denoising.py).
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/parallel.h"

namespace fastdistill {
namespace {

template <class T>
struct Coefficients {
  Numbers<T> a, b, weight;
};

template <class T>
void run(const Denoising<T>& tensors, const Shape& shape, const Coefficients<T>& of, T* loss) {
  const Chunks chunks(shape);
  const auto kernel = kernels<T>().denoising;
  PartialSums<double> squared(chunks, 0, shape.samples);
  parallel_over_chunks(chunks, 0, shape.samples, [&](const Chunk& chunk) {
    Denoising<T> sample = tensors;
    sample.a = of.a[chunk.sample];
    sample.b = of.b[chunk.sample];
    sample.weight = of.weight[chunk.sample];
    squared[chunk] = kernel(sample, chunk);
  });
  // loss_i = weight_i mean((D - x0)^2)
  const double elements = static_cast<double>(shape.elements);
  for (int64_t i = 0; i < shape.samples; ++i)
    loss[i] = of.weight[i] * static_cast<T>(squared.total(i) / elements);
}

// D = a x_t + b F,  cotangent = scale * 2 weight b (D - x0) / N
std::tuple<Tensor, Tensor> denoising_cotangent(const Tensor& prediction, const Tensor& x0,
                                               const Tensor& x_t, const Tensor& a, const Tensor& b,
                                               const std::optional<Tensor>& weight, double scale) {
  const Shape shape(prediction);
  const ScalarType dtype = prediction.scalar_type();
  const Tensor cotangent = empty(prediction, dtype);
  const Tensor loss = empty(prediction, {shape.samples}, compute_dtype(dtype));
  with_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    Denoising<T> tensors{};
    tensors.prediction = source(prediction, shape, "prediction");
    tensors.x0 = source(x0, shape, "x0");
    tensors.x_t = source(x_t, shape, "x_t");
    tensors.cotangent = final_sink(cotangent, shape);
    tensors.gradient_scale = static_cast<T>(2 * scale / static_cast<double>(shape.elements));
    const Coefficients<T> of{per_sample<T>(a, shape, "a"), per_sample<T>(b, shape, "b"),
                             per_sample<T>(weight, shape, "weight")};
    run(tensors, shape, of, static_cast<T*>(loss.mutable_data_ptr()));
  });
  return {cotangent, loss};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastdistill_cpu, m) {
  m.def(
      "denoising_cotangent(Tensor prediction, Tensor x0, Tensor x_t, Tensor a, Tensor b, "
      "Tensor? weight, float scale) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastdistill_cpu, CPU, m) {
  m.impl("denoising_cotangent", TORCH_BOX(&denoising_cotangent));
}

}  // namespace fastdistill
