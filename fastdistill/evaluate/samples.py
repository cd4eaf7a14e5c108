"""`evaluate_samples`: everything that is said about a generator's images, in one dictionary."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastdistill.evaluate._arguments import check_features, check_finite, random_rows
from fastdistill.evaluate._threads import SMALL_SET, one_thread
from fastdistill.evaluate.coverage import class_shares
from fastdistill.evaluate.frechet import matched_frechet_distance, real_split_distance
from fastdistill.evaluate.kernel_distance import kernel_distance
from fastdistill.evaluate.neighbours import density_coverage, precision_recall
from fastdistill.evaluate.vendi import vendi_score


class FeatureClassifier(Protocol):
    """What `evaluate_samples` needs; `DigitsClassifier` is one."""

    classes: int
    """Number of classes"""

    def features(self, images: Tensor) -> Tensor:
        """Features [n, d] of images [n, ...]."""
        ...

    def predict(self, images: Tensor) -> Tensor:
        """Integer labels [n] in [0, classes) of images [n, ...]."""
        ...


def evaluate_samples(
    real: Tensor, generated: Tensor, classifier: FeatureClassifier, seed: int = 0
) -> dict[str, float]:
    """Judge generated images against real ones.

    Every metric here depends on the number of samples, so each is taken at equal numbers of real
    and generated samples, drawn by ``seed``, and the dictionary says at how many:

    ========================================  =================================================
    ``frechet_pixel``, ``frechet_features``   `matched_frechet_distance` at ``frechet_samples``
    the same with ``_real_halves``            `real_split_distance` at ``frechet_samples``: what
                                              a perfect generator would score
    ``kernel_distance``                       `kernel_distance` of features: without bias, so that
                                              a perfect generator would score 0
    ``precision``, ``recall``                 `precision_recall` of features at ``samples``
    ``density``, ``coverage``                 `density_coverage` of features at ``samples``
    ``vendi``, ``vendi_real``                 `vendi_score` of features at ``samples``
    ``class_share_min``, ``class_share_max``  `class_shares` of all generated images
    ``samples``                               min(n, m)
    ``frechet_samples``                       min(n // 2, m)
    ========================================  =================================================

    Args:
        real: floating-point images [n, ...], n >= 4. The pixel distance takes the square of their
            number of pixels in memory: meant for small images.
        generated: floating-point images [m, ...] of the same shape and range, m >= 4.
        classifier: gives the features and labels.
        seed: of generators of its own; torch's global one is neither read nor moved.

    Returns:
        Plain floats by name.

    Raises:
        ValueError: no or too few images, images of different shapes, or non-finite ones.
    """
    with one_thread(when=real.numel() + generated.numel() <= SMALL_SET):
        return _evaluate(real, generated, classifier, seed)


@torch.no_grad()
def _evaluate(
    real: Tensor, generated: Tensor, classifier: FeatureClassifier, seed: int
) -> dict[str, float]:
    _check_images("real images", real)
    _check_images("generated images", generated)
    if real.shape[1:] != generated.shape[1:]:
        raise ValueError(
            f"generated images have shape {tuple(generated.shape[1:])}; expected "
            f"{tuple(real.shape[1:])}, as the real ones have"
        )
    generated = generated.to(real.device)
    features_real, features_generated = classifier.features(real), classifier.features(generated)
    check_features("features of the generated images", features_generated, rows=4)
    shares = class_shares(classifier.predict(generated), classifier.classes)
    return {
        **_frechet("frechet_pixel", real.flatten(1), generated.flatten(1), seed),
        **_frechet("frechet_features", features_real, features_generated, seed),
        "kernel_distance": kernel_distance(
            features_real, features_generated, subsets=20, subset_size=500, seed=seed
        ).mean,
        **_neighbours_and_vendi(features_real, features_generated, seed),
        "class_share_min": shares.smallest,
        "class_share_max": shares.largest,
        "samples": float(min(real.shape[0], generated.shape[0])),
        "frechet_samples": float(min(real.shape[0] // 2, generated.shape[0])),
    }


def _check_images(name: str, images: Tensor) -> None:
    if images.numel() == 0:
        raise ValueError(f"{name} are empty: shape {tuple(images.shape)}")
    if images.ndim < 2 or not images.is_floating_point():
        raise ValueError(
            f"{name} are {images.dtype} of shape {tuple(images.shape)}; expected floating-point "
            "[n, ...]"
        )
    check_finite(name, images)
    if images.shape[0] < 4:
        raise ValueError(f"{name}: {images.shape[0]} samples; at least 4 are needed")


def _frechet(name: str, real: Tensor, generated: Tensor, seed: int) -> dict[str, float]:
    """Distance and yardstick of features [n, d] and [m, d], at the same number of samples."""
    size = min(real.shape[0] // 2, generated.shape[0])
    return {
        name: matched_frechet_distance(real, generated, seed=seed, size=size),
        f"{name}_real_halves": real_split_distance(real, seed=seed, size=size),
    }


def _neighbours_and_vendi(real: Tensor, generated: Tensor, seed: int) -> dict[str, float]:
    """What is taken of features [n, d] and [m, d] at min(n, m) samples."""
    generator = torch.Generator("cpu").manual_seed(seed)
    count = min(real.shape[0], generated.shape[0])
    real, generated = (random_rows(values, count, generator) for values in (real, generated))
    precision, recall = precision_recall(real, generated)
    density, coverage = density_coverage(real, generated)
    return {
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
        "vendi": vendi_score(generated),
        "vendi_real": vendi_score(real),
    }
