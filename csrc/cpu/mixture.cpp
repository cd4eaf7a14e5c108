// mixture_denoise and its gradient: the analytic teacher (fastdistill/ops/mixture.py).
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "cpu/parallel.h"

namespace fastdistill {
namespace {

constexpr double kTurn = 2 * 3.14159265358979323846;

/// The batch and the components, and sums over samples for each component.
template <class T>
struct Components {
  Shape shape;
  Chunks chunks;
  Mixture<T> tensors{};
  Numbers<T> alpha, sigma;

  Components(const Tensor& x, const Tensor& alpha, const Tensor& sigma, const Tensor& means,
             const Tensor& variances)
      : shape(x),
        chunks(shape),
        alpha(per_sample<T>(alpha, shape, "alpha")),
        sigma(per_sample<T>(sigma, shape, "sigma")) {
    STD_TORCH_CHECK(means.dim() == 2 && means.size(0) > 0 && variances.dim() == 2,
                    "means and variances are not matrices with a row for each component");
    tensors.components = means.size(0);
    tensors.elements = shape.samples == 0 ? means.size(1) : shape.elements;
    tensors.isotropic = variances.size(1) == 1;
    const int64_t spread = tensors.isotropic ? 1 : tensors.elements;
    tensors.x = source(x, shape, "x");
    tensors.means = source(means, Shape(tensors.components, tensors.elements), "means");
    tensors.variances = source(variances, Shape(tensors.components, spread), "variances");
  }

  Mixture<T> sample(int64_t i) const {
    Mixture<T> sample = tensors;
    sample.alpha = alpha[i];
    sample.alpha_square = alpha[i] * alpha[i];
    sample.sigma_square = sigma[i] * sigma[i];
    return sample;
  }

  /// v_k of an isotropic component.
  double variance(int64_t i, int64_t k) const {
    const Numbers<T> spread(tensors.variances, 1);
    return static_cast<double>(sample(i).alpha_square * spread[k] + sample(i).sigma_square);
  }

  /// One sum for each component and each sample begin..end-1, chunk by chunk in order.
  template <class Kernel>
  std::vector<double> sums(int64_t begin, int64_t end, const Kernel& kernel) const {
    const int64_t count = tensors.components, first = begin * chunks.per_sample;
    std::vector<double> of_chunks((end - begin) * chunks.per_sample * count);
    parallel_over_chunks(chunks, begin, end, [&](const Chunk& chunk) {
      kernel(sample(chunk.sample), chunk, of_chunks.data() + (chunk.number - first) * count);
    });
    std::vector<double> totals((end - begin) * count);
    for (int64_t i = 0; i < (end - begin) * chunks.per_sample; ++i)
      for (int64_t k = 0; k < count; ++k)
        totals[i / chunks.per_sample * count + k] += of_chunks[i * count + k];
    return totals;
  }
};

template <class T>
struct Job {
  const Components<T>& components;
  Numbers<double> log_weights;
  T *log_density, *posterior;

  void run(int64_t begin, int64_t end) const {
    const int64_t count = components.tensors.components;
    std::vector<double> logits = components.sums(begin, end, kernels<T>().mixture_distances);
    for (int64_t i = begin; i < end; ++i) normalise(i, logits.data() + (i - begin) * count);
    parallel_over_chunks(components.chunks, begin, end, [&](const Chunk& chunk) {
      kernels<T>().mixture_mean(components.sample(chunk.sample), chunk,
                                posterior + chunk.sample * count);
    });
  }

 private:
  /// logits from distances, their log-sum-exp, and the posterior.
  void normalise(int64_t i, double* logits) const {
    const Mixture<T>& of = components.tensors;
    const double elements = static_cast<double>(components.shape.elements);
    double largest = -std::numeric_limits<double>::infinity();
    for (int64_t k = 0; k < of.components; ++k) {
      double distance = logits[k] + elements * std::log(kTurn);
      if (of.isotropic) {
        const double v = components.variance(i, k);
        distance = logits[k] / v + elements * std::log(kTurn * v);
      }
      logits[k] = log_weights[k] - distance / 2;
      largest = logits[k] > largest || std::isnan(logits[k]) ? logits[k] : largest;
    }
    const double shift = std::isfinite(largest) ? largest : 0;
    double total = 0;
    for (int64_t k = 0; k < of.components; ++k) total += std::exp(logits[k] - shift);
    log_density[i] = static_cast<T>(shift + std::log(total));
    for (int64_t k = 0; k < of.components; ++k)
      posterior[i * of.components + k] = static_cast<T>(std::exp(logits[k] - shift) / total);
  }
};

std::tuple<Tensor, Tensor, Tensor> mixture_denoise(const Tensor& x, const Tensor& alpha,
                                                   const Tensor& sigma, const Tensor& means,
                                                   const Tensor& variances,
                                                   const Tensor& log_weights) {
  const ScalarType dtype = compute_dtype(x.scalar_type());
  const Tensor denoised = empty(x, x.scalar_type());
  const Tensor log_density = empty(x, {x.size(0)}, dtype);
  const Tensor posterior = empty(x, {x.size(0), means.size(0)}, dtype);
  with_compute_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Components<T> components(x, alpha, sigma, means, variances);
    components.tensors.out = final_sink(denoised, components.shape);
    const Shape one_each(means.size(0), 1);
    const Job<T> job{components, per_sample<double>(log_weights, one_each, "log_weights"),
                     static_cast<T*>(log_density.mutable_data_ptr()),
                     static_cast<T*>(posterior.mutable_data_ptr())};
    parallel_over_samples(components.shape,
                          [&](int64_t begin, int64_t end) { job.run(begin, end); });
  });
  return {denoised, log_density, posterior};
}

template <class T>
struct GradientJob {
  const Components<T>& components;
  const T* posterior;
  Numbers<double> grad_log_density;

  void run(int64_t begin, int64_t end) const {
    const int64_t count = components.tensors.components;
    const std::vector<double> along =
        components.sums(begin, end, kernels<T>().mixture_projections);
    std::vector<T> pulls(along.size());
    for (int64_t i = begin; i < end; ++i) {
      const T* w = posterior + i * count;
      const double* projection = along.data() + (i - begin) * count;
      double mean = 0;
      for (int64_t k = 0; k < count; ++k) mean += static_cast<double>(w[k]) * projection[k];
      for (int64_t k = 0; k < count; ++k)
        pulls[(i - begin) * count + k] =
            static_cast<T>(w[k] * (projection[k] - mean + grad_log_density[i]));
    }
    parallel_over_chunks(components.chunks, begin, end, [&](const Chunk& chunk) {
      kernels<T>().mixture_gradient(components.sample(chunk.sample), chunk,
                                    posterior + chunk.sample * count,
                                    pulls.data() + (chunk.sample - begin) * count);
    });
  }
};

Tensor mixture_denoise_backward(const Tensor& x, const Tensor& alpha, const Tensor& sigma,
                                const Tensor& means, const Tensor& variances,
                                const Tensor& posterior, const Tensor& grad_denoised,
                                const Tensor& grad_log_density) {
  const Tensor grad = empty(x, x.scalar_type());
  with_compute_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Components<T> components(x, alpha, sigma, means, variances);
    components.tensors.u = source(grad_denoised, components.shape, "grad_denoised");
    components.tensors.out = final_sink(grad, components.shape);
    const Shape weights(components.shape.samples, components.tensors.components);
    const Source of_posterior = source(posterior, weights, "posterior");
    STD_TORCH_CHECK(of_posterior.storage == kStorageOf<T>,
                    "posterior is not in the dtype that mixture_denoise computes in");
    const GradientJob<T> job{
        components, static_cast<const T*>(of_posterior.data),
        per_sample<double>(grad_log_density, components.shape, "grad_log_density")};
    parallel_over_samples(components.shape,
                          [&](int64_t begin, int64_t end) { job.run(begin, end); });
  });
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastdistill_cpu, m) {
  m.def(
      "mixture_denoise(Tensor x, Tensor alpha, Tensor sigma, Tensor means, Tensor variances, "
      "Tensor log_weights) -> (Tensor, Tensor, Tensor)");
  m.def(
      "mixture_denoise_backward(Tensor x, Tensor alpha, Tensor sigma, Tensor means, "
      "Tensor variances, Tensor posterior, Tensor grad_denoised, Tensor grad_log_density) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastdistill_cpu, CPU, m) {
  m.impl("mixture_denoise", TORCH_BOX(&mixture_denoise));
  m.impl("mixture_denoise_backward", TORCH_BOX(&mixture_denoise_backward));
}

}  // namespace fastdistill
