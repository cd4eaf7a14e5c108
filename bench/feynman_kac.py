"""Feynman-Kac sampling of targets whose density is known: a figure, and tables to standard output.

python -m bench.feynman_kac --figure docs/results/feynman-kac.png
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastdistill.diffusion import (
    EDM,
    Noise,
    Particles,
    Target,
    feynman_kac,
    heun,
    karras_sigmas,
)
from fastdistill.ops import mixture_denoise

PARTICLES = 10_000
SEEDS = range(5)
LEVELS = (12, 25, 50, 100)
GRID = torch.linspace(-5, 5, 4001, dtype=torch.float64)[:, None]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A one-dimensional Gaussian mixture in EDM: the exact denoiser and the exact density."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    variances: tuple[float, ...]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return mixture_denoise(x, torch.ones_like(t), t, *self._parts()).denoised

    def log_density(self, x: Tensor) -> Tensor:
        ones = torch.ones(len(x), dtype=x.dtype)
        parts = (part.to(x.dtype) for part in self._parts())
        return mixture_denoise(x, ones, 0 * ones, *parts).log_density

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        means, variances = torch.tensor(self.means), torch.tensor(self.variances)
        return means[:, None], variances, torch.tensor(self.weights).log()


@dataclasses.dataclass(frozen=True)
class Case:
    """A target whose density is known."""

    title: str
    mixtures: tuple[Mixture, ...]
    exponents: tuple[float, ...]

    @property
    def target(self) -> Target:
        return Target(self.mixtures, self.exponents)

    def density(self) -> Tensor:
        """The exact density on the grid."""
        parts = zip(self.exponents, self.mixtures, strict=True)
        log_density = torch.stack([beta * m.log_density(GRID) for beta, m in parts]).sum(0)
        return log_density.softmax(0) / (GRID[1] - GRID[0])

    def distance(self, found: Particles) -> float:
        """Kolmogorov-Smirnov distance of weighted particles from the exact distribution."""
        exact = self.density().cumsum(0) * (GRID[1] - GRID[0])
        place, order = found.samples[:, 0].double().sort()
        weight = found.log_weights.double().exp().flatten()[order].cumsum(0)
        reached = torch.searchsorted(place, GRID[:, 0], right=True)
        return float((torch.cat([torch.zeros(1), weight])[reached] - exact).abs().max())


CASES = (
    Case(
        "product of N(-0.7, 0.6) and N(1.1, 1.5)",
        (Mixture((1.0,), (-0.7,), (0.6,)), Mixture((1.0,), (1.1,), (1.5,))),
        (1.0, 1.0),
    ),
    Case("annealed mixture, q²", (Mixture((0.35, 0.65), (-1.2, 0.9), (0.25, 0.09)),), (2.0,)),
    Case(
        "guided mixture, scale 3",
        (
            Mixture((0.5, 0.5), (-1.0, 1.0), (0.25, 0.25)),
            Mixture((0.15, 0.85), (-1.0, 1.0), (0.25, 0.25)),
        ),
        (-2.0, 3.0),
    ),
)

Sampler = Callable[[Case, int], Particles]


def corrected(levels: int = 50, **options: float) -> Sampler:
    def sample(case: Case, seed: int) -> Particles:
        index, sigmas = torch.arange(PARTICLES), karras_sigmas(levels)
        return feynman_kac(case.target, EDM(), sigmas, index, (1,), seed=seed, **options)  # type: ignore[arg-type]

    return sample


def plain_sde(case: Case, seed: int) -> Particles:
    """The mixed score's reverse SDE without weights."""
    return _alike(corrected(threshold=0.0, stochasticity=1.0)(case, seed).samples)


def plain_ode(case: Case, seed: int) -> Particles:
    """The mixed score's probability flow by Heun's method: guidance as everybody samples it."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        parts = zip(case.exponents, case.mixtures, strict=True)
        return x + torch.stack([beta * (m(x, t) - x) for beta, m in parts]).sum(0)

    z = Noise(seed).normal("latents", torch.arange(PARTICLES), (1,))
    return _alike(heun(denoise, z / case.target.total**0.5, EDM(), karras_sigmas(50)))


def _alike(samples: Tensor) -> Particles:
    equal = torch.full((1, len(samples)), -math.log(len(samples)))
    return Particles(samples, equal, torch.ones(1, 1))


def measured(sampler: Sampler, case: Case) -> tuple[str, float]:
    """Mean and standard deviation of the distance over seeds, and the least effective size."""
    found = [sampler(case, seed) for seed in SEEDS]
    distances = [case.distance(one) for one in found]
    least = min(float(one.effective_sample_size.min()) for one in found)
    return f"{statistics.mean(distances):.4f} ± {statistics.stdev(distances):.4f}", least


def table(rows: dict[str, Sampler]) -> list[str]:
    lines = [
        "| | " + " | ".join(case.title for case in CASES) + " |",
        "|---|" + "---|" * len(CASES),
    ]
    for name, sampler in rows.items():
        cells = []
        for case in CASES:
            distance, least = measured(sampler, case)
            cells.append(distance + (f" ({100 * least:.0f} %)" if least < 1 else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def draw(path: Path) -> None:
    """Exact density, corrected and plain samples of every case."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    for axes, case in zip(figure.subplots(1, len(CASES)), CASES, strict=True):
        shown: Sequence[tuple[str, str, Sampler]] = [
            ("Feynman-Kac", "#d1495b", corrected()),
            ("plain SDE", "#30638e", plain_sde),
        ]
        if case.target.total == 1:
            shown = [*shown, ("plain guidance, Heun", "#3c896d", plain_ode)]
        for name, colour, sampler in shown:
            found = sampler(case, 0)
            weights = found.log_weights.exp().flatten().numpy()
            options = {"weights": weights, "bins": 90, "range": (-3.5, 3.0), "density": True}
            filled = name == "Feynman-Kac"
            style = {"histtype": "stepfilled" if filled else "step", "alpha": 0.45 if filled else 1}
            axes.hist(found.samples[:, 0].numpy(), color=colour, label=name, **options, **style)
        axes.plot(GRID[:, 0], case.density(), color="#222222", linewidth=1.6, label="exact")
        axes.set(title=case.title, xlim=(-3.5, 3.0), yticks=[])
        axes.legend(frameon=False, fontsize=9, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.figure:
        draw(arguments.figure)
    rows: dict[str, Sampler] = {"plain ODE, Heun": plain_ode, "plain SDE": plain_sde}
    rows["weighted, never resampled"] = corrected(threshold=0.0)
    rows["Feynman-Kac"] = corrected()
    rows["resampled at every level"] = corrected(threshold=1.0)
    print("\n".join(table(rows)), end="\n\n")
    print("\n".join(table({f"{n} levels": corrected(n) for n in LEVELS})), end="\n\n")
    noises = {f"stochasticity {z:g}": corrected(stochasticity=z) for z in (0.5, 1.0, 2.0, 4.0, 8.0)}
    print("\n".join(table(noises)), end="\n\n")
    fits = {f"sigma_data {s:g}": corrected(sigma_data=s) for s in (0.0, 0.5, 1.0)}
    print("\n".join(table(fits)))


if __name__ == "__main__":
    main()
