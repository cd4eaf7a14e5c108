// consistency_cotangent: a consistency loss and its gradient (fastdistill/ops/consistency.py).
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <memory>
#include <tuple>

#include "cpu/parallel.h"

namespace fastdistill {
namespace {

template <class T>
struct Coefficients {
  Numbers<T> a, b, target_a, target_b;
  Numbers<double> weight;
};

/// The distance d of a sample, in double, from its sum of E^2 (of |E| if elementwise).
struct Distance {
  double exponent, offset;
  bool elementwise;

  double value(double norm) const {
    if (elementwise) return norm;
    // sqrt(S) - c without its cancellation; for other exponents c is 0
    if (offset > 0) return norm / (std::sqrt(norm + offset * offset) + offset);
    return std::pow(norm, exponent / 2);
  }

  /// d'(E) = gradient(norm) E, or sign(E).
  double gradient(double norm) const {
    if (elementwise) return 1;
    const double square = norm + offset * offset;
    if (square == 0) return exponent == 2 ? 2 : 0;
    return exponent * std::pow(square, exponent / 2 - 1);
  }
};

template <class T>
struct Job {
  const Kernels<T>& kernels;
  Consistency<T> tensors;
  Coefficients<T> of;
  Distance distance;
  Chunks chunks;
  T* loss;
  double scale;

  /// Samples begin..end-1: their distances, then their gradients. E waits for its factor in the
  /// cotangent's own memory, or beside it where that is stored in another type or past the cache.
  void run(int64_t begin, int64_t end) const {
    const Sink& cotangent = tensors.cotangent;
    const int64_t start = begin * chunks.shape.elements;
    std::unique_ptr<T[]> memory;
    T* residual = static_cast<T*>(cotangent.data) + start;
    if (cotangent.storage != kStorageOf<T> || cotangent.past_cache) {
      memory.reset(new T[(end - begin) * chunks.shape.elements]);
      residual = memory.get();
    }
    PartialSums<double> sums(chunks, begin, end);
    parallel_over_chunks(chunks, begin, end, [&](const Chunk& chunk) {
      sums[chunk] = kernels.consistency_distance(sample(chunk.sample), chunk,
                                                 residual + (chunk.offset - start));
    });
    std::vector<T> factors;
    for (int64_t i = begin; i < end; ++i) {
      const double norm = sums.total(i), weight = of.weight[i];
      loss[i] = static_cast<T>(weight * distance.value(norm));
      factors.push_back(static_cast<T>(scale * weight * distance.gradient(norm)));
    }
    parallel_over_chunks(chunks, begin, end, [&](const Chunk& chunk) {
      Consistency<T> at = sample(chunk.sample);
      at.factor = factors[chunk.sample - begin];
      kernels.consistency_gradient(at, chunk, residual + (chunk.offset - start));
    });
  }

 private:
  Consistency<T> sample(int64_t i) const {
    Consistency<T> sample = tensors;
    sample.a = of.a[i];
    sample.b = of.b[i];
    sample.target_a = of.target_a[i];
    sample.target_b = of.target_b[i];
    return sample;
  }
};

std::tuple<Tensor, Tensor> consistency_cotangent(
    const Tensor& prediction, const Tensor& x_t, const Tensor& a, const Tensor& b,
    const Tensor& target, const std::optional<Tensor>& target_x,
    const std::optional<Tensor>& target_a, const std::optional<Tensor>& target_b,
    const std::optional<Tensor>& weight, double exponent, double offset, bool elementwise,
    double scale) {
  const Shape shape(prediction);
  const ScalarType dtype = prediction.scalar_type();
  STD_TORCH_CHECK(target_x.has_value() == target_a.has_value() &&
                      target_x.has_value() == target_b.has_value(),
                  "target_x, target_a and target_b belong together");
  const Tensor cotangent = empty(prediction, dtype);
  const Tensor loss = empty(prediction, {shape.samples}, compute_dtype(dtype));
  with_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    Consistency<T> tensors{};
    tensors.prediction = source(prediction, shape, "prediction");
    tensors.x_t = source(x_t, shape, "x_t");
    tensors.target = source(target, shape, "target");
    tensors.target_x = source(target_x, shape, "target_x");
    tensors.cotangent = final_sink(cotangent, shape);
    tensors.elementwise = elementwise;
    const Job<T> job{
        kernels<T>(),
        tensors,
        {per_sample<T>(a, shape, "a"), per_sample<T>(b, shape, "b"),
         per_sample<T>(target_a, shape, "target_a"), per_sample<T>(target_b, shape, "target_b"),
         per_sample<double>(weight, shape, "weight")},
        {exponent, offset, elementwise},
        Chunks(shape),
        static_cast<T*>(loss.mutable_data_ptr()),
        scale};
    parallel_over_samples(shape, [&](int64_t begin, int64_t end) { job.run(begin, end); });
  });
  return {cotangent, loss};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastdistill_cpu, m) {
  m.def(
      "consistency_cotangent(Tensor prediction, Tensor x_t, Tensor a, Tensor b, Tensor target, "
      "Tensor? target_x, Tensor? target_a, Tensor? target_b, Tensor? weight, float exponent, "
      "float offset, bool elementwise, float scale) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastdistill_cpu, CPU, m) {
  m.impl("consistency_cotangent", TORCH_BOX(&consistency_cotangent));
}

}  // namespace fastdistill
