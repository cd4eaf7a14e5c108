"""What is said of samples, by the kind of data: digits have a classifier, mixtures have the truth.

Of other samples there are pictures and times alone: a distance would need features that somebody
trusts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastdistill.data import Data, InMemoryData, MixtureData
from fastdistill.diffusion import Noise
from fastdistill.engine.drawing import save_grid, save_scatter
from fastdistill.engine.pictures import Pictures
from fastdistill.engine.sampling import EVALUATION_STEP
from fastdistill.evaluate import (
    DigitsClassifier,
    digits_classifier,
    eps_mmd,
    evaluate_samples,
    expected_perturbation_score,
    fitted_divergences,
    modes,
    neighbour_divergences,
    sliced_wasserstein,
)
from fastdistill.evaluate._arguments import random_rows
from fastdistill.models import Condition, Denoiser

_GRID = 100
"""Most samples of a grid of pictures."""


class Scores:
    """Of samples about which nothing is known: pictures, and no numbers.

    Args:
        data: the run's.
        pictures: make images of samples.
        seed: the run's.
    """

    shown = _GRID
    """Most samples of a column that is drawn."""
    timing_rounds: int | None = None
    """Rounds of a thousand samples in which sampling is timed; None times one round of all."""

    def __init__(self, data: Data, pictures: Pictures, seed: int) -> None:
        self.data, self.pictures, self.seed = data, pictures, seed

    def facts(self) -> dict[str, float]:
        """What a summary says of the data."""
        return {}

    def real(self, count: int) -> dict[str, Tensor]:
        """A column of real samples under its title, where there are some."""
        real = self.data.batch(self.seed, 0, min(count, self.shown)).samples
        return {} if real is None else {"real": real}

    def of(self, samples: Tensor) -> dict[str, float]:
        """Numbers that samples alone give; what real data score is named in `report.REAL`."""
        return {}

    def drift(self, teacher: Denoiser, samples: Tensor, condition: Condition) -> dict[str, float]:
        """Numbers that the teacher gives; every rank calls this, as a teacher may be sharded."""
        return {}

    def draw(self, path: Path, columns: Mapping[str, Tensor]) -> None:
        """Draw columns of samples under their titles into a .png file."""
        cut = {title: samples[: self.shown] for title, samples in columns.items()}
        save_grid(path, cut, self.pictures)


class DigitsScores(Scores):
    """Of digits: distances, precision and recall, diversity, and the teacher's drift."""

    timing_rounds = 9
    data: InMemoryData

    def facts(self) -> dict[str, float]:
        return {"real_samples": len(self.data.samples)}

    def real(self, count: int) -> dict[str, Tensor]:
        """In the order of the generated ones, class by class."""
        data, shown = self.data, self.shown
        assert data.labels is not None
        ranks = [torch.where(data.labels == k)[0] for k in range(data.classes)]
        rows = torch.stack([ranks[i % data.classes][i // data.classes] for i in range(shown)])
        return {"real": data.samples[rows]}

    def of(self, samples: Tensor) -> dict[str, float]:
        return evaluate_samples(self.data.samples, samples, self._classifier)

    def drift(self, teacher: Denoiser, samples: Tensor, condition: Condition) -> dict[str, float]:
        """MMD of expected perturbation scores to the real ones, beside that of two real halves."""
        count = min(len(samples), len(self.data.samples) // 2)
        generator = torch.Generator("cpu").manual_seed(self.seed)
        order = random_rows(torch.arange(len(self.data.samples)), 2 * count, generator)
        order = order.to(self.data.samples.device)
        labels = self.data.labels
        real = self._perturbed(
            teacher, self.data.samples[order], None if labels is None else labels[order]
        )
        chosen = None if condition is None else condition[:count]
        made = self._perturbed(teacher, samples[:count], chosen)
        return {
            "eps_mmd": eps_mmd(real[:count], made),
            "eps_mmd_real_halves": eps_mmd(real[:count], real[count:]),
        }

    def _perturbed(self, teacher: Denoiser, samples: Tensor, condition: Condition) -> Tensor:
        ratios = torch.arange(1, 9) / 100  # VP's times of 0.001 to 0.02, as in the paper
        times = teacher.process.time_of_ratio(ratios).tolist()
        noise = Noise(self.seed, samples.device).at(EVALUATION_STEP)
        return expected_perturbation_score(teacher, samples, times, noise, condition)

    @functools.cached_property
    def _classifier(self) -> DigitsClassifier:
        return digits_classifier()


class MixtureScores(Scores):
    """Of a mixture: divergences from the truth, and what became of its modes.

    In one or two dimensions by estimated densities, above by Gaussians fitted to each mode; beside
    each number that which fresh samples of the truth score at the same count.
    """

    shown = 2000
    timing_rounds = 9
    data: MixtureData

    def real(self, count: int) -> dict[str, Tensor]:
        return {"truth": self._truth(min(count, self.shown), "truth")}

    def of(self, samples: Tensor) -> dict[str, float]:
        return self._judged(samples) | self._yardstick(len(samples))

    def draw(self, path: Path, columns: Mapping[str, Tensor]) -> None:
        cut = {title: samples[: self.shown] for title, samples in columns.items()}
        save_scatter(path, self.real(self.shown) | cut)

    def _judged(self, samples: Tensor) -> dict[str, float]:
        mixture, count = self.data.mixture, len(samples)
        truth = self._truth(count, "truth")
        scores: dict[str, float] = {}
        if mixture.dimensions <= 2:
            clean = truth.new_ones(count), truth.new_zeros(count)
            at_truth = mixture.log_density(truth, *clean)
            at_samples = mixture.log_density(samples, *clean)
            scores |= neighbour_divergences(truth, samples, at_truth, at_samples)._asdict()
        else:
            fitted = fitted_divergences(samples, mixture)._asdict()
            scores |= {f"fitted_{name}": value for name, value in fitted.items()}
        found = modes(samples, mixture)
        return scores | {
            "sliced_wasserstein": sliced_wasserstein(truth, samples),
            "modes_covered": float(found.covered),
            "mode_weight_min": found.weight_min,
            "mode_weight_max": found.weight_max,
            "outliers": found.outliers,
            "samples": float(count),
        }

    @functools.lru_cache(maxsize=2)  # noqa: B019  # one count in training, one at the end
    def _yardstick(self, count: int) -> dict[str, float]:
        """What fresh samples of the truth score."""
        judged = self._judged(self._truth(count, "yardstick"))
        del judged["samples"]
        return {f"{name}_real": value for name, value in judged.items()}

    def _truth(self, count: int, stream: str) -> Tensor:
        index = torch.arange(count, device=self.data.device)
        return self.data.draw(self.seed, EVALUATION_STEP, index, stream).samples


def scores_of(data: Data, pictures: Pictures, seed: int, name: str) -> Scores:
    """The scores for a recipe's data; arguments are those of `Scores`, and the data's name."""
    kinds = {"digits": DigitsScores, "mixture": MixtureScores}
    return kinds.get(name, Scores)(data, pictures, seed)
