// mixture_denoise and its gradient (ops/mixture.py). A block of x stays in the first-level cache
// while all components pass by.
namespace fastdistill::FASTDISTILL_LEVEL {

/// ln of the product of the values of each lane, kept as a product of mantissas and a sum of
/// exponents, so that a logarithm is taken once a lane and block.
template <class T>
class LogProduct {
  static constexpr bool kWide = sizeof(T) == 8;
  using Bits = std::conditional_t<kWide, uint64_t, uint32_t>;
  using Exponent = std::conditional_t<kWide, int64_t, int32_t>;
  static constexpr int kMantissaBits = kWide ? 52 : 23, kBias = kWide ? 1023 : 127;
  static constexpr Bits kMantissaMask = (Bits{1} << kMantissaBits) - 1;
  static constexpr Bits kOne = Bits{kBias} << kMantissaBits;

 public:
  LogProduct() { std::fill(mantissa_.value, mantissa_.value + kLanes, T(1)); }

  void multiply(T value, int lane) {
    Bits bits;
    std::memcpy(&bits, &value, sizeof bits);
    exponent_.value[lane] += static_cast<Exponent>(bits >> kMantissaBits) - kBias;
    bits = (bits & kMantissaMask) | kOne;
    T mantissa;
    std::memcpy(&mantissa, &bits, sizeof mantissa);
    mantissa_.value[lane] *= mantissa;  // below 2 each: kBlock / kLanes of them stay below 2^32
  }

  double log() const {
    double product = 1, total = 0;
    int64_t exponent = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      exponent += exponent_.value[lane];
      product *= static_cast<double>(mantissa_.value[lane]);
      if (lane % 16 == 15) {
        total += std::log(product);
        product = 1;
      }
    }
    return total + static_cast<double>(exponent) * 0.69314718055994530942;
  }

 private:
  Lanes<T> mantissa_;
  Lanes<Exponent> exponent_;
};

/// m_k and v_k = alpha^2 lambda_k + sigma^2 of a block, one number v where components are isotropic.
template <class T>
struct Component {
  Scratch<T> mean_scratch, variance_scratch;
  const T *mean, *variance;
  T isotropic;

  void load_block(const Mixture<T>& of, int64_t k, int64_t first, int64_t count) {
    mean = load(of.means, k * of.elements + first, count, mean_scratch);
    if (of.isotropic) {
      isotropic = *load(of.variances, k, 1, variance_scratch);
      return;
    }
    variance = load(of.variances, k * of.elements + first, count, variance_scratch);
  }
};

/// Adds to sums[k] the chunk's sum of ln v_kj + (x_j - alpha m_kj)^2 / v_kj, for isotropic
/// components of the square alone.
template <class T>
void mixture_distances(const Mixture<T>& of, const Chunk& chunk, double* sums) {
  Scratch<T> x_scratch;
  Component<T> component;
  const T alpha = of.alpha, alpha_square = of.alpha_square, sigma_square = of.sigma_square;
  for_each_block(chunk, [&](int64_t first, int64_t count) {
    const T* x = load(of.x, chunk.offset + first, count, x_scratch);
    for (int64_t k = 0; k < of.components; ++k) {
      component.load_block(of, k, chunk.first + first, count);
      const T *m = component.mean, *variance = component.variance;
      Lanes<T> square;
      if (of.isotropic) {
        for_each_lane(count, [=, &square](int64_t i, int lane) {
          const T centred = x[i] - alpha * m[i];
          square.value[lane] += centred * centred;
        });
        sums[k] += square.sum();
        continue;
      }
      LogProduct<T> product;
      for_each_lane(count, [=, &square, &product](int64_t i, int lane) {
        const T centred = x[i] - alpha * m[i], v = alpha_square * variance[i] + sigma_square;
        square.value[lane] += centred * centred / v;
        product.multiply(v, lane);
      });
      sums[k] += square.sum() + product.log();
    }
  });
}

/// Adds to sums[k] the chunk's sum of u_j (m_kj + alpha lambda_kj / v_kj (x_j - alpha m_kj)).
template <class T>
void mixture_projections(const Mixture<T>& of, const Chunk& chunk, double* sums) {
  Scratch<T> x_scratch, u_scratch;
  Component<T> component;
  const T alpha = of.alpha, alpha_square = of.alpha_square, sigma_square = of.sigma_square;
  for_each_block(chunk, [&](int64_t first, int64_t count) {
    const T* x = load(of.x, chunk.offset + first, count, x_scratch);
    const T* u = load(of.u, chunk.offset + first, count, u_scratch);
    for (int64_t k = 0; k < of.components; ++k) {
      component.load_block(of, k, chunk.first + first, count);
      const T *m = component.mean, *variance = component.variance;
      const T one = component.isotropic;
      const T gain = alpha * one / (alpha_square * one + sigma_square);
      Lanes<T> along;
      if (of.isotropic) {
        for_each_lane(count, [=, &along](int64_t i, int lane) {
          along.value[lane] += (m[i] + gain * (x[i] - alpha * m[i])) * u[i];
        });
      } else {
        for_each_lane(count, [=, &along](int64_t i, int lane) {
          const T gain = alpha * variance[i] / (alpha_square * variance[i] + sigma_square);
          along.value[lane] += (m[i] + gain * (x[i] - alpha * m[i])) * u[i];
        });
      }
      sums[k] += along.sum();
    }
  });
}

/// out = sum_k weights[k] (m_k + alpha lambda_k / v_k (x - alpha m_k))
template <class T>
void mixture_mean(const Mixture<T>& of, const Chunk& chunk, const T* weights) {
  Scratch<T> x_scratch, out_scratch;
  Component<T> component;
  const T alpha = of.alpha, alpha_square = of.alpha_square, sigma_square = of.sigma_square;
  for_each_block(chunk, [&](int64_t first, int64_t count) {
    const int64_t offset = chunk.offset + first;
    const T* x = load(of.x, offset, count, x_scratch);
    T* out = destination(of.out, offset, out_scratch);
    std::fill(out, out + count, T(0));
    for (int64_t k = 0; k < of.components; ++k) {
      const T weight = weights[k];
      if (weight == 0) continue;  // of a data set's points most
      component.load_block(of, k, chunk.first + first, count);
      const T *m = component.mean, *variance = component.variance;
      if (of.isotropic) {
        const T one = component.isotropic;
        const T gain = alpha * one / (alpha_square * one + sigma_square);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i)
          out[i] += weight * (m[i] + gain * (x[i] - alpha * m[i]));
      } else {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
          const T gain = alpha * variance[i] / (alpha_square * variance[i] + sigma_square);
          out[i] += weight * (m[i] + gain * (x[i] - alpha * m[i]));
        }
      }
    }
    store(out, of.out, offset, count);
  });
}

/// out = sum_k weights[k] alpha lambda_k / v_k u - pulls[k] (x - alpha m_k) / v_k
template <class T>
void mixture_gradient(const Mixture<T>& of, const Chunk& chunk, const T* weights, const T* pulls) {
  Scratch<T> x_scratch, u_scratch, out_scratch;
  Component<T> component;
  const T alpha = of.alpha, alpha_square = of.alpha_square, sigma_square = of.sigma_square;
  for_each_block(chunk, [&](int64_t first, int64_t count) {
    const int64_t offset = chunk.offset + first;
    const T* x = load(of.x, offset, count, x_scratch);
    const T* u = load(of.u, offset, count, u_scratch);
    T* out = destination(of.out, offset, out_scratch);
    std::fill(out, out + count, T(0));
    for (int64_t k = 0; k < of.components; ++k) {
      const T weight = weights[k], pull = pulls[k];
      if (weight == 0 && pull == 0) continue;
      component.load_block(of, k, chunk.first + first, count);
      const T *m = component.mean, *variance = component.variance;
      if (of.isotropic) {
        const T one = component.isotropic, v = alpha_square * one + sigma_square;
        const T of_u = weight * (alpha * one / v), of_centred = pull / v;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i)
          out[i] += of_u * u[i] - of_centred * (x[i] - alpha * m[i]);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
          const T v = alpha_square * variance[i] + sigma_square;
          out[i] += weight * (alpha * variance[i] / v) * u[i] - pull * (x[i] - alpha * m[i]) / v;
        }
      }
    }
    store(out, of.out, offset, count);
  });
}

}  // namespace fastdistill::FASTDISTILL_LEVEL
