"""`StandIn`: a fitted Gaussian in the teacher's place above a noise level, sample by sample.

Times of a law are drawn in two strata, below and above the level, so that which rows of a batch
the network never sees is known on the host before a step: shapes stay as they are, and one CUDA
graph holds all steps. Row j of a batch of N over all ranks is above the level where

    floor((j + 1) n / N + 1/2) > floor(j n / N + 1/2),    n = round(p N)

with p the law's probability of lying above it: n rows, spread evenly over the batch and so over
ranks. Each row's time is drawn from the law given its stratum, and weighted by p N / n above and
(1 - p) N / (N - n) below, which are near 1 and make the expectation the law's own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdistill.choices import FilePath, Settings
from fastdistill.diffusion import Noise, Process, TimestepLaw
from fastdistill.gaussian import Gaussian, GaussianMixture, load_gaussian
from fastdistill.gaussian.diagnose import by_class, labels_of
from fastdistill.models import Condition, Denoiser, Level
from fastdistill.objectives.base import Batch

_HALVINGS = 60


class StandInSettings(Settings):
    """A Gaussian that answers for the teacher at high noise."""

    gaussian: FilePath
    """File of `fastdistill gaussian fit`, fitted to what the teacher was trained on."""
    above: PositiveFloat
    """sigma / alpha above which it stands in, as `fastdistill gaussian diagnose` finds for a bound
    of its error."""

    def load(self, teacher: Denoiser, law: TimestepLaw) -> StandIn:
        """The stand-in, as an objective takes it."""
        return StandIn(load_gaussian(self.gaussian), self.above, law, teacher.process)


@dataclasses.dataclass(frozen=True)
class Split:
    """The rows of a batch that teacher and stand-in answer for, and the law of their times."""

    teacher: Tensor
    """Rows of the teacher, int64."""
    gaussian: Tensor
    """Rows of the stand-in, int64."""
    weight: Tensor
    """Weight of each row that makes an expectation the law's  # [B]"""
    teacher_share: Tensor
    """Share of the teacher's rows in the batch of all ranks, a scalar for the log."""
    low: Tensor
    """Least quantile of each row's stratum  # [B]"""
    width: Tensor
    """Probability of its stratum  # [B]"""
    law: TimestepLaw

    def sample(self, process: Process, noise: Noise, stream: str, index: Tensor) -> Tensor:
        """Times of the batch's rows by the law, given their strata  # [B]"""
        return self.quantile(process, self.low + self.width * noise.uniform(stream, index))

    def quantile(self, process: Process, u: Tensor) -> Tensor:
        """That of the law as a whole."""
        return self.law.quantile(process, u)


class StandIn(nn.Module):
    """A Gaussian for the samples above a noise level, and the teacher for the others.

    Args:
        gaussian: of the teacher's data; a mixture of classes reads the labels.
        above: sigma / alpha above which it stands in.
        law: law of the times that both are asked at.
        process: the teacher's.

    Raises:
        ValueError: for a level that the law lies above never or always.
    """

    def __init__(
        self,
        gaussian: Gaussian | GaussianMixture,
        above: float,
        law: TimestepLaw,
        process: Process,
    ) -> None:
        super().__init__()
        self.gaussian, self.above, self.law = gaussian, above, law
        self.share = probability_above(law, process, above)
        """Probability that the law lies above the level: the evaluations that are saved."""
        if not 0 < self.share < 1:
            which = "never" if self.share == 0 else "always"
            raise ValueError(
                f"stand_in.above is {above}, above which times of {law} lie {which}; choose a "
                "level within the law's range, or drop stand_in"
            )
        self._splits: dict[Any, Split] = {}

    def split(self, batch: Batch) -> Split:
        """The batch's rows and their law; made once, since all batches are alike.

        Raises:
            ValueError: for a batch so small that a rank would have no row for the teacher.
        """
        own, first = len(batch.index), batch.share.start or 0
        if (own, first) not in self._splits:
            total = len(batch.gather(batch.index))
            self._splits[own, first] = self._make_split(own, first, total, batch.index.device)
        return self._splits[own, first]

    def _make_split(self, own: int, first: int, total: int, device: torch.device) -> Split:
        chosen = min(max(round(self.share * total), 1), total - 1)
        j = torch.arange(total + 1)
        is_above = ((2 * j * chosen + total) // (2 * total)).diff() > 0  # [N]
        if total < 2 or is_above.reshape(-1, own).all(1).any():
            raise ValueError(
                f"a batch of {total} in shares of {own} leaves a process without a sample for the "
                f"teacher, where {self.share:.1%} are the stand-in's; take more samples a process"
            )
        own_above = is_above[first : first + own]
        edge = 1 - self.share
        above, below = self.share * total / chosen, edge * total / (total - chosen)
        teacher, gaussian, weight, low, width = (
            value.to(device)
            for value in (
                (~own_above).nonzero().flatten(),
                own_above.nonzero().flatten(),
                torch.where(own_above, above, below),
                torch.where(own_above, edge, 0.0),
                torch.where(own_above, self.share, edge),
            )
        )
        asked = torch.tensor(1 - chosen / total, device=device)
        return Split(teacher, gaussian, weight, asked, low, width, self.law)

    def fill(self, raw: Tensor, split: Split, x_t: Tensor, level: Level, condition: Condition):
        """A raw output of all rows, from the teacher's at its rows and the Gaussian  # [B, ...]"""
        rows = split.gaussian
        x, part = x_t[rows], take_rows(level, rows)
        labels = labels_of(self.gaussian, condition)
        denoised = self.gaussian.denoise(
            x, part.alpha, part.sigma, None if labels is None else labels[rows]
        )
        a, b = (value.reshape(-1, *[1] * (x.ndim - 1)) for value in part.coefficients)
        result = raw.new_empty(len(x_t), *raw.shape[1:])
        result.index_copy_(0, split.teacher, raw)
        return result.index_copy_(0, rows, ((denoised - a * x) / b).to(raw.dtype))

    @property
    def by_class(self) -> bool:
        """Whether it answers for each class in another way."""
        return by_class(self.gaussian)


def take_rows(tree: Any, rows: Tensor) -> Any:
    """Some rows of every tensor of a tree, as a `Level` or a condition."""
    return pytree.tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) else leaf, tree)


def probability_above(law: TimestepLaw, process: Process, ratio: float) -> float:
    """Probability that sigma / alpha of a law's time is above ``ratio``, by halving."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        u = torch.tensor([middle], dtype=torch.float64)
        alpha, sigma = process.alpha_sigma(law.quantile(process, u))
        if float(sigma / alpha) > ratio:
            high = middle
        else:
            low = middle
    share = 1 - high
    return share if share > 1e-12 else 0.0
