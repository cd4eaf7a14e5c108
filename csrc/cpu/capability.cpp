// Which kernels run: the choice is made once a process.
#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace fastdistill {

namespace level_default {
const Kernels<float>& kernels(float);
const Kernels<double>& kernels(double);
}  // namespace level_default

#if defined(__x86_64__)
namespace level_avx2 {
const Kernels<float>& kernels(float);
const Kernels<double>& kernels(double);
}  // namespace level_avx2

namespace level_avx512 {
const Kernels<float>& kernels(float);
const Kernels<double>& kernels(double);
}  // namespace level_avx512
#endif

namespace {

enum class Capability { lowest, avx2, avx512 };

Capability supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) return avx512 ? Capability::avx512 : Capability::avx2;
#endif
  return Capability::lowest;
}

Capability wanted() {
  const char* variable = std::getenv("FASTDISTILL_CPU_CAPABILITY");
  const std::string name = variable == nullptr ? "avx512" : variable;
  if (name == "default") return Capability::lowest;
  if (name == "avx2") return Capability::avx2;
  if (name == "avx512") return Capability::avx512;
  throw std::runtime_error("FASTDISTILL_CPU_CAPABILITY is '" + name +
                           "'; expected default, avx2 or avx512");
}

}  // namespace

template <class T>
const Kernels<T>& kernels() {
  [[maybe_unused]] static const Capability capability = std::min(wanted(), supported());
#if defined(__x86_64__)
  if (capability == Capability::avx512) return level_avx512::kernels(T());
  if (capability == Capability::avx2) return level_avx2::kernels(T());
#endif
  return level_default::kernels(T());
}

template const Kernels<float>& kernels();
template const Kernels<double>& kernels();

}  // namespace fastdistill
