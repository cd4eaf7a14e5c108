// The key of an op's noise, for each sample of its batch.
#pragma once

#include "cpu/tensor.h"

namespace fastdistill {

/// The key (seed, stream, step) of sample 0.
inline NoiseKey common_key(const Tensor& key) {
  const Integers triple(key, 3, "key");
  return {static_cast<uint32_t>(triple[0]), static_cast<uint32_t>(triple[0] >> 32),
          static_cast<uint32_t>(triple[1]), static_cast<uint32_t>(triple[2]), 0};
}

class NoiseKeys {
 public:
  /// `key` is (seed, stream, step), `sample` the global index of each of `samples` rows.
  NoiseKeys(const Tensor& key, const Tensor& sample, int64_t samples)
      : sample_(sample, samples, "sample"), common_(common_key(key)) {}

  NoiseKey operator[](int64_t row) const {
    NoiseKey key = common_;
    key.sample = static_cast<uint32_t>(sample_[row]);
    return key;
  }

 private:
  Integers sample_;
  NoiseKey common_;
};

}  // namespace fastdistill
