"""Distillation of the digits with a stand-in for the teacher, and from a Gaussian's marginal.

python -m bench.gaussian_training --teacher RUN/teacher --output FILE.json
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.gaussian_digits import gaussians, interval
from fastdistill.config import load_recipe
from fastdistill.data import digits
from fastdistill.diffusion import (
    EDM,
    KarrasIndex,
    LogitNormal,
    LogNormalSigma,
    LogUniformSigma,
    Noise,
    TimestepLaw,
    Uniform,
)
from fastdistill.engine.sampling import EVALUATION_STEP, Conditions, sample_student
from fastdistill.engine.saved import load_denoiser
from fastdistill.engine.trainer import Trainer
from fastdistill.evaluate import digits_classifier, matched_frechet_distance
from fastdistill.gaussian import Gaussian, GaussianMixture, diagnose
from fastdistill.models import Denoiser
from fastdistill.objectives import DistributionMatching
from fastdistill.objectives.stand_in import StandIn, probability_above

TIME, BOUND = 2.5, 0.05
LAWS: dict[str, TimestepLaw] = {
    "log-uniform, 0.002 to 80": LogUniformSigma(),
    "log-normal (-0.5, 1.2), the digits'": LogNormalSigma(-0.5, 1.2),
    "log-normal (-1.2, 1.2), EDM's": LogNormalSigma(),
    "Karras index 2 to 998, FastGen's": KarrasIndex(),
    "uniform 0.02 to 0.98 of the Karras grid": Uniform(0.02, 0.98),
    "logit-normal (0, 1) of the Karras grid": LogitNormal(),
}


class Variant(NamedTuple):
    """One way to train."""

    law: TimestepLaw
    stand_in: Gaussian | GaussianMixture | None = None
    above: float = 0.0
    start: Gaussian | None = None


def train(teacher: Denoiser, variant: Variant, seed: int, steps: int, batch: int) -> dict[str, Any]:
    """Distances of the averaged student during a run, and the seconds of its steps."""
    settings = load_recipe(
        "digits",
        [f"training.steps={steps}", f"training.batch_size={batch}"],
    ).training.model_copy(update={"sample_every": steps // 2, "checkpoint_every": steps})
    student, critic = copy.deepcopy(teacher).train(), copy.deepcopy(teacher).train()
    student.start = variant.start
    stand_in = None
    if variant.stand_in is not None:
        stand_in = StandIn(variant.stand_in, variant.above, variant.law, teacher.process)
    objective = DistributionMatching(
        *(student.requires_grad_(True), copy.deepcopy(teacher), critic.requires_grad_(True)),
        *((TIME,), variant.law, variant.law),
        stand_in=stand_in,
    )
    data, classifier = digits(), digits_classifier()
    pixels, features = data.samples.flatten(1), classifier.features(data.samples)
    labels = torch.arange(1000) % 10
    found: dict[str, Any] = {"step": [], "pixels": [], "features": []}
    judging = 0.0

    def judge(trainer: Trainer) -> None:
        nonlocal judging
        started = time.process_time()
        noise = Noise(seed).at(EVALUATION_STEP)
        with trainer.averaged() as averaged:
            made = sample_student(averaged, (TIME,), Conditions(labels), 1000, (1, 8, 8), noise)
        found["step"].append(trainer.step)
        found["pixels"].append(matched_frechet_distance(pixels, made.flatten(1)))
        found["features"].append(matched_frechet_distance(features, classifier.features(made)))
        judging += time.process_time() - started

    trainer = Trainer(objective, data, settings, seed=seed, on_sample=judge)
    started = time.process_time()
    trainer.fit()
    found["cpu_seconds"] = time.process_time() - started - judging
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    teacher = load_denoiser(given.teacher).denoiser
    fitted, data = gaussians(10), digits()
    one, by_class = fitted["one"], fitted["by class"]
    levels = {}
    for kind, gaussian in fitted.items():
        assert data.labels is not None
        level = diagnose(teacher, gaussian, data.samples, condition=data.labels).level(BOUND)
        assert level is not None
        levels[kind] = level
    assert isinstance(one, Gaussian)
    uniform, normal = LogUniformSigma(), LogNormalSigma(-0.5, 1.2)
    variants = {
        "log-uniform": Variant(uniform),
        "log-uniform, by class": Variant(uniform, by_class, levels["by class"]),
        "log-uniform, one": Variant(uniform, one, levels["one"]),
        "log-normal": Variant(normal),
        "log-normal, start": Variant(normal, start=one),
    }
    shares = {
        kind: {name: probability_above(law, EDM(), level) for name, law in LAWS.items()}
        for kind, level in levels.items()
    }
    result: dict[str, Any] = {"levels": levels, "shares": shares, "runs": {}}
    for seed in range(given.seeds):
        for name, variant in variants.items():
            run = train(teacher, variant, seed, given.steps, given.batch)
            result["runs"].setdefault(name, []).append(run)
            print(seed, name, run)
        given.output.write_text(json.dumps(result, indent=1) + "\n")
    for name, runs in result["runs"].items():
        for space in ("pixels", "features"):
            by_step = zip(*(run[space] for run in runs), strict=True)
            print(name, space, ["{:.3f} ± {:.3f}".format(*interval(list(v))) for v in by_step])
        print(name, "cpu seconds", [round(run["cpu_seconds"], 1) for run in runs])


if __name__ == "__main__":
    main()
