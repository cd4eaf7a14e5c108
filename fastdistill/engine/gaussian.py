"""Gaussians of data sets and of teachers' samples: what `fastdistill gaussian` and reports need."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill.choices import ProcessChoice, Settings
from fastdistill.data import Data, EncodedData, ImageData, digits
from fastdistill.data.encoded import INDEX, PLAN
from fastdistill.diffusion import Noise
from fastdistill.engine import sampling
from fastdistill.engine.sampling import Conditions
from fastdistill.engine.saved import is_saved_denoiser, load_denoiser
from fastdistill.gaussian import (
    Diagnosis,
    Fit,
    Gaussian,
    GaussianMixture,
    cluster_centres,
    diagnose,
    fit_gaussian,
    noise_levels,
)
from fastdistill.gaussian.fit import ValueRange
from fastdistill.models import Denoiser
from fastdistill.objectives.stand_in import StandIn
from fastdistill.parallel import Ranks

_CLUSTERED = 10_000
"""Samples that centres of clusters are sought among."""


class Teacher(NamedTuple):
    """A denoiser, and what its samples are."""

    denoiser: Denoiser
    shape: tuple[int, ...]
    classes: int


class FitSettings(Settings):
    """What `fit_source` fits."""

    rank: int
    """Principal directions."""
    by_class: bool = False
    """A Gaussian for each class."""
    clusters: int = 0
    """A Gaussian for each of so many clusters; 0 fits one."""
    count: int | None = None
    """Samples; all of a data set, and 50,000 of a teacher, if null."""
    size: int | None = None
    """Height and width that images are cut to."""
    sampler_steps: int = 18
    """Heun steps of a teacher's samples."""
    guidance_scale: float = 1.0
    """Guidance of a teacher's samples."""
    batch_size: int = 256
    """Samples read or made together."""
    seed: int = 0
    """Of a teacher's samples, of clusters and of a sketch."""


class _Dump(Settings):
    process: ProcessChoice


def load_any_teacher(path: str, device: torch.device | str = "cpu") -> Teacher:
    """A saved denoiser, or the network of a diffusers folder.

    Raises:
        ValueError: for a folder that holds neither.
    """
    if is_saved_denoiser(path):
        denoiser, description = load_denoiser(path, device)
        return Teacher(denoiser, description.shape, description.classes)
    from fastdistill.models.pretrained import load_pretrained

    denoiser = load_pretrained(path, device=device).denoiser.eval()
    return Teacher(denoiser, denoiser.network.sample_shape, denoiser.network.classes)


def open_samples(source: str, size: int | None = None) -> tuple[Data, int, ValueRange]:
    """The data of a name or a path, how many samples they are, and what their values are.

    Args:
        source: ``digits``, the folder of an encoded set, or images as `open_source` knows them.
        size: height and width of images.

    Raises:
        ValueError: for images without a size, and sets that cannot be read.
    """
    if source == "digits":
        images = digits()
        return images, len(images.samples), "signed"
    if (Path(source) / INDEX).is_file() or (Path(source) / PLAN).is_file():
        encoded = EncodedData(source)
        encoded.require(samples=True)
        return encoded, len(encoded), "any"
    if size is None:
        raise ValueError(f"{source} holds images: give --size, the teacher's height and width")
    images_there = ImageData(source, size)
    return images_there, len(images_there), "any"


def fit_source(
    source: str,
    settings: FitSettings,
    ranks: Ranks | None = None,
    say: Callable[[str], None] = print,
) -> Gaussian | GaussianMixture:
    """Fit a Gaussian to a data set, or to a teacher's own samples; over all ranks together.

    Args:
        source: as of `open_samples`, or the folder of a saved denoiser.
        settings: what is fitted.
        ranks: the processes that share the work (CPUs); one if None.
        say: called with each line for the screen.

    Raises:
        ValueError: for a source that cannot be read, has no classes where they are asked for, and
            as `fit_gaussian`.
    """
    ranks = ranks or Ranks()
    process: dict[str, Any] | None = None
    value_range: ValueRange = "any"
    if is_saved_denoiser(source):
        teacher = load_any_teacher(source, ranks.device)
        count, classes = settings.count or 50_000, teacher.classes
        process = _Dump(process=teacher.denoiser.process).model_dump(mode="json")["process"]

        def batches(first: int = 0, step: int = 1) -> Iterator[tuple[Tensor, Tensor | None]]:
            return _teacher_batches(teacher, settings, count, first, step)

    else:
        data, available, value_range = open_samples(source, settings.size)
        count, classes = min(settings.count or available, available), getattr(data, "classes", 0)

        def batches(first: int = 0, step: int = 1) -> Iterator[tuple[Tensor, Tensor | None]]:
            return _data_batches(data, settings, count, first, step)

    # Every rank gets a batch.
    share = min(settings.batch_size, max(1, count // ranks.size))
    settings = settings.model_copy(update={"batch_size": share})
    if settings.by_class and not classes:
        raise ValueError(f"{source} has no classes; fit one Gaussian, or clusters")
    say(f"fitting rank {settings.rank} to {count} samples of {source}")
    centres = _centres(batches(), settings) if settings.clusters else None
    return fit_gaussian(
        batches(ranks.rank, ranks.size),
        settings.rank,
        classes=classes if settings.by_class else 0,
        centres=centres,
        value_range=value_range,
        about=Fit(0, source, process=process),
        group=ranks.control,
        seed=settings.seed,
    )


def _data_batches(
    data: Data, settings: FitSettings, count: int, first: int, step: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Every sample once, in the order of the first epoch; every ``step``-th batch."""
    size = settings.batch_size
    for number in range(first, math.ceil(count / size), step):
        share = slice(0, min(size, count - number * size))
        given = data.batch(settings.seed, number, size, share)
        assert given.samples is not None
        yield given.samples, given.condition if isinstance(given.condition, Tensor) else None


def _teacher_batches(
    teacher: Teacher, settings: FitSettings, count: int, first: int, step: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """A teacher's samples, classes in turn; every ``step``-th batch."""
    device = next(teacher.denoiser.parameters()).device
    noise = Noise(settings.seed, device).at(sampling.EVALUATION_STEP)
    parts = torch.arange(count, device=device).split(settings.batch_size)
    for index in parts[first::step]:
        labels = index % teacher.classes if teacher.classes else None
        null = None if labels is None else torch.full_like(labels, teacher.classes)
        z = noise.normal("gaussian-fit", index, teacher.shape)
        conditions = Conditions(labels, null)
        made = sampling.solve(
            teacher.denoiser, settings.sampler_steps, z, conditions, settings.guidance_scale
        )
        yield made, labels


def _centres(batches: Iterator[tuple[Tensor, Tensor | None]], settings: FitSettings) -> Tensor:
    """Centres of clusters of the first samples, the same on every rank."""
    rows: list[Tensor] = []
    for samples, _ in batches:
        rows.append(samples.cpu())
        if sum(map(len, rows)) >= _CLUSTERED:
            break
    return cluster_centres(torch.cat(rows), settings.clusters, settings.seed)


@torch.no_grad()
def diagnose_source(
    gaussian: Gaussian | GaussianMixture,
    teacher: Teacher,
    data: Data,
    count: int = 1000,
    guidance_scale: float = 1.0,
    levels: int = 24,
    seed: int = 0,
) -> Diagnosis:
    """`diagnose` on the first samples of a data set.

    Raises:
        ValueError: for data without samples or of another shape than the Gaussian.
    """
    device = next(teacher.denoiser.parameters()).device
    given = data.batch(seed, 0, count)
    if given.samples is None or tuple(given.samples.shape[1:]) != gaussian.shape:
        found = None if given.samples is None else list(given.samples.shape[1:])
        raise ValueError(f"the data have samples of {found}; expected {list(gaussian.shape)}")
    return diagnose(
        teacher.denoiser,
        gaussian.to(device),
        given.samples.to(device),
        noise_levels(teacher.denoiser, levels),
        _moved(given.condition, device),
        _moved(given.uncondition, device),
        guidance_scale,
        seed,
    )


def stand_in_report(
    stand_in: StandIn, teacher: Denoiser, data: Data, seed: int, guidance_scale: float
) -> dict[str, float]:
    """What a stand-in saved and what it cost, for a run's summary.

    ``teacher_share`` is the share of the teacher's evaluations that were made;
    ``stand_in_score_error`` is the largest relative score error over eight levels from the
    stand-in's to the noisiest, on 256 real samples (absent without real samples).
    """
    report = {"teacher_share": 1 - stand_in.share}
    given = data.batch(seed, 0, 256)
    if given.samples is None:
        return report
    device = next(stand_in.gaussian.buffers()).device
    highest = max(noise_levels(teacher)[-1], stand_in.above * 1.01)
    levels = [stand_in.above * (highest / stand_in.above) ** (k / 7) for k in range(8)]
    found = diagnose(
        teacher,
        stand_in.gaussian,
        given.samples.to(device),
        levels,
        _moved(given.condition, device),
        _moved(given.uncondition, device),
        guidance_scale,
        seed,
    )
    return report | {"stand_in_score_error": max(found.score_errors)}


def _moved(condition: Any, device: torch.device) -> Any:
    from torch.utils import _pytree as pytree

    return pytree.tree_map(
        lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, condition
    )
