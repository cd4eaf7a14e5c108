"""Metrics that judge generators, each beside the number that real data would score."""

from fastdistill.evaluate.coverage import ClassShares, class_shares
from fastdistill.evaluate.digits_classifier import DigitsClassifier, digits_classifier
from fastdistill.evaluate.divergences import (
    Divergences,
    divergences,
    gaussian_kl,
    neighbour_divergences,
    neighbour_log_density,
)
from fastdistill.evaluate.frechet import (
    GaussianStatistics,
    feature_statistics,
    frechet_distance,
    gaussian_statistics,
    matched_frechet_distance,
    real_split_distance,
)
from fastdistill.evaluate.kernel_distance import KernelDistance, kernel_distance
from fastdistill.evaluate.modes import FittedModes, Modes, fitted_divergences, modes
from fastdistill.evaluate.neighbours import (
    DensityCoverage,
    PrecisionRecall,
    density_coverage,
    precision_recall,
)
from fastdistill.evaluate.perturbation import eps_mmd, expected_perturbation_score
from fastdistill.evaluate.samples import FeatureClassifier, evaluate_samples
from fastdistill.evaluate.vendi import vendi_score, vendi_score_from_kernel
from fastdistill.evaluate.wasserstein import sliced_wasserstein, wasserstein

__all__ = [
    "ClassShares",
    "DensityCoverage",
    "DigitsClassifier",
    "Divergences",
    "FeatureClassifier",
    "FittedModes",
    "GaussianStatistics",
    "KernelDistance",
    "Modes",
    "PrecisionRecall",
    "class_shares",
    "density_coverage",
    "digits_classifier",
    "divergences",
    "eps_mmd",
    "evaluate_samples",
    "expected_perturbation_score",
    "feature_statistics",
    "fitted_divergences",
    "frechet_distance",
    "gaussian_kl",
    "gaussian_statistics",
    "kernel_distance",
    "matched_frechet_distance",
    "modes",
    "neighbour_divergences",
    "neighbour_log_density",
    "precision_recall",
    "real_split_distance",
    "sliced_wasserstein",
    "vendi_score",
    "vendi_score_from_kernel",
    "wasserstein",
]
