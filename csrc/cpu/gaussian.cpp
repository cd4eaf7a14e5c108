// gaussian_transport: an affine map with a low-rank basis (fastdistill/ops/gaussian.py).
//
// The two products are torch's own, in the basis's type; around them stand one pass that centres x
// and one that forms the results. Bits are those of torch's product, so they may depend on the
// number of threads and on the machine.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/parallel.h"

namespace fastdistill {
namespace {

/// What one map y = mean_gain mu + rest_gain (x - shift mu) + U ((gains - rest_gain) c) needs.
struct Map {
  const Tensor &mean_gain, &rest_gain, &gains;
};

/// y += factors basis^T
void add_product(const Tensor& y, const Tensor& factors, const Tensor& basis) {
  const Tensor transposed = torch::stable::transpose(basis, 0, 1);
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(y.get(), y.get(), factors.get(), transposed.get(), 1, 1));
}

template <class T>
class Job {
 public:
  Job(const Tensor& x, const Tensor& mean, const Tensor& basis, const Tensor& shift)
      : x_(x),
        shape_(x),
        mean_(source(mean, Shape(1, shape_.elements), "mean")),
        basis_(basis),
        shift_(per_sample<T>(shift, shape_, "shift")),
        factor_dtype_(basis.scalar_type()) {
    check_cpu(basis, "basis");
    STD_TORCH_CHECK(basis.dim() == 2 && basis.size(0) == shape_.elements,
                    "basis is not a matrix of ", shape_.elements, " rows");
    // Products are formed in one type: in double if x is, else in that of the basis.
    const bool wide = x.scalar_type() == ScalarType::Double;
    if (wide != (factor_dtype_ == ScalarType::Double)) {
      factor_dtype_ = wide ? ScalarType::Double : ScalarType::Float;
      basis_ = torch::stable::to(basis, factor_dtype_);
    }
    // Where results are stored as the compute type, products are added to them where they lie.
    adds_in_place_ = storage_of(x.scalar_type(), "x") == kStorageOf<T> &&
                     factor_dtype_ == x.scalar_type();
  }

  std::vector<Tensor> run(const std::vector<Map>& maps) const {
    std::vector<Tensor> results;
    for (size_t k = 0; k < maps.size(); ++k) results.push_back(empty(x_, x_.scalar_type()));
    // x - shift mu waits for its second use in the last result's memory, if that has its type.
    const Tensor centred = adds_in_place_ ? flat(results.back())
                                          : empty(x_, {shape_.samples, shape_.elements}, factor_dtype_);
    for_every_chunk([&](const Chunk& chunk) {
      write({source(x_, shape_, "x"), mean_, {}, sink(centred), 1, -shift_[chunk.sample]}, chunk);
    });
    const Tensor c = torch::stable::matmul(centred, basis_);
    for (size_t k = 0; k < maps.size(); ++k)
      complete(maps[k], scaled(maps[k], c), centred, results[k]);
    return results;
  }

 private:
  /// result = mean_gain mu + rest_gain (x - shift mu) + factors basis^T
  void complete(const Map& map, const Tensor& factors, const Tensor& centred,
                const Tensor& result) const {
    const auto rest_gain = per_sample<T>(map.rest_gain, shape_, "rest_gain");
    const auto mean_gain = per_sample<T>(map.mean_gain, shape_, "mean_gain");
    if (adds_in_place_) {
      for_every_chunk([&](const Chunk& chunk) {
        write({source(centred, shape_, "centred"), mean_, {}, sink(result),
               rest_gain[chunk.sample], mean_gain[chunk.sample]},
              chunk);
      });
      return add_product(flat(result), factors, basis_);
    }
    const Tensor product = torch::stable::matmul(factors, torch::stable::transpose(basis_, 0, 1));
    for_every_chunk([&](const Chunk& chunk) {
      const T rest = rest_gain[chunk.sample];
      write({source(x_, shape_, "x"), mean_, source(product, shape_, "product"), sink(result), rest,
             mean_gain[chunk.sample] - rest * shift_[chunk.sample]},
            chunk);
    });
  }

  static void write(const Affine<T>& sample, const Chunk& chunk) {
    kernels<T>().affine(sample, chunk);
  }

  Tensor flat(const Tensor& batch) const {
    return torch::stable::view(batch, {shape_.samples, shape_.elements});
  }

  template <class Body>
  void for_every_chunk(const Body& body) const {
    parallel_over_chunks(Chunks(shape_), 0, shape_.samples, body);
  }

  /// (gains - rest_gain) c, in the type of the products  # [B, r]
  Tensor scaled(const Map& map, const Tensor& c) const {
    const Shape small(shape_.samples, basis_.size(1));
    const Tensor result = empty(x_, {small.samples, small.elements}, factor_dtype_);
    const auto rest = per_sample<T>(map.rest_gain, shape_, "rest_gain");
    const ScaleByGains<T> sample{source(c, small, "c"), source(map.gains, small, "gains"),
                                 sink(result), 0};
    parallel_over_chunks(Chunks(small), 0, small.samples, [&](const Chunk& chunk) {
      ScaleByGains<T> row = sample;
      row.rest = rest[chunk.sample];
      kernels<T>().scale_by_gains(row, chunk);
    });
    return result;
  }

  const Tensor& x_;
  Shape shape_;
  Source mean_;
  Tensor basis_;
  Numbers<T> shift_;
  ScalarType factor_dtype_;
  bool adds_in_place_;
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
    std::vector<Map> maps{{mean_gain, rest_gain, gains}};
    if (second) maps.push_back({*second_mean_gain, *second_rest_gain, *second_gains});
    const auto results = Job<decltype(zero)>(x, mean, basis, shift).run(maps);
    return {results[0], second ? results[1] : empty(x, {x.size(0), 0}, x.scalar_type())};
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
