// What the vectorised code in simd/ offers to the ops. Free of torch, because it is compiled once
// for each instruction set; an op's tensors arrive here as pointers with a storage type.
#pragma once

#include <cstdint>

namespace fastdistill {

enum class Storage : uint8_t { float32, bfloat16, float16, float64 };

template <class T>
constexpr Storage kStorageOf = sizeof(T) == 8 ? Storage::float64 : Storage::float32;

/// A tensor's elements to read; `data` is null for an optional tensor that was not given.
struct Source {
  const void* data = nullptr;
  Storage storage = Storage::float32;
  explicit operator bool() const { return data != nullptr; }
};

/// A tensor's elements to write; `data` is null for a result that nobody asked for.
struct Sink {
  void* data = nullptr;
  Storage storage = Storage::float32;
  bool past_cache = false;  ///< whether to write to memory without reading its lines first
  explicit operator bool() const { return data != nullptr; }
};

/// Elements of one sample that are processed together. Fixed, and partial sums are combined in the
/// order of the chunks, so that results do not depend on the number of threads.
constexpr int64_t kChunk = 16384;

/// At most kChunk elements of one sample.
struct Chunk {
  int64_t number;  ///< its place among the chunks of the batch
  int64_t sample;  ///< row of the batch
  int64_t first;   ///< its first element, counted within the sample
  int64_t offset;  ///< its first element, counted within the tensor
  int64_t count;   ///< how many elements it has
};

/// Philox's key and the part of its counter that is common to a sample (ops/noise.py).
struct NoiseKey {
  uint32_t seed_low, seed_high, stream, step, sample;
};

/// x_t = alpha x0 + sigma eps, model_input = c_in x_t, for one sample (ops/renoise.py).
template <class T>
struct Renoise {
  Source x0;
  Sink x_t, model_input;
  NoiseKey key;
  T alpha, sigma, input_scale;
};

/// D = a x_t + b F, cotangent = weight gradient_scale b (D - x0), for one sample
/// (ops/denoising.py).
template <class T>
struct Denoising {
  Source prediction, x0, x_t;
  Sink cotangent;
  T a, b, gradient_scale, weight;
};

/// Everything of one sample that gap and residual need (ops/matching.py).
template <class T>
struct Matching {
  Source x0, x_t, teacher, critic, teacher_uncond, critic_uncond;
  T guidance_scale, esd_lambda, a_phi, b_phi, a_psi, b_psi;
};

/// g = factor * gap, cotangent = scale * g, for one sample (ops/matching.py).
template <class T>
struct MatchingGradient {
  Sink cotangent;
  T factor, scale;
};

struct MatchingSums {
  double squared_g = 0, squared_gap = 0, nonfinite = 0;

  void operator+=(const MatchingSums& other) {
    squared_g += other.squared_g;
    squared_gap += other.squared_gap;
    nonfinite += other.nonfinite;
  }
};

/// Sums over a sample's E = D_phi - D_psi and R = D_phi - x0, with d = E or sign(E)
/// (ops/projection.py).
struct ProjectionSums {
  double squared_gap = 0, gap_along = 0, residual_along = 0, residual = 0;

  void operator+=(const ProjectionSums& other) {
    squared_gap += other.squared_gap;        // E^2
    gap_along += other.gap_along;            // d E
    residual_along += other.residual_along;  // d R
    residual += other.residual;              // |R|
  }
};

/// cotangent = of_residual R + of_direction d, for one sample; 0 where it was dropped.
template <class T>
struct ProjectionGradient {
  Sink cotangent;
  T of_residual, of_direction;
  bool dropped;
};

/// E = a x_t + b F - target, or - (target_a target_x + target_b target), and
/// cotangent = factor b d with d = E or sign(E), for one sample (ops/consistency.py).
template <class T>
struct Consistency {
  Source prediction, x_t, target, target_x;
  Sink cotangent;
  bool elementwise;
  T a, b, target_a, target_b, factor;
};

/// result = of_x x + of_mean mean + addend, for one sample (ops/gaussian.py).
template <class T>
struct Affine {
  Source x, mean, addend;
  Sink result;
  T of_x, of_mean;
};

/// result = (gains - rest) c, for one sample (ops/gaussian.py).
template <class T>
struct ScaleByGains {
  Source c, gains;
  Sink result;
  T rest;
};

/// One sample and all components; `u` is the gradient of D (ops/mixture.py).
template <class T>
struct Mixture {
  Source x, means, variances, u;
  Sink out;
  int64_t components, elements;
  bool isotropic;  ///< whether a component has one variance
  T alpha, alpha_square, sigma_square;
};

/// Consecutive elements that share a scale in 8-bit moments (ops/_moments.py).
constexpr int64_t kMomentBlock = 256;
static_assert(kChunk % kMomentBlock == 0, "a block of moments lies in one chunk");

/// A moment in 8 bits.
struct Codes {
  uint8_t* code;
  float* scale;  ///< of each kMomentBlock elements
};

/// A contiguous range of parameters, up to the next one's begin, with decay = 1 - lr weight_decay
/// and rate = lr / (1 - beta1^t) (ops/adamw.py).
template <class T>
struct AdamRange {
  int64_t begin;
  T decay, rate;
};

/// average = lerp(average, parameter, weight)
template <class T>
struct AdamAverage {
  T* average;
  T weight;
};

/// Everything that one update needs; the chunk says for which elements.
template <class T>
struct Adam {
  T *parameter, *exp_avg, *exp_avg_sq;  ///< the moments are null if they are codes
  Codes exp_avg_codes, exp_avg_sq_codes;
  Source gradient;
  Sink copy;
  NoiseKey key, moment_key;  ///< without their sample
  bool stochastic;
  const AdamRange<T>* ranges;
  int64_t range_count;
  const AdamAverage<T>* averages;
  int64_t average_count;
  T gradient_factor, weight1, beta2, weight2, correction2_root, eps;
};

/// The vectorised code of one instruction set, computing in T.
template <class T>
struct Kernels {
  void (*normal)(const NoiseKey&, const Chunk&, const Sink&);
  void (*uniform)(const NoiseKey&, const Chunk&, const Sink&);
  void (*renoise)(const Renoise<T>&, const Chunk&);
  /// Returns the chunk's sum of (D - x0)^2.
  double (*denoising)(const Denoising<T>&, const Chunk&);
  /// Writes the gap of the chunk and returns its sum of |x0 - D_phi|.
  double (*matching_gap)(const Matching<T>&, const Chunk&, T* gap);
  /// `gap` may be the cotangent's own memory.
  MatchingSums (*matching_gradient)(const MatchingGradient<T>&, const Chunk&, const T* gap);
  /// The tensors are those of Matching; d is sign(E) if `elementwise`.
  ProjectionSums (*projection_sums)(const Matching<T>&, bool elementwise, const Chunk&);
  void (*projection_gradients)(const Matching<T>&, bool elementwise, const ProjectionGradient<T>*,
                               int count, const Chunk&);
  /// Writes E of the chunk and returns its sum of E^2, or of |E| if elementwise.
  double (*consistency_distance)(const Consistency<T>&, const Chunk&, T* residual);
  /// `residual` may be the cotangent's own memory.
  void (*consistency_gradient)(const Consistency<T>&, const Chunk&, const T* residual);
  void (*affine)(const Affine<T>&, const Chunk&);
  void (*scale_by_gains)(const ScaleByGains<T>&, const Chunk&);
  /// Add to one sum for each component.
  void (*mixture_distances)(const Mixture<T>&, const Chunk&, double* sums);
  void (*mixture_projections)(const Mixture<T>&, const Chunk&, double* sums);
  void (*mixture_mean)(const Mixture<T>&, const Chunk&, const T* weights);
  void (*mixture_gradient)(const Mixture<T>&, const Chunk&, const T* weights, const T* pulls);
  double (*sum_of_squares)(const Source&, const Chunk&);
  void (*adamw)(const Adam<T>&, const Chunk&);
};

/// Kernels for the best instruction set of this machine, or for the lesser one that the environment
/// variable FASTDISTILL_CPU_CAPABILITY names: default, avx2 or avx512.
template <class T>
const Kernels<T>& kernels();

}  // namespace fastdistill
