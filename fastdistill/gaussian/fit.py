"""`Fitter`: one pass over samples makes a Gaussian, or one for every class or cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fastdistill.gaussian.model import Fit, Gaussian, GaussianMixture
from fastdistill.gaussian.moments import Moments
from fastdistill.gaussian.principal import (
    Principal,
    principal_of_matrix,
    principal_of_sketch,
    sketching_matrix,
)

ValueRange = Literal["any", "signed", "unit", "byte"]
_RANGES: dict[str, tuple[float, float, float, str]] = {
    # low, high, factor to [-1, 1], what is said of it
    "signed": (-1.0, 1.0, 1.0, "pixels in [-1, 1]"),
    "unit": (0.0, 1.0, 2.0, "pixels from [0, 1] to [-1, 1]"),
    "byte": (0.0, 255.0, 1 / 127.5, "pixels from [0, 255] to [-1, 1]"),
}
_NOTHING = 1e-12
"""Share of the variance that rounding alone leaves."""
MOST_EXACT_BYTES = 2 * 2**30
Samples = Tensor | tuple[Tensor, Tensor | None]


class Fitter:
    """Streams samples into the moments of one or several Gaussians.

    The result depends on the samples alone, to rounding: not on their order, the batches that they
    came in, or the ranks that read them.

    Moments are exact, d^2 float64 numbers a component, where those of all components fit into
    ``exact_bytes``; else a sketch of 2 ``rank`` + 16 columns is kept, from which the Nystrom
    approximation is made. A sketch's leading variances are a little low; the fit says by how much
    of the total it is off (``Fit.sketch_error``).

    Args:
        shape: shape of one sample.
        rank: principal directions of each component.
        components: number of Gaussians.
        value_range: what the values are. signed: pixels in [-1, 1]; unit: in [0, 1]; byte: 0 to
            255; these two are converted to [-1, 1], and values outside the range are refused.
            any: taken as they are, as latents.
        seed: of the sketch.
        exact_bytes: most memory of exact moments.

    Raises:
        ValueError: for a rank or a number of components that cannot be.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        rank: int,
        components: int = 1,
        value_range: ValueRange = "any",
        seed: int = 0,
        exact_bytes: int = MOST_EXACT_BYTES,
    ) -> None:
        self.shape, self.value_range = tuple(shape), value_range
        dimensions = torch.Size(shape).numel()
        if not 0 <= rank <= dimensions:
            raise ValueError(
                f"rank is {rank}; expected 0 to {dimensions}, the elements of a sample"
            )
        if components < 1 or dimensions < 1:
            raise ValueError(f"cannot fit {components} Gaussians to samples of {list(shape)}")
        if value_range != "any" and value_range not in _RANGES:
            raise ValueError(f"value_range is {value_range!r}; expected any, signed, unit or byte")
        self.rank = rank
        self._lowest, self._highest = float("inf"), float("-inf")
        self._sketch: Tensor | None = None
        columns = 2 * rank + 16
        if components * dimensions**2 * 8 > exact_bytes and columns < dimensions:
            self._sketch = sketching_matrix(dimensions, columns, seed)
        self.moments = [Moments(dimensions, self._sketch) for _ in range(components)]

    def add(self, samples: Tensor, component: Tensor | None = None) -> None:
        """Add samples [B, *shape]; ``component`` [B] says to which Gaussian each belongs.

        Raises:
            ValueError: for samples of another shape, that are not finite or outside the range, and
                components out of range. Nothing of the batch is added then.
        """
        if tuple(samples.shape[1:]) != self.shape:
            raise ValueError(
                f"samples have shape {list(samples.shape[1:])}, expected {list(self.shape)}"
            )
        if len(samples) == 0:
            return
        lowest, highest = (float(value) for value in samples.double().aminmax())
        self._check_values(samples, lowest, highest)
        rows = samples.flatten(1)
        if len(self.moments) == 1:
            self.moments[0].add(rows)
        else:
            self._distribute(rows, component)
        self._lowest, self._highest = min(self._lowest, lowest), max(self._highest, highest)

    def _check_values(self, samples: Tensor, lowest: float, highest: float) -> None:
        if not (abs(lowest) < float("inf") and abs(highest) < float("inf")):
            bad = (~samples.isfinite()).flatten(1).any(1).nonzero().flatten()
            raise ValueError(
                f"{len(bad)} of {len(samples)} samples hold nan or infinite values, the first is "
                f"number {int(bad[0])} of its batch; remove or repair them"
            )
        if self.value_range == "any":
            return
        low, high, _, _ = _RANGES[self.value_range]
        slack = 1e-3 * (high - low)
        if lowest < low - slack or highest > high + slack:
            raise ValueError(
                f"values go from {lowest:.4g} to {highest:.4g}, but value_range "
                f"{self.value_range!r} is {low:g} to {high:g}; say what the values are"
            )

    def _distribute(self, rows: Tensor, component: Tensor | None) -> None:
        count = len(self.moments)
        if component is None or component.shape != rows.shape[:1]:
            raise ValueError(f"{count} Gaussians are fitted: say to which each sample belongs")
        present = component.unique().tolist()
        if min(present) < 0 or max(present) >= count:
            raise ValueError(f"samples belong to {present}; expected numbers below {count}")
        for k in present:
            self.moments[k].add(rows[component == k])

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Join what all ranks of a group of CPUs (gloo) have read; then all have the same."""
        edges = torch.tensor([-self._lowest, self._highest], dtype=torch.float64)
        dist.all_reduce(edges, dist.ReduceOp.MAX, group=group)
        self._lowest, self._highest = -float(edges[0]), float(edges[1])
        for moments in self.moments:
            moments.all_reduce(group)

    def gaussians(self, about: Fit | None = None) -> list[Gaussian]:
        """The fitted Gaussians in float64; the fitter is used up by it.

        A component with fewer samples than directions gets as many directions as its samples span.

        Args:
            about: source and process, to be kept with them.

        Raises:
            ValueError: where a component has fewer than two samples, or the values were not what
                ``value_range`` says.
        """
        for k, moments in enumerate(self.moments):
            moments.flush()
            if moments.count < 2:
                which = f"component {k} has" if len(self.moments) > 1 else "there are"
                raise ValueError(f"{which} {moments.count} samples; a variance needs two at least")
        self._check_units()
        return [self._gaussian(moments, about or Fit(0)) for moments in self.moments]

    def mixture(self, about: Fit | None = None, by_class: bool = False) -> GaussianMixture:
        """The components as a mixture, weighted by their numbers of samples; as `gaussians`."""
        components = self.gaussians(about)
        counts = torch.tensor([one.fit.samples for one in components], dtype=torch.float64)
        return GaussianMixture(components, counts / counts.sum(), by_class)

    def _check_units(self) -> None:
        """Refuse pixels whose range is another one than was said, as a whole stream shows."""
        low, high = self._lowest, self._highest
        likely = None
        if self.value_range == "signed" and low >= 0 and high > low:
            likely = "unit"
        if self.value_range == "byte" and 0 < high <= 1:
            likely = "unit"
        if likely is not None:
            raise ValueError(
                f"all values lie from {low:.4g} to {high:.4g}, which {self.value_range!r} pixels "
                f"do not: set value_range to {likely!r}, or to 'any' to take them as they are"
            )

    def _gaussian(self, moments: Moments, about: Fit) -> Gaussian:
        count, trace = moments.count, moments.trace / moments.count
        rank = min(self.rank, count - 1)
        second = moments.complete().div_(count)
        if self._sketch is None:
            found = principal_of_matrix(second, rank)
        else:
            found = principal_of_sketch(second, self._sketch, rank)
        values, vectors = _significant(found, trace)
        left = torch.cat((values.new_zeros(1), values.cumsum(0))).neg().add(trace).clamp(min=0)
        left[left < _NOTHING * trace] = 0
        rest = len(moments.mean) - len(values)
        floor = float(left[-1]) / rest if rest else 0.0
        missed = max(0.0, 1 - found.seen / trace) if self._sketch is not None and trace else 0.0
        share = (left / trace).tolist() if trace else [0.0] * len(left)
        range_ = _RANGES.get(self.value_range)
        fit = dataclasses.replace(
            about,
            samples=count,
            scaling=range_[3] if range_ else Fit.scaling,
            total_variance=trace,
            left_out=tuple(share),
            sketch_error=missed if missed > _NOTHING else 0.0,
        )
        mean = moments.mean.reshape(self.shape)
        gaussian = Gaussian(mean, _signed(vectors), values, floor, fit)
        if range_ is None or self.value_range == "signed":
            return gaussian
        return gaussian.rescaled(range_[2], -1.0)


def _significant(found: Principal, trace: float) -> tuple[Tensor, Tensor]:
    """Without the directions whose variance is rounding."""
    kept = int((found.values > _NOTHING * trace).sum())
    return found.values[:kept], found.vectors[:, :kept]


def _signed(vectors: Tensor) -> Tensor:
    """The largest element of each direction positive, so that a fit is the same everywhere."""
    if vectors.shape[1] == 0:
        return vectors
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


def fit_gaussian(
    batches: Iterable[Samples],
    rank: int,
    *,
    classes: int = 0,
    centres: Tensor | None = None,
    value_range: ValueRange = "any",
    about: Fit | None = None,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> Gaussian | GaussianMixture:
    """Fit a Gaussian, or a mixture of one a class or a cluster, in one pass over any batches.

    Args:
        batches: samples [B, ...], or (samples, labels [B]) for a fit by class. Over several ranks
            each gives its own; every rank must have some.
        rank: principal directions.
        classes: number of classes; with it a Gaussian is fitted to each.
        centres: centres of clusters [K, ...] as `cluster_centres` finds them; with them a Gaussian
            is fitted to the samples nearest to each.
        value_range: what the values are, as of `Fitter`.
        about: source and process, to be kept with the result.
        group: ranks on CPUs (gloo) whose samples are joined.
        **options: ``seed`` and ``exact_bytes`` of `Fitter`.

    Raises:
        ValueError: without samples, for a fit by class without labels, and as `Fitter`.
    """
    if classes and centres is not None:
        raise ValueError("fit by class or by cluster, not both")
    fitter: Fitter | None = None
    components = classes or (1 if centres is None else len(centres))
    for batch in batches:
        samples, labels = batch if isinstance(batch, tuple) else (batch, None)
        if fitter is None:
            shape = tuple(samples.shape[1:])
            fitter = Fitter(shape, rank, components, value_range, **options)
        if centres is not None:
            labels = nearest_centre(samples, centres)
        elif classes and labels is None:
            raise ValueError("a fit by class needs the label of every sample")
        fitter.add(samples, labels if components > 1 else None)
    if fitter is None:
        raise ValueError("there are no samples to fit a Gaussian to")
    if group is not None:
        fitter.all_reduce(group)
    if classes or centres is not None:
        return fitter.mixture(about, by_class=bool(classes))
    return fitter.gaussians(about)[0]


def cluster_centres(samples: Tensor, clusters: int, seed: int = 0) -> Tensor:
    """Centres of k-means of some samples, before the pass that fits  # [K, ...]

    Args:
        samples: [n, ...], a few thousand that stand for the data.
        clusters: K.
        seed: of the k-means.

    Raises:
        ValueError: for fewer different samples than clusters.
    """
    from sklearn.cluster import KMeans

    rows = samples.flatten(1).double().numpy()
    if len(samples.flatten(1).unique(dim=0)) < clusters:
        raise ValueError(f"{clusters} clusters need as many different samples at least")
    found = KMeans(clusters, n_init=4, random_state=seed).fit(rows).cluster_centers_
    return torch.from_numpy(found).reshape(clusters, *samples.shape[1:])


def nearest_centre(samples: Tensor, centres: Tensor) -> Tensor:
    """The centre nearest to each sample, int64  # [B]"""
    return torch.cdist(samples.flatten(1).double(), centres.flatten(1).double()).argmin(1)
