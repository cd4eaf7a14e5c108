"""Processes, parametrisations, noise, timestep laws and samplers."""

from fastdistill.diffusion.feynman_kac import (
    Particles,
    Target,
    feynman_kac,
    gaussian_target,
    systematic_resampling,
)
from fastdistill.diffusion.noise import Noise
from fastdistill.diffusion.parametrisation import (
    X0,
    EDMPreconditioning,
    Epsilon,
    Flow,
    Parametrisation,
    V,
    convert,
    loss_weight,
)
from fastdistill.diffusion.process import EDM, VP, AlphaSigma, Process, RectifiedFlow
from fastdistill.diffusion.samplers import (
    deterministic,
    few_step,
    heun,
    karras_sigmas,
    starting_point,
)
from fastdistill.diffusion.timesteps import (
    FixedList,
    KarrasIndex,
    LogitNormal,
    LogNormalSigma,
    TimestepLaw,
    Uniform,
)

__all__ = [
    "EDM",
    "VP",
    "X0",
    "AlphaSigma",
    "EDMPreconditioning",
    "Epsilon",
    "FixedList",
    "Flow",
    "KarrasIndex",
    "LogNormalSigma",
    "LogitNormal",
    "Noise",
    "Parametrisation",
    "Particles",
    "Process",
    "RectifiedFlow",
    "Target",
    "TimestepLaw",
    "Uniform",
    "V",
    "convert",
    "deterministic",
    "few_step",
    "feynman_kac",
    "gaussian_target",
    "heun",
    "karras_sigmas",
    "loss_weight",
    "starting_point",
    "systematic_resampling",
]
