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
};

/// Kernels for the best instruction set of this machine, or for the lesser one that the environment
/// variable FASTDISTILL_CPU_CAPABILITY names: default, avx2 or avx512.
template <class T>
const Kernels<T>& kernels();

}  // namespace fastdistill
