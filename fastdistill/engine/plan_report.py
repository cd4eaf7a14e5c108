"""A plan for people: tables on the screen, and the same numbers as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fastdistill.engine.gpus import GIB
from fastdistill.engine.planning import Layout, Memory, Planner, explain_misfit
from fastdistill.engine.prediction import Prediction

COUNTED = "counted on the meta device; the reserve is assumed"
PREDICTED = "predicted from counts, data sheets and assumed efficiencies; not measured"


@dataclasses.dataclass(frozen=True)
class Option:
    """A layout, and the most that fits in it."""

    layout: Layout
    largest: int
    """Samples of a micro-batch on one GPU; 0 if not even one fits."""
    memory: Memory
    """At that batch, or at one sample."""
    prediction: Prediction | None
    """At that batch."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A job in its own layout, and the alternatives."""

    name: str
    planner: Planner
    layout: Layout
    batch: int
    """Samples of a micro-batch on one GPU."""
    limit: float
    """Bytes of a GPU that may be used."""
    memory: Memory
    prediction: Prediction
    options: list[Option]

    @classmethod
    def of(cls, name: str, planner: Planner, limit: float) -> Plan:
        """Count, predict and search; recomputed blocks are counted where they are called for.

        They are where the recipe asks for them, or where its batch fits in no layout without.
        """
        layout, batch = planner.own_layout(), planner.own_batch()
        memory = planner.memory(layout, batch)
        options = [_option(planner, other, limit) for other in planner.layouts(False)]
        without = any(option.largest >= batch for option in options)
        if planner.can_checkpoint and (layout.checkpoint_blocks or not without):
            options += [_option(planner, other, limit) for other in planner.layouts(True)]
        return cls(
            name, planner, layout, batch, limit, memory, planner.predict(layout, batch), options
        )

    @property
    def fits(self) -> bool:
        """Whether the recipe's own layout and batch fit."""
        return self.memory.total <= self.limit

    def verdict(self) -> str:
        """One sentence: that it fits and what could be gained, or what to change.

        What could be gained is the layout and batch of most samples a second, where it is at least
        a twentieth more.
        """
        if not self.fits:
            others = [(option.layout, option.largest) for option in self.options]
            return explain_misfit(self.planner, self.layout, self.batch, self.limit, others)
        sentence = (
            f"it fits: {self.memory.total / GIB:.1f} of {self.limit / GIB:.1f} GiB on each GPU"
        )
        fitting = [option for option in self.options if option.prediction is not None]
        best = max(fitting, key=_rate, default=None)
        if best is None or _rate(best) < 1.05 * self.prediction.samples_per_second:
            return sentence
        gain = _rate(best) / self.prediction.samples_per_second
        size = best.largest * self.planner.gpus
        return (
            f"{sentence}; {best.layout} with training.batch_size={size} would make {gain:.2f} "
            "times the samples a second (predicted; another batch size is another training)"
        )

    def as_json(self) -> dict[str, Any]:
        """All numbers, in bytes, seconds and operations."""
        planner, training = self.planner, self.planner.job.training
        cycle = planner.cycle(self.layout.checkpoint_blocks)
        return {
            "recipe": self.name,
            "gpus": planner.gpus,
            "gpu": dataclasses.asdict(planner.gpu),
            "layout": dataclasses.asdict(self.layout),
            "batch_per_gpu": self.batch,
            "training": training.model_dump(mode="json"),
            "memory_limit": self.limit,
            "fits": self.fits,
            "verdict": self.verdict(),
            "memory": _memory_json(self.memory) | {"basis": COUNTED},
            "activations_per_sample": {
                role: size.per_sample for role, size in cycle.activations.items()
            },
            "flops_per_sample_and_cycle": cycle.work.total_flops.per_sample,
            "time": _time_json(self.prediction) | {"basis": PREDICTED},
            "assumptions": dataclasses.asdict(planner.assumed),
            "options": [
                {
                    "layout": dataclasses.asdict(option.layout),
                    "largest_batch_per_gpu": option.largest,
                    "memory": _memory_json(option.memory),
                    "samples_per_second": _rate(option) if option.prediction else None,
                }
                for option in self.options
            ],
        }

    def show(self, console: Console) -> None:
        """Print the tables, and the verdict of a plan that fits."""
        planner, training = self.planner, self.planner.job.training
        total = self.batch * planner.gpus
        console.print(
            f"{self.name}: {planner.gpus} x {planner.gpu.name}, mode {self.layout}, batch {total} "
            f"({self.batch} a GPU) x {training.accumulation}, {training.precision}, "
            f"{max(planner.cycle(self.layout.checkpoint_blocks).updates.values())} critic updates "
            "a student update",
            markup=False,
        )
        for table in (self._memory_table(), self._cycle_table(), self._options_table()):
            console.print(table)
        prediction = self.prediction
        console.print(
            f"a cycle: {1e3 * prediction.cycle:,.0f} ms, {prediction.samples_per_second:,.1f} "
            f"samples a second; bound by {_bounds(prediction)} ({PREDICTED})",
            markup=False,
        )
        if training.compile != "none":
            console.print(
                f"compile {training.compile} is not part of it: what memory bounds is that of "
                "eager kernels, an upper bound",
                markup=False,
            )
        if self.fits:
            console.print(self.verdict(), markup=False)

    def _memory_table(self) -> Table:
        memory = self.memory
        table = _table(f"memory of each GPU ({COUNTED})", "", "parameters", "holds", "together")
        table.columns[2].justify = "left"
        for plan in memory.networks:
            held = ", ".join(f"{role} {_human(size)}" for role, size in plan.bytes.items() if size)
            table.add_row(plan.name, f"{plan.parameters / 1e6:,.1f} M", held, _human(plan.total))
        shared = sum(plan.total for plan in memory.networks) + memory.buffers - memory.states
        if shared:
            reason = "one network's gradients are unreduced at a time"
            table.add_row("", "", reason, f"-{_human(shared)}")
        if memory.buffers:
            table.add_row("buffers", "", "", _human(memory.buffers))
        cycle = self.planner.cycle(self.layout.checkpoint_blocks)
        kept = ", ".join(
            f"{role} {_human(size.per_sample)}" for role, size in cycle.activations.items()
        )
        table.add_row(
            "activations",
            "",
            f"a forward keeps for each sample: {kept}",
            _human(memory.activations),
        )
        table.add_row("reserve", "", "context, workspaces, fragmentation", _human(memory.reserve))
        table.add_row("all", "", f"of {_human(self.limit)}", _human(memory.total))
        return table

    def _cycle_table(self) -> Table:
        title = f"one cycle on each GPU ({PREDICTED})"
        columns = ("update of", "part", "times", "TFLOP", "GB", "kernels", "ms", "host ms", "share")
        table = _table(title, *columns)
        cycle = self.prediction.cycle
        for row in self.prediction.rows:
            seconds = row.times * row.device
            table.add_row(
                row.update,
                row.name,
                f"{row.times:g}",
                f"{row.flops / 1e12:,.2f}" if row.flops else "",
                f"{row.bytes / 1e9:,.1f}",
                f"{row.kernels:,.0f}" if row.kernels else "",
                f"{1e3 * row.device:,.1f}",
                f"{1e3 * row.host:,.1f}" if row.host else "",
                f"{seconds / cycle:.1%}",
            )
        exposed = self.prediction.exposed
        if exposed:
            name = f"collectives that nothing hides, of {1e3 * self.prediction.collectives:,.0f} ms"
            table.add_row(
                "", name, "1", "", "", "", f"{1e3 * exposed:,.1f}", "", f"{exposed / cycle:.1%}"
            )
        return table

    def _options_table(self) -> Table:
        title = f"what fits in {_human(self.limit)}"
        columns = (
            "mode",
            "networks GiB",
            "a sample GiB",
            "largest batch a GPU",
            "samples a second, predicted",
        )
        table = _table(title, *columns)
        for option in self.options:
            cycle = self.planner.cycle(option.layout.checkpoint_blocks)
            slope = cycle.peak.at(1025) - cycle.peak.at(1024)
            rate = f"{_rate(option):,.1f}" if option.prediction else ""
            table.add_row(
                str(option.layout),
                _human(option.memory.states),
                _human(slope),
                str(option.largest) if option.largest else "none",
                rate,
            )
        return table


def _option(planner: Planner, layout: Layout, limit: float) -> Option:
    largest = planner.largest_batch(layout, limit)
    memory = planner.memory(layout, largest or 1)
    return Option(layout, largest, memory, planner.predict(layout, largest) if largest else None)


def _rate(option: Option) -> float:
    return option.prediction.samples_per_second if option.prediction else 0.0


def _bounds(prediction: Prediction) -> str:
    """The two largest shares of a cycle."""
    shares = [
        f"{name} {seconds / prediction.cycle:.0%}" for name, seconds in prediction.shares().items()
    ]
    return ", then ".join(shares[:2])


def _memory_json(memory: Memory) -> dict[str, Any]:
    return {
        "networks": {plan.name: plan.bytes for plan in memory.networks},
        "parameters": {plan.name: plan.parameters for plan in memory.networks},
        "buffers": memory.buffers,
        "states": memory.states,
        "activations": memory.activations,
        "reserve": memory.reserve,
        "total": memory.total,
    }


def _time_json(prediction: Prediction) -> dict[str, Any]:
    return {
        "cycle": prediction.cycle,
        "device": prediction.device,
        "host": prediction.host,
        "collectives": prediction.collectives,
        "exposed_collectives": prediction.exposed,
        "samples_per_second": prediction.samples_per_second,
        "bottleneck": prediction.bottleneck,
        "shares": prediction.shares(),
        "parts": [dataclasses.asdict(row) | {"device": row.device} for row in prediction.rows],
    }


def _table(title: str, *columns: str) -> Table:
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    return table


def _human(size: float) -> str:
    """Bytes in GiB, or in MiB where they are few."""
    return f"{size / GIB:,.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:,.1f} MiB"
