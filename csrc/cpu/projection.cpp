// projection_cotangents: the tail of a score-projection loss (fastdistill/ops/projection.py).
#include <torch/csrc/stable/library.h>

#include <array>
#include <cmath>
#include <tuple>

#include "cpu/parallel.h"

namespace fastdistill {
namespace {

constexpr double kNormaliserFloor = 1e-5;
constexpr int kCotangents = 5;

template <class T>
struct Coefficients {
  Numbers<T> a_phi, b_phi, a_psi, b_psi;
  Numbers<double> weight, score_scale;
};

/// The distance d and what the loss does with it. What belongs to whole samples is double.
struct Loss {
  double exponent, offset, alpha, guidance_scale, scale;
  bool elementwise, normalise;
};

/// Statistics of one sample, a row of the op's last result.
template <class T>
struct Statistics {
  T loss, residual, squared_gap, dropped;
};

/// d loss / d D = of_residual R + of_gap d', for each D; -of_residual for D_psi, 0 for x0.
struct Factors {
  double loss, of_residual, gap_phi, gap_psi, gap_x0;
};

Factors factors(const ProjectionSums& sums, const Loss& of, double m, double k) {
  const double p = of.exponent, alpha = of.alpha;
  const double along = sums.residual_along - alpha * sums.gap_along;
  if (of.elementwise) return {m * k * along, 0, m * k * (1 - alpha), m * k * alpha, -m * k};
  const double square = k * k * sums.gap_along + of.offset * of.offset;  // S
  const double product = k * k * along;                                  // P
  const double safe = square == 0 ? 1 : square;
  const double at_zero = p == 2 ? 2 : 0;
  const double gradient = square == 0 ? at_zero : p * std::pow(safe, p / 2 - 1);  // G
  const double tau = square == 0 ? 0 : (p - 2) * product / safe;
  const double loss = m * gradient * product;
  m *= k * k * gradient;
  return {loss, m, m * (1 - 2 * alpha + tau), m * (2 * alpha - tau), -m};
}

template <class T>
struct Job {
  const Kernels<T>& kernels;
  Matching<T> tensors;
  Coefficients<T> of;
  Loss loss;
  Chunks chunks;
  std::array<Sink, kCotangents> cotangents;  ///< to x0, x_t, teacher, critic, teacher_uncond
  Statistics<T>* statistics;

  /// Samples begin..end-1.
  void run(int64_t begin, int64_t end) const {
    PartialSums<ProjectionSums> sums(chunks, begin, end);
    parallel_over_chunks(chunks, begin, end, [&](const Chunk& chunk) {
      sums[chunk] = kernels.projection_sums(sample(chunk.sample), loss.elementwise, chunk);
    });
    std::vector<Factors> found;
    for (int64_t i = begin; i < end; ++i) found.push_back(finish(i, sums.total(i)));
    parallel_over_chunks(chunks, begin, end, [&](const Chunk& chunk) {
      const Matching<T> tensors = sample(chunk.sample);
      const auto all = gradients(tensors, found[chunk.sample - begin],
                                 statistics[chunk.sample].dropped != 0);
      kernels.projection_gradients(tensors, loss.elementwise, all.data(),
                                   tensors.teacher_uncond ? kCotangents : kCotangents - 1, chunk);
    });
  }

 private:
  Matching<T> sample(int64_t i) const {
    Matching<T> sample = tensors;
    sample.a_phi = of.a_phi[i];
    sample.b_phi = of.b_phi[i];
    sample.a_psi = of.a_psi[i];
    sample.b_psi = of.b_psi[i];
    return sample;
  }

  /// The factors of sample i, and its statistics.
  Factors finish(int64_t i, const ProjectionSums& sums) const {
    const double residual = mean(sums.residual);
    double m = of.weight[i];
    if (loss.normalise) m /= std::max(residual, kNormaliserFloor);
    const Factors found = factors(sums, loss, m, of.score_scale[i]);
    if (std::isfinite(static_cast<T>(found.loss)))
      statistics[i] = {static_cast<T>(found.loss), static_cast<T>(residual),
                       static_cast<T>(mean(sums.squared_gap)), 0};
    else
      statistics[i] = {0, 0, 0, 1};
    return found;
  }

  /// Chained from the denoisers to the op's differentiable arguments.
  std::array<ProjectionGradient<T>, kCotangents> gradients(const Matching<T>& at,
                                                           const Factors& found,
                                                           bool dropped) const {
    const double scale = loss.scale, guidance = at.teacher_uncond ? loss.guidance_scale : 1;
    const double residual = scale * found.of_residual, phi = scale * found.gap_phi;
    const double psi = scale * found.gap_psi, a_phi = at.a_phi, a_psi = at.a_psi;
    const double cond = guidance * at.b_phi, uncond = (1 - guidance) * at.b_phi;
    const auto to = [&](int place, double of_residual, double of_direction) {
      return ProjectionGradient<T>{cotangents[place], static_cast<T>(of_residual),
                                   static_cast<T>(of_direction), dropped};
    };
    return {to(0, 0, scale * found.gap_x0),
            to(1, (a_phi - a_psi) * residual, a_phi * phi + a_psi * psi),
            to(2, cond * residual, cond * phi), to(3, -at.b_psi * residual, at.b_psi * psi),
            to(4, uncond * residual, uncond * phi)};
  }

  double mean(double sum) const { return sum / static_cast<double>(chunks.shape.elements); }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> projection_cotangents(
    const Tensor& x0, const Tensor& x_t, const Tensor& teacher, const Tensor& teacher_a,
    const Tensor& teacher_b, const Tensor& critic, const Tensor& critic_a, const Tensor& critic_b,
    const std::optional<Tensor>& teacher_uncond, double guidance_scale,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& score_scale, double exponent,
    double offset, bool elementwise, double alpha, bool normalise, double scale) {
  const Shape shape(x0);
  const ScalarType dtype = x0.scalar_type();
  const Tensor to_x0 = empty(x0, dtype), to_x_t = empty(x_t, x_t.scalar_type());
  const Tensor to_teacher = empty(teacher, teacher.scalar_type());
  const Tensor to_critic = empty(critic, critic.scalar_type());
  const Tensor to_uncond = teacher_uncond ? empty(*teacher_uncond, teacher_uncond->scalar_type())
                                          : empty(x0, {shape.samples, 0}, dtype);
  const Tensor statistics = empty(x0, {shape.samples, 4}, compute_dtype(dtype));
  const auto result = [&](const Tensor& to) { return final_sink(to, shape, kCotangents); };
  with_compute_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    Matching<T> tensors{};
    tensors.x0 = source(x0, shape, "x0");
    tensors.x_t = source(x_t, shape, "x_t");
    tensors.teacher = source(teacher, shape, "teacher");
    tensors.critic = source(critic, shape, "critic");
    tensors.teacher_uncond = source(teacher_uncond, shape, "teacher_uncond");
    tensors.guidance_scale = static_cast<T>(guidance_scale);
    const Job<T> job{
        kernels<T>(),
        tensors,
        {per_sample<T>(teacher_a, shape, "teacher_a"), per_sample<T>(teacher_b, shape, "teacher_b"),
         per_sample<T>(critic_a, shape, "critic_a"), per_sample<T>(critic_b, shape, "critic_b"),
         per_sample<double>(weight, shape, "weight"),
         per_sample<double>(score_scale, shape, "score_scale")},
        {exponent, offset, alpha, guidance_scale, scale, elementwise, normalise},
        Chunks(shape),
        {result(to_x0), result(to_x_t), result(to_teacher), result(to_critic),
         teacher_uncond ? result(to_uncond) : Sink{}},
        static_cast<Statistics<T>*>(statistics.mutable_data_ptr())};
    parallel_over_samples(shape, [&](int64_t begin, int64_t end) { job.run(begin, end); });
  });
  return {to_x0, to_x_t, to_teacher, to_uncond, to_critic, statistics};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastdistill_cpu, m) {
  m.def(
      "projection_cotangents(Tensor x0, Tensor x_t, Tensor teacher, Tensor teacher_a, "
      "Tensor teacher_b, Tensor critic, Tensor critic_a, Tensor critic_b, Tensor? teacher_uncond, "
      "float guidance_scale, Tensor? weight, Tensor? score_scale, float exponent, float offset, "
      "bool elementwise, float alpha, bool normalise, float scale) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastdistill_cpu, CPU, m) {
  m.impl("projection_cotangents", TORCH_BOX(&projection_cotangents));
}

}  // namespace fastdistill
