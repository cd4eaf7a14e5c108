// From stable-ABI tensors to what the kernels read, with the checks that keep them in bounds. The
// Python wrappers check more and say more; these hold for direct calls of torch.ops too.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "cpu/kernels.h"

namespace fastdistill {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Storage storage_of(ScalarType dtype, const char* name) {
  switch (dtype) {
    case ScalarType::Float: return Storage::float32;
    case ScalarType::BFloat16: return Storage::bfloat16;
    case ScalarType::Half: return Storage::float16;
    case ScalarType::Double: return Storage::float64;
    default:
      STD_TORCH_CHECK(false, name, " is ", torch::headeronly::toString(dtype),
                      "; expected float32, bfloat16, float16 or float64");
  }
}

inline void check_cpu(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " is not on the CPU, where the other arguments are");
}

/// Samples and elements a sample of a batch [B, ...].
struct Shape {
  int64_t samples, elements;
  Shape(int64_t samples, int64_t elements) : samples(samples), elements(elements) {}
  explicit Shape(const Tensor& batch) {
    STD_TORCH_CHECK(batch.dim() >= 1, "expected a batch [B, ...], got a scalar");
    samples = batch.size(0);
    elements = samples == 0 ? 0 : batch.numel() / samples;
  }
  /// All elements as one sample.
  static Shape flat(const Tensor& range) { return {1, range.numel()}; }
};

/// A sample-like argument: contiguous, with as many elements as the batch.
inline Source source(const Tensor& tensor, const Shape& shape, const char* name) {
  check_cpu(tensor, name);
  STD_TORCH_CHECK(tensor.numel() == shape.samples * shape.elements, name, " has ", tensor.numel(),
                  " elements; expected ", shape.samples, " samples of ", shape.elements);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous; pass ", name, ".contiguous()");
  return {tensor.const_data_ptr(), storage_of(tensor.scalar_type(), name)};
}

inline Source source(const std::optional<Tensor>& tensor, const Shape& shape, const char* name) {
  return tensor ? source(*tensor, shape, name) : Source{};
}

inline Sink sink(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), storage_of(tensor.scalar_type(), "the result")};
}

/// Results of so many bytes push each other and the inputs out of the cache before anybody reads
/// them: a share of common last-level caches.
constexpr int64_t kPastCache = 8 << 20;

/// The sink of one of an op's `results`, written once and not read again by the op.
inline Sink final_sink(const Tensor& batch, const Shape& shape, int64_t results = 1) {
  Sink out = sink(batch);
  const int64_t sample = shape.elements * batch.element_size();
  out.past_cache = results * shape.samples * sample >= kPastCache && sample % 64 == 0 &&
                   reinterpret_cast<uintptr_t>(out.data) % 64 == 0;
  return out;
}

/// A new contiguous tensor of the shape of `like`.
inline Tensor empty(const Tensor& like, ScalarType dtype) {
  return torch::stable::new_empty(like, like.sizes(), dtype);
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

/// A vector of any floating-point dtype and stride, read in T: one coefficient a sample, mostly.
template <class T>
class Numbers {
 public:
  Numbers(const Source& source, int64_t stride) : source_(source), stride_(stride) {}

  T operator[](int64_t i) const {
    switch (source_.storage) {
      case Storage::float32: return read<float>(i);
      case Storage::bfloat16: return read<torch::headeronly::BFloat16>(i);
      case Storage::float16: return read<torch::headeronly::Half>(i);
      case Storage::float64: return read<double>(i);
    }
    return T(0);
  }

 private:
  template <class Stored>
  T read(int64_t i) const {
    return static_cast<T>(static_cast<const Stored*>(source_.data)[i * stride_]);
  }

  Source source_;
  int64_t stride_;
};

/// The coefficients of the samples; 1 for an optional one that was not given.
template <class T>
Numbers<T> per_sample(const std::optional<Tensor>& tensor, const Shape& shape, const char* name) {
  static const T one = 1;
  if (!tensor) return {{&one, kStorageOf<T>}, 0};
  check_cpu(*tensor, name);
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == shape.samples, name,
                  " is not one number a sample; expected shape (", shape.samples, ",)");
  return {{tensor->const_data_ptr(), storage_of(tensor->scalar_type(), name)}, tensor->stride(0)};
}

/// An int64 vector of any stride.
class Integers {
 public:
  Integers(const Tensor& tensor, int64_t size, const char* name) {
    check_cpu(tensor, name);
    STD_TORCH_CHECK(
        tensor.dim() == 1 && tensor.size(0) == size && tensor.scalar_type() == ScalarType::Long,
        name, " is not an int64 vector of ", size, " elements");
    data_ = static_cast<const int64_t*>(tensor.const_data_ptr());
    stride_ = tensor.stride(0);
  }
  int64_t operator[](int64_t i) const { return data_[i * stride_]; }

 private:
  const int64_t* data_;
  int64_t stride_;
};

inline ScalarType compute_dtype(ScalarType storage) {
  return storage == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

/// Calls run(T()) with the type that samples of this storage are computed in.
template <class Run>
auto with_compute_type(ScalarType storage, Run run) {
  return storage == ScalarType::Double ? run(double()) : run(float());
}

}  // namespace fastdistill
