"""Quality against teacher evaluations with teleport, on the digits, through diffusers' schedulers.

python -m bench.gaussian_digits --teacher RUN/teacher --output DIR
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistill.data import digits
from fastdistill.diffusion import Noise
from fastdistill.engine.saved import load_denoiser
from fastdistill.evaluate import digits_classifier, matched_frechet_distance, real_split_distance
from fastdistill.gaussian import Gaussian, GaussianMixture, TeleportScheduler, fit_gaussian
from fastdistill.models import Denoiser

SOLVERS = {
    "HeunDiscreteScheduler": (18, (0, 4, 6, 7, 8, 9, 10)),
    "DPMSolverMultistepScheduler": (20, (0, 5, 7, 8, 9, 10, 12)),
    "UniPCMultistepScheduler": (20, (0, 5, 7, 8, 9, 10, 12)),
}
"""Steps, and steps skipped."""
T_95 = {2: 4.303, 3: 3.182, 4: 2.776}
"""Student's t of 95 % intervals by degrees of freedom."""


def scheduler_of(name: str) -> Any:
    """A scheduler whose Karras grid goes from 80 to 0.002, as EDM's does."""
    import diffusers

    sigma = torch.logspace(-2.7, 1.90309, 1000, dtype=torch.float64)
    alpha_bar = 1 / (1 + sigma**2)
    before = torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar[:-1]))
    betas = (1 - alpha_bar / before).tolist()
    return getattr(diffusers, name)(trained_betas=betas, use_karras_sigmas=True)


@torch.no_grad()
def sample(scheduler: Any, steps: int, teacher: Denoiser, z: Tensor, labels: Tensor):
    """Samples, the evaluations that they took, and the level that they began at."""
    scheduler.set_timesteps(steps)
    x, count, first = z * scheduler.init_noise_sigma, 0, None
    exploding = hasattr(scheduler, "state_in_first_order")
    for t in scheduler.timesteps:
        index = scheduler.begin_index or 0 if scheduler.step_index is None else scheduler.step_index
        sigma = float(scheduler.sigmas[index])
        scale = (sigma**2 + 1) ** -0.5
        level = sigma if exploding else sigma * scale
        model_input = scheduler.scale_model_input(x, t)
        # What the network reads is alpha x in either kind of variables.
        denoised = teacher(model_input / scale, torch.full((len(x),), sigma), labels)
        x_t = model_input / scale if exploding else model_input
        epsilon = (x_t - (1.0 if exploding else scale) * denoised) / level
        x = scheduler.step(epsilon, t, x, return_dict=False)[0]
        count, first = count + 1, first or sigma
    return x, count, first


def gaussians(teacher_classes: int) -> dict[str, Gaussian | GaussianMixture]:
    """One Gaussian of all digits, and one of each class."""
    data = digits()
    batches = [(data.samples, data.labels)]
    return {
        "one": fit_gaussian([data.samples], 64, value_range="signed").float(),
        "by class": fit_gaussian(
            batches, 64, classes=teacher_classes, value_range="signed"
        ).float(),
    }


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval."""
    spread = statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), T_95[len(values) - 1] * spread


def measure(teacher: Denoiser, seeds: int, count: int) -> dict[str, Any]:
    """Distances of every solver, Gaussian, number of skipped steps and seed."""
    classifier, real = digits_classifier(), digits().samples
    spaces: dict[str, Callable[[Tensor], Tensor]] = {
        "pixels": lambda x: x.flatten(1),
        "features": classifier.features,
    }
    real_in = {name: make(real) for name, make in spaces.items()}
    labels = torch.arange(count) % 10
    rows = []
    for kind, gaussian in gaussians(10).items():
        movable = gaussian.given(labels) if isinstance(gaussian, GaussianMixture) else gaussian
        for solver, (steps, skips) in SOLVERS.items():
            for skip in skips:
                found: dict[str, list[float]] = {name: [] for name in spaces}
                for seed in range(seeds):
                    z = Noise(seed).at(2**32 - 1).normal("latents", torch.arange(count), (1, 8, 8))
                    scheduler = TeleportScheduler(scheduler_of(solver), movable, skip)
                    made, calls, sigma = sample(scheduler, steps, teacher, z, labels)
                    for name, make in spaces.items():
                        found[name].append(matched_frechet_distance(real_in[name], make(made)))
                row = {"gaussian": kind, "solver": solver, "skip": skip, "evaluations": calls}
                rows.append(row | {"sigma": sigma} | found)
                print(row, [round(statistics.mean(values), 3) for values in found.values()])
    halves = {name: real_split_distance(value) for name, value in real_in.items()}
    return {"real_halves": halves, "rows": rows, "samples": count, "seeds": seeds}


def save_plot(path: Path, measured: dict[str, Any], space: str) -> None:
    """Distance over skipped steps, a panel a solver, with 95 % intervals over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), dpi=110)
    panels = figure.subplots(1, len(SOLVERS), sharey=True)
    for axes, solver in zip(panels, SOLVERS, strict=True):
        for kind, colour in (("one", "tab:orange"), ("by class", "tab:blue")):
            rows = [
                row
                for row in measured["rows"]
                if (row["solver"], row["gaussian"]) == (solver, kind)
            ]
            means, halves = zip(*(interval(row[space]) for row in rows), strict=True)
            skips = [row["skip"] for row in rows]
            axes.errorbar(skips, means, halves, fmt="o-", ms=3, capsize=3, color=colour, label=kind)
        axes.axhline(measured["real_halves"][space], color="gray", ls=":", label="two real halves")
        axes.set_title(
            f"{solver.removesuffix('Scheduler')}, {SOLVERS[solver][0]} steps", fontsize=9
        )
        axes.set_xlabel("steps skipped")
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel(f"Fréchet distance, {space}")
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def table(measured: dict[str, Any]) -> str:
    """Markdown: distances with intervals, and the difference from the full sampler's."""
    lines = [
        "| solver | Gaussian | skipped | from sigma | evaluations | pixels | to full | features "
        "| to full |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = measured["rows"]
    for row in rows:
        full = next(
            other
            for other in rows
            if (other["solver"], other["gaussian"], other["skip"])
            == (row["solver"], row["gaussian"], 0)
        )
        saved = 1 - row["evaluations"] / full["evaluations"]
        cells = [row["solver"].removesuffix("Scheduler"), row["gaussian"], str(row["skip"])]
        cells += [f"{row['sigma']:.3g}", f"{row['evaluations']} ({-saved:.0%})"]
        for space in ("pixels", "features"):
            gaps = [a - b for a, b in zip(row[space], full[space], strict=True)]
            cells += ["{:.3f} ± {:.3f}".format(*interval(row[space]))]
            cells += ["" if row is full else "{:+.3f} ± {:.3f}".format(*interval(gaps))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--count", type=int, default=1000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    teacher = load_denoiser(given.teacher).denoiser
    measured = measure(teacher, given.seeds, given.count)
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "teleport.json").write_text(json.dumps(measured, indent=1) + "\n")
    for space in ("pixels", "features"):
        save_plot(given.output / f"teleport-{space}.png", measured, space)
    (given.output / "teleport.md").write_text(table(measured))


if __name__ == "__main__":
    main()
