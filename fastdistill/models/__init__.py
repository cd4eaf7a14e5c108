"""Denoisers and the networks that ship with the package."""

from fastdistill.models.analytic import ExactDenoiser, ExactNetwork
from fastdistill.models.denoiser import Condition, Denoiser, Level, Network
from fastdistill.models.residual import ResidualCritic, ResidualNetwork

__all__ = [
    "Condition",
    "Denoiser",
    "ExactDenoiser",
    "ExactNetwork",
    "Level",
    "Network",
    "ResidualCritic",
    "ResidualNetwork",
]
