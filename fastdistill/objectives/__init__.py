"""Distillation objectives; each is one file that names its tail op, its critic and its weights."""

from fastdistill.objectives.augmentation import AugmentationSettings
from fastdistill.objectives.backtracking import Backtracking, BacktrackingMethod, Degradation
from fastdistill.objectives.base import Batch, Objective, Update
from fastdistill.objectives.consistency import Consistency, ConsistencyMethod
from fastdistill.objectives.consistency_matching import (
    ConsistencyMatching,
    ConsistencyMatchingMethod,
)
from fastdistill.objectives.continuous_consistency import (
    ContinuousConsistency,
    ContinuousConsistencyMethod,
)
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
    ESD,
    DiffInstruct,
    DiffInstructPlusPlus,
    DistributionMatchingMethod,
    FDistill,
)
from fastdistill.objectives.mean_flow import MeanFlow, MeanFlowMethod
from fastdistill.objectives.method import Method, Networks
from fastdistill.objectives.projection_methods import (
    SIM,
    DiffInstructStar,
    ScoreProjectionMethod,
    SiD,
    SiDA,
)
from fastdistill.objectives.regression import KnowledgeDistillation
from fastdistill.objectives.reward import (
    ClassifierReward,
    DecodedReward,
    LinearReward,
    QuadraticReward,
    Reward,
)
from fastdistill.objectives.score_projection import ScoreProjection

METHODS: tuple[type[Method], ...] = (
    DistributionMatchingMethod,
    DiffInstruct,
    DiffInstructPlusPlus,
    DMD,
    DMD2,
    ESD,
    FDistill,
    BacktrackingMethod,
    ScoreProjectionMethod,
    SIM,
    SiD,
    SiDA,
    DiffInstructStar,
    ConsistencyMethod,
    ContinuousConsistencyMethod,
    MeanFlowMethod,
    ConsistencyMatchingMethod,
)
"""What a recipe's objective can be."""

__all__ = [
    "METHODS",
    "AugmentationSettings",
    "Backtracking",
    "BacktrackingMethod",
    "Batch",
    "ClassifierReward",
    "Consistency",
    "ConsistencyMatching",
    "ConsistencyMatchingMethod",
    "ConsistencyMethod",
    "ContinuousConsistency",
    "ContinuousConsistencyMethod",
    "DecodedReward",
    "Degradation",
    "Denoising",
    "Discriminator",
    "DistributionMatching",
    "Divergence",
    "KnowledgeDistillation",
    "LinearReward",
    "MatchingSettings",
    "MeanFlow",
    "MeanFlowMethod",
    "Method",
    "Networks",
    "Objective",
    "QuadraticReward",
    "Reward",
    "ScoreProjection",
    "ScoreProjectionMethod",
    "Update",
    "check_sharing",
    "divergence_names",
    "get_divergence",
    "logistic_cotangent",
]
