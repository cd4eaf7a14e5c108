"""The fused ops: each reads the raw network outputs once and returns losses and cotangents."""

from fastdistill.ops._arguments import Coefficients
from fastdistill.ops._backend import choose_backend, load_extension, use_backend
from fastdistill.ops.denoising import DenoisingCotangent, denoising_cotangent
from fastdistill.ops.density_ratio import DensityRatioWeight, density_ratio_weight, log_snr_bin
from fastdistill.ops.matching import MatchingCotangent, matching_cotangent
from fastdistill.ops.noise import normal, uniform
from fastdistill.ops.renoise import Renoised, renoise

__all__ = [
    "Coefficients",
    "DenoisingCotangent",
    "DensityRatioWeight",
    "MatchingCotangent",
    "Renoised",
    "choose_backend",
    "denoising_cotangent",
    "density_ratio_weight",
    "load_extension",
    "log_snr_bin",
    "matching_cotangent",
    "normal",
    "renoise",
    "uniform",
    "use_backend",
]
