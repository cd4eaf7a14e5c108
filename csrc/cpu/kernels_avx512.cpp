// The kernels for x86-64 with AVX-512 (F, BW, DQ, VL).
#include "cpu/simd/headers.h"

#if defined(__x86_64__)
#define FASTDISTILL_LEVEL level_avx512
#define FASTDISTILL_AVX512
#define FASTDISTILL_F16C

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#endif

#include "cpu/simd/kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
