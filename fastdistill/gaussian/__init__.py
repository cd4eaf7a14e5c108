"""The Gaussian in a diffusion model: fit, diagnosis, teleport, a stand-in for the teacher."""

from fastdistill.gaussian.diagnose import Diagnosis, diagnose, noise_levels
from fastdistill.gaussian.files import load_gaussian, save_gaussian
from fastdistill.gaussian.fit import Fitter, cluster_centres, fit_gaussian
from fastdistill.gaussian.model import Fit, Gaussian, GaussianMixture, LabelledGaussian
from fastdistill.gaussian.scheduler import TeleportScheduler

__all__ = [
    "Diagnosis",
    "Fit",
    "Fitter",
    "Gaussian",
    "GaussianMixture",
    "LabelledGaussian",
    "TeleportScheduler",
    "cluster_centres",
    "diagnose",
    "fit_gaussian",
    "load_gaussian",
    "noise_levels",
    "save_gaussian",
]
