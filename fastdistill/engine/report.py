"""The HTML report of a run: one file with its numbers, grids and convergence signals.

A distillation loss says little about progress, so the report shows what does: the score gap and
the discriminator's accuracy by noise level, the mean density ratio (which is 1 by theory), the
effective sample size of the weights h, and the student's Frechet distance and Vendi score.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdistill.config import Recipe, dump_recipe
from fastdistill.engine.figures import embed, embed_figure, new_figure, render, scale, series
from fastdistill.engine.log import METRICS, TIMINGS
from fastdistill.engine.metrics import read_rows

COMPARED = {
    "frechet_pixel": "Fréchet distance, pixels",
    "frechet_features": "Fréchet distance, classifier features",
    "kernel_distance": "kernel distance (KID), classifier features",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "eps_mmd": "EPS-MMD, by the teacher",
    "vendi": "Vendi score",
    "class_share_min": "smallest share of a class",
    "class_share_max": "largest share of a class",
    "reverse_kl": "KL(samples ‖ truth)",
    "forward_kl": "KL(truth ‖ samples)",
    "jensen_shannon": "Jensen-Shannon divergence",
    "fitted_reverse_kl": "KL(samples ‖ truth), Gaussian fits of the modes",
    "fitted_forward_kl": "KL(truth ‖ samples), Gaussian fits of the modes",
    "sliced_wasserstein": "sliced Wasserstein distance",
    "modes_covered": "modes covered",
    "mode_weight_min": "smallest weight of a mode over the true one",
    "mode_weight_max": "largest weight of a mode over the true one",
    "outliers": "share of outliers",
    "seconds_per_thousand": "seconds per 1,000 samples",
}
"""Metrics of a summary that teacher and student both have, and what they are called."""
_OF_MIXTURES = (
    "reverse_kl",
    "forward_kl",
    "jensen_shannon",
    "fitted_reverse_kl",
    "fitted_forward_kl",
    "sliced_wasserstein",
    "modes_covered",
    "mode_weight_min",
    "mode_weight_max",
    "outliers",
)
REAL = {
    "frechet_pixel": "frechet_pixel_real_halves",
    "frechet_features": "frechet_features_real_halves",
    "eps_mmd": "eps_mmd_real_halves",
    "vendi": "vendi_real",
    **{name: f"{name}_real" for name in _OF_MIXTURES},
}
"""What real data score in a metric, by the metric's name."""


def comparison(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows (metric, teacher, student, real data) of what was measured, as text."""
    rows: list[tuple[str, ...]] = []
    for name, label in COMPARED.items():
        if f"{name}_student" not in summary:
            continue  # of other kinds of data
        real = summary[REAL[name]] if name in REAL else None
        values = (summary[f"{name}_teacher"], summary[f"{name}_student"], real)
        rows.append((label, *("" if value is None else f"{value:.4g}" for value in values)))
    return rows


def write_report(folder: Path, recipe: Recipe, summary: dict[str, Any]) -> Path:
    """Write ``report.html`` from what the run's folder holds; it needs no other file."""
    rows = read_rows(folder / METRICS)
    training = [row for row in rows if "student/loss" in row]
    distill = [row for row in training if row["stage"] == "distill"]
    scores = [row for row in rows if any(name.startswith("evaluation/") for name in row)]
    timings = [row for row in read_rows(folder / TIMINGS) if row["stage"] == "distill"]
    page = render(
        "report.html.j2",
        recipe=recipe,
        summary=summary,
        comparison=comparison(summary),
        grid=embed((folder / "grid.png").read_bytes()),
        figures=_figures(training, distill, scores, timings),
        samples=[
            (path.stem, embed(path.read_bytes()))
            for path in sorted((folder / "samples").glob("*.png"))
        ],
        yaml=dump_recipe(recipe),
    )
    path = folder / "report.html"
    path.write_text(page)
    return path


def _figures(
    training: list[dict[str, Any]],
    distill: list[dict[str, Any]],
    scores: list[dict[str, Any]],
    timings: list[dict[str, Any]],
) -> list[tuple[str, str, str]]:
    """(title, what it says, embedded picture) of every signal that this run has."""
    teacher = [row for row in training if row["stage"] == "teacher"]
    figures = [
        _curves("Teacher's loss", "Denoising loss.", teacher, ["student/loss"]),
        _curves(
            "Warm-up",
            "Squared distance of the student's samples to the teacher's from the same noise.",
            [row for row in training if row["stage"] == "warmup"],
            ["student/loss"],
        ),
        _curves(
            "Degradation",
            "Denoising loss of a copy of the teacher on samples of the initial student.",
            [row for row in training if row["stage"] == "degradation"],
            ["student/loss"],
        ),
        _curves(
            "Student's distance to the data",
            "Fréchet distance of samples of the averaged student; the dotted line is the distance "
            "between two halves of the real data.",
            scores,
            ["evaluation/frechet_pixel", "evaluation/frechet_features"],
            references=[
                "evaluation/frechet_pixel_real_halves",
                "evaluation/frechet_features_real_halves",
            ],
        ),
        _curves(
            "Diversity",
            "Vendi score of the samples (effective number of different ones) and of real data.",
            scores,
            ["evaluation/vendi"],
            references=["evaluation/vendi_real"],
        ),
        _curves(
            "Divergence from the truth",
            "Of samples of the averaged student; fresh samples of the truth score 0 on average.",
            scores,
            [
                "evaluation/reverse_kl",
                "evaluation/forward_kl",
                "evaluation/jensen_shannon",
                "evaluation/fitted_reverse_kl",
                "evaluation/fitted_forward_kl",
            ],
        ),
        _levels(
            "Score gap by noise level",
            "Mean squared difference of critic and teacher; it falls at every level as they agree.",
            distill,
            "student/score_gap/by_level",
        ),
        _curves("Losses", "They need not fall.", distill, ["student/loss", "critic/loss"]),
        _levels(
            "Density ratio by noise level",
            "Mean calibrated ratio teacher / student; theory says 1 at every level.",
            distill,
            "student/ratio/by_level",
        ),
        _curves(
            "Effective sample size of the weights h",
            "Share of the batch that carries the gradient; near 0 a few samples carry all.",
            distill,
            ["student/effective_sample_size"],
        ),
        _levels(
            "Discriminator's accuracy by noise level",
            "0.5 means that student and data cannot be told apart.",
            distill,
            "critic/discriminator_accuracy/by_level",
        ),
        _curves(
            "Gradient norms",
            "Before clipping.",
            distill,
            ["student/grad_norm", "critic/grad_norm", "discriminator/grad_norm"],
        ),
        _curves(
            "Throughput", "Images a second of the distillation.", timings, ["images_per_second"]
        ),
    ]
    return [figure for figure in figures if figure is not None]


def _curves(
    title: str,
    text: str,
    rows: list[dict[str, Any]],
    names: Sequence[str],
    references: Sequence[str] = (),
) -> tuple[str, str, str] | None:
    """Curves over the rows in their order; None where no row has any of the names."""
    present = [name for name in names if any(name in row for row in rows)]
    if not present:
        return None
    figure, axis = new_figure()
    for k, name in enumerate(present):
        axis.plot(*series(rows, name), color=f"C{k}", label=name.removeprefix("evaluation/"))
        if references:
            axis.plot(*series(rows, references[names.index(name)]), color=f"C{k}", ls=":")
    scale(axis, [value for name in present for value in series(rows, name)[1]])
    axis.set_xlabel("step")
    axis.legend(fontsize=7, frameon=False)
    return title, text, embed_figure(figure)


def _levels(
    title: str, text: str, rows: list[dict[str, Any]], name: str
) -> tuple[str, str, str] | None:
    """One curve a noise level, from noisy (dark) to clean (bright)."""
    chosen = [row for row in rows if name in row]
    if not chosen:
        return None
    import matplotlib

    figure, axis = new_figure()
    bins = len(chosen[0][name])
    colours = matplotlib.colormaps["viridis"]
    seen = []
    for k in range(bins):
        points = [(row["step"], row[name][k]) for row in chosen if row[name][k] is not None]
        if points:
            seen += [value for _, value in points]
            axis.plot(*zip(*points, strict=True), color=colours(k / bins), lw=1, label=str(k))
    scale(axis, seen)
    axis.set_xlabel("step")
    axis.legend(fontsize=6, frameon=False, title="log-SNR bin", title_fontsize=6, ncols=2)
    return title, text, embed_figure(figure)
