// sum_of_squares: the squared norm of a flat range (fastdistill/ops/norm.py).
#include <torch/csrc/stable/library.h>

#include "cpu/parallel.h"

namespace fastdistill {
namespace {

Tensor sum_of_squares(const Tensor& value, const std::optional<Tensor>&) {
  const Chunks chunks(Shape::flat(value));
  const ScalarType dtype = compute_dtype(value.scalar_type());
  const Tensor result = empty(value, {}, dtype);
  const Source from = source(value, chunks.shape, "value");
  with_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = kernels<T>().sum_of_squares;
    PartialSums<double> sums(chunks, 0, 1);
    parallel_over_chunks(chunks, 0, 1,
                         [&](const Chunk& chunk) { sums[chunk] = kernel(from, chunk); });
    *static_cast<T*>(result.mutable_data_ptr()) = static_cast<T>(sums.total(0));
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastdistill_cpu, m) {
  m.def("sum_of_squares(Tensor value, Tensor(a!)? ticket=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastdistill_cpu, CPU, m) {
  m.impl("sum_of_squares", TORCH_BOX(&sum_of_squares));
}

}  // namespace fastdistill
