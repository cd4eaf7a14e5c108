"""Every distillation method on one recipe, over several seeds, as a table.

python -m bench.methods digits --output runs/methods-digits > docs/results/digits-methods.md

Each seed trains one teacher, which all methods share. Runs that are finished are not repeated.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.machine import describe
from fastdistill.engine.compare import Cell, Run
from fastdistill.engine.drawing import save_scatter
from fastdistill.engine.job import Job
from fastdistill.engine.roles import make_frozen
from fastdistill.engine.saved import load_denoiser

REPOSITORY = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Case:
    """A method and what it is run with, besides the recipe."""

    label: str
    overrides: tuple[str, ...]
    recipes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Further overrides for one recipe."""
    warm: bool = True
    """Whether the student starts at the one of the recipe's warm-up, where it has one; else as the
    network that the teacher's stage trained."""
    without: tuple[str, ...] = ()
    """Recipes that the method is not for."""

    def arguments(self, recipe: str, shared: Path) -> tuple[str, ...]:
        """All that differs from the recipe; ``shared`` is the run that made teacher and warm-up."""
        start: tuple[str, ...] = ("warmup=null",)
        if self.warm and (shared / "warmup").is_dir():
            start += (f"start={shared / 'warmup'}",)
        teacher = (f"teacher={shared / 'teacher'}",)
        return teacher + start + self.overrides + tuple(self.recipes.get(recipe, ()))


EXACT = ("mixture_2d", "mixture_64d")
"""Recipes whose teacher is exact, and has no features."""
ON_CRITIC = dict.fromkeys(EXACT, ("objective.gan_features=critic",))
TRAJECTORIES = ("training.student.betas=[0.9, 0.99]", "objective.student_times=[20]")
TWO, FOUR = "objective.student_times=[2.5, 0.6]", "objective.student_times=[2.5, 1.2, 0.6, 0.3]"
IN_TWO, IN_FOUR = "objective.student_times=[20, 1]", "objective.student_times=[20, 2.5, 1, 0.4]"
ICT = ("objective.source=data", "objective.pairs={name: ict}")
REWARD = ("objective.reward=digits_classifier", "objective.reward_weight=0.001")

CASES = (
    Case("Diff-Instruct", ("objective=diff_instruct",)),
    Case("DMD (reverse KL)", ("objective=dmd",)),
    Case("DMD, 2 steps", ("objective=dmd", TWO)),
    Case("DMD, 4 steps", ("objective=dmd", FOUR)),
    Case("DMD2", ("objective=dmd2",)),
    Case("f-distill, Jensen-Shannon", ("objective=f_distill",), ON_CRITIC),
    Case(
        "f-distill, forward KL",
        ("objective=f_distill", "objective.divergence=forward_kl"),
        ON_CRITIC,
    ),
    Case("DisBack", ("objective=backtracking",), without=EXACT),
    Case("SIM", ("objective=sim",)),
    Case("SiD", ("objective=sid",)),
    Case("SiDA", ("objective=sida",)),
    Case("consistency, ECT", ("objective=consistency", *TRAJECTORIES), warm=False),
    Case("consistency, ECT, 2 steps", ("objective=consistency", *TRAJECTORIES, IN_TWO), warm=False),
    Case(
        "consistency, ECT, 4 steps", ("objective=consistency", *TRAJECTORIES, IN_FOUR), warm=False
    ),
    Case("consistency, iCT on data", ("objective=consistency", *TRAJECTORIES, *ICT), warm=False),
    Case("sCM", ("objective=continuous_consistency", *TRAJECTORIES), warm=False),
    Case("sCM, 2 steps", ("objective=continuous_consistency", *TRAJECTORIES, IN_TWO), warm=False),
    Case("rCM", ("objective=consistency_matching",)),
    Case("MeanFlow", ("objective=mean_flow", *TRAJECTORIES), warm=False),
    Case("MeanFlow, 4 steps", ("objective=mean_flow", *TRAJECTORIES, IN_FOUR), warm=False),
    Case("Entropic Score Distillation", ("objective=esd",), without=EXACT),
    Case("Diff-Instruct++", ("objective=diff_instruct_plus_plus", *REWARD), without=EXACT),
    Case("Diff-Instruct*", ("objective=diff_instruct_star", *REWARD), without=EXACT),
)

COLUMNS: dict[str, dict[str, str]] = {
    "digits": {
        "pixels": "frechet_pixel_student",
        "features": "frechet_features_student",
        "precision": "precision_student",
        "recall": "recall_student",
        "Vendi": "vendi_student",
    },
    "mixture_2d": {
        "KL(student, truth)": "reverse_kl_student",
        "KL(truth, student)": "forward_kl_student",
        "JS": "jensen_shannon_student",
        "modes": "modes_covered_student",
        "smallest mode": "mode_weight_min_student",
        "largest mode": "mode_weight_max_student",
        "outliers": "outliers_student",
    },
    "mixture_64d": {
        "KL(student, truth), fitted": "fitted_reverse_kl_student",
        "KL(truth, student), fitted": "fitted_forward_kl_student",
        "sliced Wasserstein": "sliced_wasserstein_student",
        "modes": "modes_covered_student",
        "smallest mode": "mode_weight_min_student",
        "largest mode": "mode_weight_max_student",
        "outliers": "outliers_student",
    },
}
"""What a recipe's table shows, by title."""


def train(recipe: str, overrides: Sequence[str], folder: Path) -> dict[str, Any] | None:
    """The summary of one run, made now unless it is there; None where it fails."""
    summary = folder / "summary.json"
    if not summary.is_file():
        action = (
            ["resume", str(folder)]
            if (folder / "recipe.yaml").is_file()
            else ["train", recipe, *overrides, "--output", str(folder)]
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f"{folder.name}.log").open("w") as log:
            subprocess.run(
                [sys.executable, "-m", "fastdistill", *action],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                cwd=REPOSITORY,
                check=False,
            )
    return json.loads(summary.read_text()) if summary.is_file() else None


def name(label: str) -> str:
    """A label as the name of a folder."""
    spelled = label.lower().replace("+", "p").replace("*", "-star")
    return "".join(c if c.isalnum() else "-" for c in spelled).strip("-")


def minutes(folder: Path) -> float:
    """Duration of the distillation, by the speed at its log points."""
    return Run.read(folder).minutes or float("nan")


def measure(
    recipe: str, cases: Sequence[Case], seeds: Sequence[int], output: Path, jobs: int
) -> dict[str, list[dict[str, Any]]]:
    """Summaries by label, one a seed; a label whose run failed has fewer."""
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:

        def first(seed: int) -> Any:
            return train(recipe, (f"seed={seed}",), output / f"teacher-{seed}")

        list(pool.map(first, seeds))

        def one(job: tuple[Case, int]) -> tuple[str, dict[str, Any] | None]:
            case, seed = job
            shared = output / f"teacher-{seed}"
            overrides = (f"seed={seed}", *case.arguments(recipe, shared))
            folder = output / f"{name(case.label)}-{seed}"
            summary = train(recipe, overrides, folder)
            if summary is not None:
                summary["minutes"] = minutes(folder)
            print(f"{case.label}, seed {seed}: {'done' if summary else 'FAILED'}", file=sys.stderr)
            return case.label, summary

        found: dict[str, list[dict[str, Any]]] = {case.label: [] for case in cases}
        for label, summary in pool.map(one, [(case, seed) for seed in seeds for case in cases]):
            if summary is not None:
                found[label].append(summary)
    return found


def table(recipe: str, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown: mean of the seeds, ± half of the range."""
    columns = COLUMNS[recipe] | {
        "minutes": "minutes",
        "GiB": "peak_memory_gib",
    }
    lines = [
        "| method | steps | " + " | ".join(columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    done = next((summaries for summaries in found.values() if summaries), None)
    if done is not None:
        keys = [key.replace("_student", "_teacher") for key in COLUMNS[recipe].values()]
        cells = [cell(done, key) for key in keys]
        steps = done[0]["evaluations_teacher"]
        lines.append(f"| *teacher* | {steps} | " + " | ".join([*cells, "", ""]) + " |")
    for label, summaries in found.items():
        if not summaries:
            lines.append(f"| {label} | | " + " | ".join(["failed"] * len(columns)) + " |")
            continue
        cells = [cell(summaries, key) for key in columns.values()]
        steps = summaries[0]["evaluations_student"]
        lines.append(f"| {label} | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(summaries: Sequence[Mapping[str, Any]], key: str) -> str:
    """Mean and half range of a number that all have; a dash where one has it not."""
    values = [summary.get(key) for summary in summaries]
    if any(value is None for value in values):
        return "-"
    return str(Cell.of([float(value) for value in values if value is not None]))


def draw(cases: Sequence[Case], output: Path, seed: int, path: Path) -> None:
    """Samples of the truth, the teacher and every method's student in the plane."""
    first = Job.open(output / f"teacher-{seed}", lambda line: None)
    trained = load_denoiser(first.folder / "teacher").denoiser
    truth = first.data.batch(seed, 1 << 40, 2000).samples
    assert truth is not None
    drawn = {
        "truth": truth,
        "teacher": first.judge.teacher_samples(make_frozen(first.recipe, trained), 2000),
    }
    for case in cases:
        folder = output / f"{name(case.label)}-{seed}"
        if (folder / "student").is_dir():
            job = Job.open(folder, lambda line: None)
            student = load_denoiser(folder / "student").denoiser
            drawn[case.label] = job.judge.student_samples(student, 2000)
    save_scatter(path, drawn)


def headline() -> str:
    """Date, machine and versions."""
    facts = describe(torch.device("cpu"))
    return (
        f"{facts['date']}; {facts['cores']} cores of {facts['cpu']}, one thread a run; "
        f"Python {facts['python']}, torch {facts['torch']}. Command: `{facts['command']}`."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", choices=sorted(COLUMNS))
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="labels of methods")
    parser.add_argument("--figure", type=Path, help="samples of mixture_2d, as a picture")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    arguments = parser.parse_args()
    cases = [
        case
        for case in CASES
        if arguments.recipe not in case.without
        and (not arguments.only or case.label in arguments.only)
    ]
    found = measure(
        arguments.recipe, cases, arguments.seeds, arguments.output.resolve(), arguments.jobs
    )
    if arguments.figure is not None:
        draw(cases, arguments.output.resolve(), arguments.seeds[0], arguments.figure)
    print(f"{headline()}\n\n{table(arguments.recipe, found)}")


if __name__ == "__main__":
    main()
