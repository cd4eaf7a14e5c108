"""Several runs side by side: what differs between their recipes, and what came of it.

A row of the table is a set of runs that differ by their seed alone: their mean, and half of the
range between the smallest and the largest. Nothing is measured again, all of it stands in the runs'
folders; a run that is not finished is shown as far as it is.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fastdistill.engine.figures import embed, embed_figure, new_figure, render, scale, series
from fastdistill.engine.folder import write_text
from fastdistill.engine.log import METRICS, TIMINGS
from fastdistill.engine.metrics import read_rows
from fastdistill.engine.report import COMPARED

_IGNORED = ("name", "seed")
"""Keys of a recipe that make no other kind of run."""
_BOOKKEEPING = ("log_every", "checkpoint_every", "keep_checkpoints")
"""The same, of each stage's training."""
_TEACHERS = ("data", "model", "process", "parametrisation", "teacher")
"""Sections of a recipe that a teacher's scores depend on, besides the seed."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run's folder holds."""

    folder: Path
    recipe: dict[str, Any]
    summary: dict[str, Any] | None
    """None for a run that is not finished."""
    rows: list[dict[str, Any]]
    """Everything that was measured."""
    timings: list[dict[str, Any]]
    """Speed and memory."""

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read a run, finished or not.

        Raises:
            ValueError: for a folder that holds no run.
        """
        path = folder / "recipe.yaml"
        if not path.is_file():
            raise ValueError(f"{folder} holds no run: {path} is missing")
        try:
            recipe = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
        if not isinstance(recipe, dict) or not {"seed", "data", "training"} <= set(recipe):
            raise ValueError(f"{path} is no recipe as a run writes it")
        summary = folder / "summary.json"
        return cls(
            folder,
            recipe,
            json.loads(summary.read_text()) if summary.is_file() else None,
            *(_read_rows(folder / name) for name in (METRICS, TIMINGS)),
        )

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return int(self.recipe["seed"])

    @property
    def state(self) -> str:
        """finished, or how far it is."""
        if self.summary is not None:
            return "finished"
        if not self.rows:
            return "unfinished: nothing logged"
        stage, step = self.rows[-1]["stage"], self.rows[-1]["step"]
        steps = f"/{self.recipe['training']['steps']}" if stage == "distill" else ""
        return f"unfinished: {stage} {step}{steps}"

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe by dotted keys, without those that make no other kind of run."""
        kept = {key: value for key, value in self.recipe.items() if key not in _IGNORED}
        return {k: v for k, v in _flat(kept) if k.rpartition(".")[2] not in _BOOKKEEPING}

    @property
    def distillation(self) -> list[dict[str, Any]]:
        """What was measured in the distillation."""
        return [row for row in self.rows if row["stage"] == "distill"]

    @property
    def minutes(self) -> float | None:
        """Duration of the distillation by the speed at its log points; None before the first."""
        training = self.recipe["training"]
        images = training["batch_size"] * training.get("accumulation", 1)
        rates = {r["step"]: r["images_per_second"] for r in self.timings if r["stage"] == "distill"}
        seconds, before = 0.0, 0
        for step, rate in sorted(rates.items()):
            seconds += (step - before) * images / rate
            before = step
        return seconds / 60 if rates else None

    def scores(self, role: str) -> dict[str, float]:
        """What the summary says of ``teacher`` or ``student``, by the metric's name."""
        ending = f"_{role}"
        return {
            name.removesuffix(ending): value
            for name, value in (self.summary or {}).items()
            if name.endswith(ending) and isinstance(value, int | float)
        }


@dataclasses.dataclass(frozen=True)
class Cell:
    """Mean of a number over runs that differ by their seed alone."""

    mean: float
    half_range: float | None
    """Half of the largest less the smallest; None for one run, and where all agree."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Cell:
        """The cell of at least one value."""
        spread = (max(values) - min(values)) / 2
        return cls(sum(values) / len(values), spread or None)

    def __str__(self) -> str:
        spread = "" if self.half_range is None else f" ± {self.half_range:.3g}"
        return f"{self.mean:.4g}{spread}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    label: str
    state: str
    settings: dict[str, Any]
    """What differs between the recipes; a teacher's row has none."""
    numbers: dict[str, Cell]
    runs: list[str]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs and the table of them.

    Args:
        runs: at least two, by names that tell them apart.
    """

    runs: dict[str, Run]

    @classmethod
    def read(cls, folders: Sequence[Path]) -> Comparison:
        """Read the runs of these folders.

        Raises:
            ValueError: for fewer than two, one that is given twice, and one that holds no run.
        """
        found = [folder.resolve() for folder in folders]
        if len(found) < 2:
            raise ValueError(f"{len(found)} run is given; a comparison needs at least two")
        for folder in found:
            if found.count(folder) > 1:
                raise ValueError(f"{folder} is given twice; give each run once")
        names = _short_names(found)
        return cls({name: Run.read(path) for name, path in zip(names, folders, strict=True)})

    @property
    def keys(self) -> list[str]:
        """Keys of the recipes whose values differ among the runs that have them."""
        every = [run.settings for run in self.runs.values()]
        keys = dict.fromkeys(key for settings in every for key in settings)
        return [
            key
            for key in keys
            if len({_text(settings[key]) for settings in every if key in settings}) > 1
        ]

    @property
    def groups(self) -> list[list[str]]:
        """Names of the runs that differ by their seed alone; an unfinished run stands alone."""
        return _grouped(self.runs, lambda name, run: [run.settings, None if run.summary else name])

    @property
    def rows(self) -> list[Row]:
        """The teachers, each once, and then the students."""
        keys = self.keys
        rows = []
        finished = {name: run for name, run in self.runs.items() if run.summary}
        for names in _grouped(finished, lambda _, run: [run.recipe.get(k) for k in _TEACHERS]):
            by_seed = {self.runs[name].seed: self.runs[name] for name in reversed(names)}
            scores = [run.scores("teacher") for run in by_seed.values()]
            rows.append(Row("teacher", "finished", {}, _cells(scores), names))
        for names in self.groups:
            runs = [self.runs[name] for name in names]
            settings = {key: runs[0].settings[key] for key in keys if key in runs[0].settings}
            numbers = _cells([run.scores("student") | _cost(run) for run in runs])
            rows.append(Row(_joined(names), runs[0].state, settings, numbers, names))
        return rows

    @property
    def notes(self) -> list[str]:
        """What a reader of the table must know."""
        notes = []
        sets = _grouped(self.runs, lambda _, run: run.recipe["data"])
        if len(sets) > 1:
            listed = "; ".join(
                f"{_text(self.runs[names[0]].recipe['data'])}: {', '.join(names)}" for names in sets
            )
            notes.append(f"These runs are of different data sets ({listed}): scores say nothing.")
        if any(len(names) > 1 for names in self.groups):
            notes.append("Runs that differ by their seed alone: mean ± half of the range.")
        unfinished = [name for name, run in self.runs.items() if run.summary is None]
        if unfinished:
            notes.append(f"Not finished: {', '.join(unfinished)}.")
        return notes

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Titles and cells as text."""
        rows, keys = self.rows, self.keys
        found = dict.fromkeys(name for row in rows for name in row.numbers)
        metrics = sorted(found, key=lambda name: _place(name, found))
        shown = [*keys, *(["state"] if any(row.state != "finished" for row in rows) else [])]
        titles = ["", *shown, *(_LABELS.get(name, name) for name in metrics)]
        body = [
            [
                row.label,
                *(_text(row.settings.get(key)) for key in keys),
                *([row.state] if "state" in shown else []),
                *(str(row.numbers[name]) if name in row.numbers else "" for name in metrics),
            ]
            for row in rows
        ]
        return titles, body

    def as_json(self) -> dict[str, Any]:
        """The table as plain numbers."""
        return {
            "notes": self.notes,
            "runs": {
                name: {
                    "folder": str(run.folder),
                    "seed": run.seed,
                    "state": run.state,
                    "summary": run.summary,
                }
                | _cost(run)
                for name, run in self.runs.items()
            },
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    def write(self, folder: Path) -> Path:
        """Write ``compare.html``, ``table.md`` and ``table.json``; the page needs no other file."""
        folder.mkdir(parents=True, exist_ok=True)
        titles, body = self.table()
        page = render(
            "compare.html.j2",
            titles=titles,
            body=body,
            notes=self.notes,
            figures=self._figures(),
            grids=[
                (name, run.state, embed(path.read_bytes()))
                for name, run in self.runs.items()
                if (path := _newest_grid(run.folder))
            ],
        )
        write_text(folder / "compare.html", page)
        write_text(folder / "table.md", _markdown(titles, body, self.notes))
        write_text(folder / "table.json", json.dumps(self.as_json(), indent=2) + "\n")
        return folder / "compare.html"

    def _figures(self) -> list[tuple[str, str]]:
        """(title, embedded picture) of every number that two runs logged in the distillation."""
        rows = {name: run.distillation for name, run in self.runs.items()}
        logged = {name: _scalars(found) for name, found in rows.items()}
        every = [metric for metrics in logged.values() for metric in metrics]
        shared = [metric for metric in dict.fromkeys(every) if every.count(metric) > 1]
        colours = {name: f"C{k}" for k, names in enumerate(self.groups) for name in names}
        figures = []
        for metric in shared:
            figure, axis = new_figure()
            values: list[float] = []
            for name, found in rows.items():
                steps, curve = series(found, metric)
                if curve:
                    axis.plot(steps, curve, color=colours[name], lw=1, label=name)
                    values += curve
            scale(axis, values)
            axis.set_xlabel("step")
            axis.legend(fontsize=6, frameon=False)
            figures.append((metric, embed_figure(figure)))
        return figures


_LABELS = {
    "evaluations": "evaluations",
    **COMPARED,
    "minutes": "minutes of distillation",
    "memory": "peak memory, GiB",
}


def _place(name: str, found: Mapping[str, Any]) -> tuple[int, int]:
    """Known metrics in the order of a report, then others as they come, then what it cost."""
    known, others = list(_LABELS), list(found)
    if name in ("minutes", "memory"):
        return 2, known.index(name)
    return (0, known.index(name)) if name in known else (1, others.index(name))


def _cost(run: Run) -> dict[str, float]:
    memory = [row["memory_gib"] for row in run.timings]
    if run.summary and "peak_memory_gib" in run.summary:
        memory = [run.summary["peak_memory_gib"]]
    cost = {"minutes": run.minutes, "memory": max(memory, default=None)}
    return {name: value for name, value in cost.items() if value is not None}


def _cells(several: Sequence[Mapping[str, float]]) -> dict[str, Cell]:
    """The cell of every number that all of them have."""
    return {
        name: Cell.of([values[name] for values in several])
        for name in several[0]
        if all(name in values for values in several)
    }


def _grouped(runs: Mapping[str, Run], key: Any) -> list[list[str]]:
    """Names of the runs of one key, in the order of the first of each."""
    groups: dict[str, list[str]] = {}
    for name, run in runs.items():
        groups.setdefault(json.dumps(key(name, run), sort_keys=True), []).append(name)
    return list(groups.values())


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    """A setting as the table shows it; nothing for a key that a run lacks."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The ends of the paths that tell them apart."""
    most = max(len(folder.parts) for folder in folders)
    for length in range(1, most + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names)} ({len(names)} seeds)"


def _newest_grid(folder: Path) -> Path | None:
    """A run's grid: the last one, or the newest of the distillation so far."""
    last = folder / "grid.png"
    if last.is_file():
        return last
    return max((folder / "samples").glob("distill-*.png"), default=None)


def _scalars(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the numbers in rows of metrics."""
    found = {name: None for row in rows for name, value in row.items() if _is_metric(name, value)}
    return list(found)


def _is_metric(name: str, value: Any) -> bool:
    return "/" in name and isinstance(value, int | float)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    return read_rows(path) if path.is_file() else []


def _markdown(titles: Sequence[str], body: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    lines = [titles, ["---"] * len(titles), *body]
    table = "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in lines)
    return table + "".join(f"\n{note}\n" for note in notes)
