// The kernels of one instruction set, in the namespace FASTDISTILL_LEVEL. The including file has
// already included every other header: nothing that other files share may be compiled for this set.
#include "cpu/simd/convert.inl"
#include "cpu/simd/lanes.inl"
#include "cpu/simd/noise.inl"
#include "cpu/simd/renoise.inl"
#include "cpu/simd/denoising.inl"
#include "cpu/simd/matching.inl"
#include "cpu/simd/projection.inl"
#include "cpu/simd/consistency.inl"
#include "cpu/simd/gaussian.inl"
#include "cpu/simd/mixture.inl"
#include "cpu/simd/norm.inl"
#include "cpu/simd/moments.inl"
#include "cpu/simd/adamw.inl"

namespace fastdistill::FASTDISTILL_LEVEL {

template <class T>
constexpr Kernels<T> kKernels = {
    noise<T, box_muller>,
    noise<T, uniforms<T>>,
    renoise<T>,
    denoising<T>,
    matching_gap<T>,
    matching_gradient<T>,
    projection_sums<T>,
    projection_gradients<T>,
    consistency_distance<T>,
    consistency_gradient<T>,
    affine<T>,
    scale_by_gains<T>,
    mixture_distances<T>,
    mixture_projections<T>,
    mixture_mean<T>,
    mixture_gradient<T>,
    sum_of_squares<T>,
    adamw<T>,
};

const Kernels<float>& kernels(float) { return kKernels<float>; }
const Kernels<double>& kernels(double) { return kKernels<double>; }

}  // namespace fastdistill::FASTDISTILL_LEVEL
