"""Metrics that judge generators, each beside the number that real data would score."""

from fastdistill.evaluate.coverage import ClassShares, class_shares
from fastdistill.evaluate.digits_classifier import DigitsClassifier, digits_classifier
from fastdistill.evaluate.frechet import (
    GaussianStatistics,
    frechet_distance,
    gaussian_statistics,
    matched_frechet_distance,
    real_split_distance,
)
from fastdistill.evaluate.neighbours import PrecisionRecall, precision_recall
from fastdistill.evaluate.samples import FeatureClassifier, evaluate_samples
from fastdistill.evaluate.vendi import vendi_score, vendi_score_from_kernel

__all__ = [
    "ClassShares",
    "DigitsClassifier",
    "FeatureClassifier",
    "GaussianStatistics",
    "PrecisionRecall",
    "class_shares",
    "digits_classifier",
    "evaluate_samples",
    "frechet_distance",
    "gaussian_statistics",
    "matched_frechet_distance",
    "precision_recall",
    "real_split_distance",
    "vendi_score",
    "vendi_score_from_kernel",
]
