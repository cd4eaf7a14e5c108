"""`Report`: the rows of a run and the machine they are from, as JSON and as a table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.harness import BUSY, CEILINGS, GRAPH, OURS, Row
from bench.machine import Machine

COLUMNS = ("µs", "min µs", "±", "/ ours", "GB/s", "ceiling", "CPU µs", "peak MiB")


@dataclasses.dataclass(frozen=True)
class Report:
    """One run."""

    machine: Machine
    rows: list[Row]

    def save(self, path: Path) -> None:
        """Write as JSON."""
        content = {"machine": self.machine, "rows": [dataclasses.asdict(row) for row in self.rows]}
        path.write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what `save` wrote.

        Raises:
            ValueError: for a file that is something else.
        """
        try:
            content = json.loads(path.read_text())
            return cls(content["machine"], [Row(**row) for row in content["rows"]])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no benchmark's result: {error}") from error


def wide_console() -> Console:
    """A console that does not break tables where output goes to a file."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=144)


def table(op: str, rows: Sequence[Row]) -> Table:
    """All rows of one op, a section for each shape and dtype."""
    grid = Table(title=op, title_justify="left", title_style="bold")
    for name in ("shape", "dtype", "variant"):
        grid.add_column(name, no_wrap=name != "variant")
    for name in COLUMNS:
        grid.add_column(name, justify="right", no_wrap=True)
    before: tuple[str, str] | None = None
    for row in rows:
        case = row.shape, row.dtype
        if before is not None and case != before:
            grid.add_section()
        style = "bold" if row.variant == OURS else "dim" if row.variant in CEILINGS.values() else ""
        style = "red" if row.microseconds is None else style
        texts = (*(case if case != before else ("", "")), *cells(row))
        grid.add_row(*map(escape, texts), style=style)
        before = case
    grid.caption, grid.caption_justify, grid.caption_style = busy(rows), "left", "bold yellow"
    return grid


def busy(rows: Sequence[Row]) -> str | None:
    """A warning where the CPU was in other hands too."""
    others = max((row.others for row in rows), default=0.0)
    return f"Other programs took up to {others:.0%} of the CPU." if others > BUSY else None


def cells(row: Row) -> list[str]:
    """A row's variant and numbers as text."""
    if row.microseconds is None:
        return [f"{row.variant}: {row.note}", *["-"] * len(COLUMNS)]
    return [
        row.variant,
        number(row.microseconds),
        "-" if row.least is None else number(row.least),
        f"{row.spread:.0%}",
        "-" if row.ratio is None else f"{row.ratio:.2f}",
        f"{row.gigabytes_per_second:.1f}",
        f"{row.ceiling:.0%}" + ("" if row.cold else " *"),
        "-" if row.cpu_microseconds is None else number(row.cpu_microseconds),
        "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.2f}",
    ]


def markdown(rows: Sequence[Row]) -> str:
    """The tables of all ops for a page of documentation."""
    lines: list[str] = []
    for op in dict.fromkeys(row.op for row in rows):
        chosen = [row for row in rows if row.op == op]
        lines += [f"## {op}", "", "| shape | dtype | " + " | ".join(("variant", *COLUMNS)) + " |"]
        lines += ["|---|---|---|" + "---:|" * len(COLUMNS)]
        lines += [f"| {' | '.join((row.shape, row.dtype, *cells(row)))} |" for row in chosen]
        lines += ["", *filter(None, [busy(chosen)]), ""]
    return "\n".join(lines)


def number(value: float) -> str:
    """Three digits or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


FOOTNOTE = """\
µs: median. ±: half the distance of the quartiles. / ours: time over ours. GB/s: bytes of the op's
stated model over time. ceiling: share of the bandwidth of the copy (or in-place scaling) in the
same rounds; * where the inputs fit the last-level cache. CPU µs: time to enqueue on a GPU, of all
threads on a CPU. peak: results and temporaries of one call."""


def variants_of(rows: Sequence[Row]) -> list[str]:
    """Names of peers in the order in which they appear, without ceilings and graph replays."""
    names = dict.fromkeys(row.variant for row in rows)
    return [name for name in names if name not in CEILINGS.values() and not name.endswith(GRAPH)]
