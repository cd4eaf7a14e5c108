"""Samples of a run's saved student, and grids of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastdistill.config import load_recipe
from fastdistill.diffusion import Noise
from fastdistill.engine import sampling
from fastdistill.engine.devices import choose_device
from fastdistill.engine.inputs import open_encoded
from fastdistill.engine.pictures import Pictures
from fastdistill.engine.sampling import Conditions
from fastdistill.engine.saved import DenoiserDescription, load_denoiser
from fastdistill.models import Denoiser


def draw(
    run: Path,
    count: int,
    seed: int = 0,
    label: int | None = None,
    data: Path | None = None,
    device: str = "cpu",
    batch: int = 100,
) -> tuple[Tensor, Pictures]:
    """Samples of a run's student, and what makes pictures of them.

    Args:
        run: the run's folder.
        count: number of samples.
        seed: of the noise.
        label: class of all samples; classes in turn if None.
        data: encoded prompts, taken in their order; those of the run if None.
        device: where samples are made.
        batch: samples that are made together.

    Raises:
        ValueError: for a run without a student, and a label or data that do not fit it.
    """
    place = choose_device(device)
    student, description = load_denoiser(run / "student", place)
    if description.times is None:
        raise ValueError(f"{run / 'student'} is no student: it has no times to be sampled at")
    conditions = _conditions(run, student, description, count, label, data)
    samples = sampling.sample_student(
        student,
        description.times,
        conditions,
        count,
        description.shape,
        Noise(seed, place).at(sampling.EVALUATION_STEP),
        batch,
    )
    return samples, Pictures(description, place)


def save_grid(path: Path, columns: Mapping[str, Tensor], pictures: Pictures) -> None:
    """Draw columns of samples under their titles: pictures at most ten in a row, vectors as points.

    Args:
        path: a .png file.
        columns: samples by title.
        pictures: makes pictures of them.
    """
    if len(pictures.shape) == 1:
        return save_scatter(path, columns)
    images = [(title, pictures(samples)) for title, samples in columns.items()]
    count = max(len(several) for _, several in images)
    per_row = min(10, count)
    path.parent.mkdir(exist_ok=True)
    sampling.save_grid(path, images, -(-count // per_row), per_row, pictures.note)


def save_scatter(path: Path, columns: Mapping[str, Tensor]) -> None:
    """Draw sets of vectors [n, d] as points, five sets a row, all on the same two axes.

    Args:
        path: a .png file.
        columns: samples by title; where d > 2 they are seen along the first ones' two principal
            axes, and where d = 1 along with nothing.
    """
    from matplotlib.figure import Figure

    views = _plane({title: samples.float().cpu() for title, samples in columns.items()})
    first = next(iter(views.values()))
    reach = 1.25 * float(first.abs().max())
    path.parent.mkdir(exist_ok=True)
    across = min(len(views), 5)
    down = -(-len(views) // across)
    size = 3.2 * across + 0.2, 3.3 * down + 0.2
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for axis in axes[len(views) :]:
        axis.axis("off")
    for axis, (title, points) in zip(axes, views.items(), strict=False):
        axis.scatter(*points.T.numpy(), s=2, alpha=0.4, linewidths=0)
        axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=6)
    figure.savefig(path)


def _plane(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Samples [n, d] as points of the plane [n, 2], centred at the first ones' mean where d > 2."""
    first = next(iter(columns.values()))
    d = first.shape[1]
    if d <= 2:
        return {title: torch.nn.functional.pad(x, (0, 2 - d)) for title, x in columns.items()}
    centre = first.mean(0)
    axes = torch.linalg.eigh(first.T.cov()).eigenvectors[:, -2:].flip(1)
    return {title: (x - centre) @ axes for title, x in columns.items()}


def _conditions(
    run: Path,
    student: Denoiser,
    description: DenoiserDescription,
    count: int,
    label: int | None,
    data: Path | None,
) -> Conditions:
    device = next(student.parameters()).device
    if label is not None and not 0 <= label < description.classes:
        known = f"0 to {description.classes - 1}" if description.classes else "none: no classes"
        raise ValueError(f"--label is {label}; expected {known}")
    labels = sampling.balanced_labels(description.classes, count, device)
    if labels is not None:
        return Conditions(labels if label is None else torch.full_like(labels, label))
    if not getattr(student.network, "condition_shapes", None):
        return Conditions()
    folder = data or getattr(load_recipe(run / "recipe.yaml").data, "path", None)
    if folder is None:
        raise ValueError(f"{run} has no prompts; give --data, a folder that encode made")
    found = open_encoded(folder, student.network)
    condition = found.rows([row % len(found) for row in range(count)]).condition
    return Conditions({name: value.to(device) for name, value in condition.items()})
