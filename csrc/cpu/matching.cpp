// matching_cotangent: the tail of a pathwise distillation loss (fastdistill/ops/matching.py).
#include <torch/csrc/stable/library.h>

#include <memory>
#include <tuple>

#include "cpu/parallel.h"

namespace fastdistill {
namespace {

constexpr double kNormaliserFloor = 1e-6;

template <class T>
struct Coefficients {
  Numbers<T> a_phi, b_phi, a_psi, b_psi, weight;
};

/// Statistics of one sample, a row of the op's second result.
template <class T>
struct Statistics {
  T loss, residual, squared_gap, nonfinite;
};

template <class T>
struct Job {
  const Kernels<T>& kernels;
  Matching<T> tensors;
  Coefficients<T> of;
  Chunks chunks;
  Sink cotangent;
  Statistics<T>* statistics;
  bool normalise;
  T scale;

  /// Samples begin..end-1. Their gaps wait for the normaliser in the cotangent's own memory, or
  /// beside it where that is stored in another type.
  void run(int64_t begin, int64_t end) const {
    const int64_t first = begin * chunks.shape.elements;
    std::unique_ptr<T[]> memory;
    T* gap = static_cast<T*>(cotangent.data) + first;
    if (cotangent.storage != kStorageOf<T> || cotangent.past_cache) {
      memory.reset(new T[(end - begin) * chunks.shape.elements]);
      gap = memory.get();
    }
    write_gap(begin, end, gap, first);
    write_gradient(begin, end, gap, first);
  }

 private:
  /// residual_i = mean |x0 - D_phi|
  void write_gap(int64_t begin, int64_t end, T* gap, int64_t first) const {
    PartialSums<double> sums(chunks, begin, end);
    parallel_over_chunks(chunks, begin, end, [&](const Chunk& chunk) {
      Matching<T> sample = tensors;
      sample.a_phi = of.a_phi[chunk.sample];
      sample.b_phi = of.b_phi[chunk.sample];
      sample.a_psi = of.a_psi[chunk.sample];
      sample.b_psi = of.b_psi[chunk.sample];
      sums[chunk] = kernels.matching_gap(sample, chunk, gap + (chunk.offset - first));
    });
    for (int64_t i = begin; i < end; ++i) statistics[i].residual = mean(sums.total(i));
  }

  /// g = weight_i gap / (residual_i + floor),  loss_i = 1/2 mean(g^2),  cotangent = scale g / N
  void write_gradient(int64_t begin, int64_t end, const T* gap, int64_t first) const {
    PartialSums<MatchingSums> sums(chunks, begin, end);
    parallel_over_chunks(chunks, begin, end, [&](const Chunk& chunk) {
      T factor = of.weight[chunk.sample];
      if (normalise) factor /= statistics[chunk.sample].residual + T(kNormaliserFloor);
      const MatchingGradient<T> sample{cotangent, factor, scale};
      sums[chunk] = kernels.matching_gradient(sample, chunk, gap + (chunk.offset - first));
    });
    for (int64_t i = begin; i < end; ++i) {
      const MatchingSums total = sums.total(i);
      statistics[i].loss = mean(total.squared_g) / 2;
      statistics[i].squared_gap = mean(total.squared_gap);
      statistics[i].nonfinite = static_cast<T>(total.nonfinite);
    }
  }

  T mean(double sum) const {
    return static_cast<T>(sum / static_cast<double>(chunks.shape.elements));
  }
};

std::tuple<Tensor, Tensor> matching_cotangent(
    const Tensor& x0, const Tensor& x_t, const Tensor& teacher, const Tensor& teacher_a,
    const Tensor& teacher_b, const Tensor& critic, const Tensor& critic_a, const Tensor& critic_b,
    const std::optional<Tensor>& teacher_uncond, double guidance_scale,
    const std::optional<Tensor>& critic_uncond, double esd_lambda,
    const std::optional<Tensor>& weight, bool normalise, double scale, ScalarType dtype) {
  const Shape shape(x0);
  const Tensor cotangent = empty(x0, dtype);
  const Tensor statistics = empty(x0, {shape.samples, 4}, compute_dtype(x0.scalar_type()));
  with_compute_type(x0.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Matching<T> tensors{};
    tensors.x0 = source(x0, shape, "x0");
    tensors.x_t = source(x_t, shape, "x_t");
    tensors.teacher = source(teacher, shape, "teacher");
    tensors.critic = source(critic, shape, "critic");
    tensors.teacher_uncond = source(teacher_uncond, shape, "teacher_uncond");
    tensors.critic_uncond = source(critic_uncond, shape, "critic_uncond");
    tensors.guidance_scale = static_cast<T>(guidance_scale);
    tensors.esd_lambda = static_cast<T>(esd_lambda);
    const Job<T> job{
        kernels<T>(),
        tensors,
        {per_sample<T>(teacher_a, shape, "teacher_a"), per_sample<T>(teacher_b, shape, "teacher_b"),
         per_sample<T>(critic_a, shape, "critic_a"), per_sample<T>(critic_b, shape, "critic_b"),
         per_sample<T>(weight, shape, "weight")},
        Chunks(shape),
        final_sink(cotangent, shape),
        static_cast<Statistics<T>*>(statistics.mutable_data_ptr()),
        normalise,
        static_cast<T>(scale / static_cast<double>(shape.elements))};
    parallel_over_samples(shape, [&](int64_t begin, int64_t end) { job.run(begin, end); });
  });
  return {cotangent, statistics};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastdistill_cpu, m) {
  m.def(
      "matching_cotangent(Tensor x0, Tensor x_t, Tensor teacher, Tensor teacher_a, "
      "Tensor teacher_b, Tensor critic, Tensor critic_a, Tensor critic_b, "
      "Tensor? teacher_uncond, float guidance_scale, Tensor? critic_uncond, float esd_lambda, "
      "Tensor? weight, bool normalise, float scale, ScalarType dtype) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastdistill_cpu, CPU, m) {
  m.impl("matching_cotangent", TORCH_BOX(&matching_cotangent));
}

}  // namespace fastdistill
