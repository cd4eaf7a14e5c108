"""Distillation objectives; each is one file that names its tail op, its critic and its weights."""

from fastdistill.objectives.base import Batch, Objective, Update
from fastdistill.objectives.denoising import Denoising
from fastdistill.objectives.discriminator import Discriminator, logistic_cotangent
from fastdistill.objectives.distribution_matching import (
    DistributionMatching,
    MatchingSettings,
    check_sharing,
)
from fastdistill.objectives.divergences import Divergence, divergence_names, get_divergence
from fastdistill.objectives.regression import KnowledgeDistillation

__all__ = [
    "Batch",
    "Denoising",
    "Discriminator",
    "DistributionMatching",
    "Divergence",
    "KnowledgeDistillation",
    "MatchingSettings",
    "Objective",
    "Update",
    "check_sharing",
    "divergence_names",
    "get_divergence",
    "logistic_cotangent",
]
