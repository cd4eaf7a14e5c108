// The kernels for any processor: SSE2 on x86-64, NEON on arm64.
#include "cpu/simd/headers.h"

#define FASTDISTILL_LEVEL level_default
#include "cpu/simd/kernels.inl"
