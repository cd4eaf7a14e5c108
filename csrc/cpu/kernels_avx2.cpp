// The kernels for x86-64 with AVX2, FMA and F16C.
#include "cpu/simd/headers.h"

#if defined(__x86_64__)
#define FASTDISTILL_LEVEL level_avx2
#define FASTDISTILL_AVX2
#define FASTDISTILL_F16C

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "cpu/simd/kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
