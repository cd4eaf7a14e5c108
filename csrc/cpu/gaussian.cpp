// gaussian_transport: an affine map with a low-rank basis (fastdistill/ops/gaussian.py).
//
// The two products are torch's own, in the basis's type; around them stand one pass that centres x
// and one that forms the results. Bits are those of torch's product, so they may depend on the
// number of threads and on the machine.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/parallel.h"

namespace fastdistill {
namespace {

/// y = mean_gain mu + rest_gain (x - shift mu) + U ((gains - rest_gain) c), all but the product.
struct Map {
  const Tensor &mean_gain, &rest_gain, &gains;
};

template <class T>
class Job {
 public:
  Job(const Tensor& x, const Tensor& mean, const Tensor& basis, const Tensor& shift)
      : x_(x),
        shape_(x),
        chunks_(shape_),
        mean_(source(mean, Shape(1, shape_.elements), "mean")),
        basis_(basis),
        shift_(per_sample<T>(shift, shape_, "shift")),
        factor_dtype_(basis.scalar_type()) {
    check_cpu(basis, "basis");
    STD_TORCH_CHECK(basis.dim() == 2 && basis.size(0) == shape_.elements,
                    "basis is not a matrix of ", shape_.elements, " rows");
    // Factors in another type than the basis's would be widened by every product anew.
    const bool wide = compute_dtype(x.scalar_type()) == ScalarType::Double;
    if (wide != (factor_dtype_ == ScalarType::Double)) {
      factor_dtype_ = wide ? ScalarType::Double : ScalarType::Float;
      basis_ = torch::stable::to(basis, factor_dtype_);
    }
    projected_ = torch::stable::matmul(centred(), basis_);
  }

  Tensor image(const Map& map) const {
    const Tensor product = torch::stable::matmul(scaled(map), torch::stable::transpose(basis_, 0, 1));
    const Tensor result = empty(x_, x_.scalar_type());
    Affine<T> row = affine(product);
    row.result = sink(result);
    const auto mean_gain = per_sample<T>(map.mean_gain, shape_, "mean_gain");
    const auto rest_gain = per_sample<T>(map.rest_gain, shape_, "rest_gain");
    for_every_chunk([&](const Chunk& chunk) {
      Affine<T> sample = row;
      // mean_gain mu + rest (x - shift mu) = rest x + (mean_gain - rest shift) mu
      sample.of_x = rest_gain[chunk.sample];
      sample.of_mean = mean_gain[chunk.sample] - sample.of_x * shift_[chunk.sample];
      kernels<T>().affine(sample, chunk);
    });
    return result;
  }

 private:
  /// x - shift mu, in the type of the products  # [B, d]
  Tensor centred() const {
    const Tensor result = empty(x_, {shape_.samples, shape_.elements}, factor_dtype_);
    Affine<T> row = affine(std::nullopt);
    row.result = sink(result);
    for_every_chunk([&](const Chunk& chunk) {
      Affine<T> sample = row;
      sample.of_x = 1;
      sample.of_mean = -shift_[chunk.sample];
      kernels<T>().affine(sample, chunk);
    });
    return result;
  }

  /// (gains - rest_gain) c, in the type of the products  # [B, r]
  Tensor scaled(const Map& map) const {
    const int64_t rank = basis_.size(1);
    const Shape small(shape_.samples, rank);
    const Tensor result = empty(x_, {shape_.samples, rank}, factor_dtype_);
    const Source gains = source(map.gains, small, "gains"), c = source(projected_, small, "c");
    const auto rest_gain = per_sample<T>(map.rest_gain, shape_, "rest_gain");
    const Sink out = sink(result);
    parallel_over_chunks(Chunks(small), 0, small.samples, [&](const Chunk& chunk) {
      kernels<T>().scale_by_gains({c, gains, out, rest_gain[chunk.sample]}, chunk);
    });
    return result;
  }

  Affine<T> affine(const std::optional<Tensor>& addend) const {
    Affine<T> row{};
    row.x = source(x_, shape_, "x");
    row.mean = mean_;
    row.addend = source(addend, shape_, "the product");
    return row;
  }

  template <class Body>
  void for_every_chunk(const Body& body) const {
    parallel_over_chunks(chunks_, 0, shape_.samples, body);
  }

  const Tensor& x_;
  Shape shape_;
  Chunks chunks_;
  Source mean_;
  Tensor basis_;
  Numbers<T> shift_;
  ScalarType factor_dtype_;
  Tensor projected_;
};

std::tuple<Tensor, Tensor> gaussian_transport(
    const Tensor& x, const Tensor& mean, const Tensor& basis, const Tensor& shift,
    const Tensor& mean_gain, const Tensor& rest_gain, const Tensor& gains,
    const std::optional<Tensor>& second_mean_gain, const std::optional<Tensor>& second_rest_gain,
    const std::optional<Tensor>& second_gains) {
  const bool second = second_gains.has_value();
  STD_TORCH_CHECK(second_mean_gain.has_value() == second && second_rest_gain.has_value() == second,
                  "second_mean_gain, second_rest_gain and second_gains belong together");
  if (x.size(0) == 0) return {empty(x, x.scalar_type()), empty(x, x.scalar_type())};
  return with_compute_type(x.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor> {
    const Job<decltype(zero)> job(x, mean, basis, shift);
    const Tensor first = job.image({mean_gain, rest_gain, gains});
    if (!second) return {first, empty(x, {x.size(0), 0}, x.scalar_type())};
    return {first, job.image({*second_mean_gain, *second_rest_gain, *second_gains})};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastdistill_cpu, m) {
  m.def(
      "gaussian_transport(Tensor x, Tensor mean, Tensor basis, Tensor shift, Tensor mean_gain, "
      "Tensor rest_gain, Tensor gains, Tensor? second_mean_gain, Tensor? second_rest_gain, "
      "Tensor? second_gains) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastdistill_cpu, CPU, m) {
  m.impl("gaussian_transport", TORCH_BOX(&gaussian_transport));
}

}  // namespace fastdistill
