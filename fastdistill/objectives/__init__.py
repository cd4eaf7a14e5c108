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
from fastdistill.objectives.matching_methods import (
    DMD,
    DMD2,
    DiffInstruct,
    DistributionMatchingMethod,
    FDistill,
)
from fastdistill.objectives.method import Method, Networks
from fastdistill.objectives.regression import KnowledgeDistillation

METHODS: tuple[type[Method], ...] = (
    DistributionMatchingMethod,
    DiffInstruct,
    DMD,
    DMD2,
    FDistill,
)
"""What a recipe's objective can be."""

__all__ = [
    "METHODS",
    "Batch",
    "Denoising",
    "Discriminator",
    "DistributionMatching",
    "Divergence",
    "KnowledgeDistillation",
    "MatchingSettings",
    "Method",
    "Networks",
    "Objective",
    "Update",
    "check_sharing",
    "divergence_names",
    "get_divergence",
    "logistic_cotangent",
]
