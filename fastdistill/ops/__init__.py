"""The fused ops: each reads the raw network outputs once and returns losses and cotangents."""

from fastdistill.ops._arguments import Coefficients
from fastdistill.ops._backend import choose_backend, load_extension, use_backend
from fastdistill.ops._distance import Distance
from fastdistill.ops._moments import MOMENT_BLOCK, dequantise_moment, quantise_moment
from fastdistill.ops.adamw import adamw_ema_
from fastdistill.ops.consistency import ConsistencyCotangent, consistency_cotangent
from fastdistill.ops.denoising import DenoisingCotangent, denoising_cotangent
from fastdistill.ops.density_ratio import DensityRatioWeight, density_ratio_weight, log_snr_bin
from fastdistill.ops.gated_residual import gated_residual
from fastdistill.ops.gaussian import Transported, gaussian_denoise, gaussian_transport
from fastdistill.ops.glu import geglu, geglu_backward
from fastdistill.ops.group_norm import group_norm_silu
from fastdistill.ops.matching import MatchingCotangent, matching_cotangent
from fastdistill.ops.mixture import MixtureDenoised, mixture_denoise
from fastdistill.ops.modulated_norm import Normed, modulated_norm
from fastdistill.ops.noise import normal, uniform
from fastdistill.ops.norm import sum_of_squares
from fastdistill.ops.projection import ProjectionCotangents, projection_cotangents
from fastdistill.ops.renoise import Renoised, renoise
from fastdistill.ops.rms_norm_rope import rms_norm_rope

__all__ = [
    "MOMENT_BLOCK",
    "Coefficients",
    "ConsistencyCotangent",
    "DenoisingCotangent",
    "DensityRatioWeight",
    "Distance",
    "MatchingCotangent",
    "MixtureDenoised",
    "Normed",
    "ProjectionCotangents",
    "Renoised",
    "Transported",
    "adamw_ema_",
    "choose_backend",
    "consistency_cotangent",
    "denoising_cotangent",
    "density_ratio_weight",
    "dequantise_moment",
    "gated_residual",
    "gaussian_denoise",
    "gaussian_transport",
    "geglu",
    "geglu_backward",
    "group_norm_silu",
    "load_extension",
    "log_snr_bin",
    "matching_cotangent",
    "mixture_denoise",
    "modulated_norm",
    "normal",
    "projection_cotangents",
    "quantise_moment",
    "renoise",
    "rms_norm_rope",
    "sum_of_squares",
    "uniform",
    "use_backend",
]
