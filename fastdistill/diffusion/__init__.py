"""Processes, parametrisations, noise, timestep laws, samplers and exactly known data."""

from fastdistill.diffusion.feynman_kac import (
    Particles,
    Target,
    feynman_kac,
    gaussian_target,
    systematic_resampling,
)
from fastdistill.diffusion.mixture import Drawn, GaussianMixture
from fastdistill.diffusion.noise import Noise
from fastdistill.diffusion.ode import integrate
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
    Start,
    Teleport,
    deterministic,
    few_step,
    heun,
    karras_sigmas,
    starting_point,
)
from fastdistill.diffusion.timestep_pairs import (
    EasyPairs,
    ImprovedPairs,
    PairLaw,
    Reach,
    reach_of,
)
from fastdistill.diffusion.timesteps import (
    FixedList,
    KarrasIndex,
    LogitNormal,
    LogNormalSigma,
    LogUniformSigma,
    TimestepLaw,
    Uniform,
)

__all__ = [
    "EDM",
    "VP",
    "X0",
    "AlphaSigma",
    "Drawn",
    "EDMPreconditioning",
    "EasyPairs",
    "Epsilon",
    "FixedList",
    "Flow",
    "GaussianMixture",
    "ImprovedPairs",
    "KarrasIndex",
    "LogNormalSigma",
    "LogUniformSigma",
    "LogitNormal",
    "Noise",
    "PairLaw",
    "Parametrisation",
    "Particles",
    "Process",
    "Reach",
    "RectifiedFlow",
    "Start",
    "Target",
    "Teleport",
    "TimestepLaw",
    "Uniform",
    "V",
    "convert",
    "deterministic",
    "few_step",
    "feynman_kac",
    "gaussian_target",
    "heun",
    "integrate",
    "karras_sigmas",
    "loss_weight",
    "reach_of",
    "starting_point",
    "systematic_resampling",
]
