// normal and uniform: counter-based random numbers (fastdistill/ops/noise.py).
#include "cpu/noise.h"

#include <torch/csrc/stable/library.h>

#include "cpu/parallel.h"

namespace fastdistill {
namespace {

/// A member of Kernels<T>, chosen by name: normal or uniform.
template <class T>
using Draw = decltype(Kernels<T>::normal) Kernels<T>::*;

template <class T>
void fill(Draw<T> draw, const NoiseKeys& keys, const Tensor& out) {
  const Shape shape(out);
  const Sink result = final_sink(out, shape);
  const auto kernel = kernels<T>().*draw;
  parallel_over_chunks(Chunks(shape), 0, shape.samples,
                       [&](const Chunk& chunk) { kernel(keys[chunk.sample], chunk, result); });
}

Tensor draw(Draw<float> in_float, Draw<double> in_double, const Tensor& key, const Tensor& sample,
            std::vector<int64_t> shape, ScalarType dtype) {
  const NoiseKeys keys(key, sample, sample.numel());
  shape.insert(shape.begin(), sample.numel());
  const Tensor out = empty(sample, shape, dtype);
  if (dtype == ScalarType::Double)
    fill<double>(in_double, keys, out);
  else
    fill<float>(in_float, keys, out);
  return out;
}

// (z_0, z_1) = sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v)
Tensor normal(const Tensor& key, const Tensor& sample, const std::vector<int64_t>& shape,
              ScalarType dtype) {
  return draw(&Kernels<float>::normal, &Kernels<double>::normal, key, sample, shape, dtype);
}

// u = (floor(w / 2^9) + 1/2) / 2^23
Tensor uniform(const Tensor& key, const Tensor& sample, const std::vector<int64_t>& shape,
               ScalarType dtype) {
  return draw(&Kernels<float>::uniform, &Kernels<double>::uniform, key, sample, shape, dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastdistill_cpu, m) {
  m.def("normal(Tensor key, Tensor sample, SymInt[] shape, ScalarType dtype) -> Tensor");
  m.def("uniform(Tensor key, Tensor sample, SymInt[] shape, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastdistill_cpu, CPU, m) {
  m.impl("normal", TORCH_BOX(&normal));
  m.impl("uniform", TORCH_BOX(&uniform));
}

}  // namespace fastdistill
