"""One chart an op: bandwidth by bytes moved below the ceiling, and times over ours by size.

`fastdistill bench` draws them; ``python -m bench.charts RESULTS.json FOLDER`` does for a file that
was written elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness import CEILINGS, OURS, Row
from bench.results import Report, variants_of

_OURS = "#d1495b"
_PEERS = ("#30638e", "#edae49", "#3c896d", "#7d5ba6", "#8d6a4f", "#5b5b5b", "#00798c")


def draw_all(rows: Sequence[Row], folder: Path) -> None:
    """Write the charts of all ops into a folder."""
    for op in dict.fromkeys(row.op for row in rows):
        chosen = [row for row in rows if row.op == op]
        draw(op, chosen, folder / f"{op.strip('_')}.svg")


def draw(op: str, rows: Sequence[Row], path: Path) -> None:
    """Write the chart of one op; nothing where no row has a time."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    timed = [row for row in rows if row.microseconds is not None]
    if not timed:
        return
    names = variants_of(timed)
    peers = [name for name in names if name != OURS]
    colours = {OURS: _OURS} | dict(zip(peers, _PEERS * len(peers), strict=False))
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(op, fontweight="bold", x=0.01, ha="left")
    left, right = figure.subplots(1, 2)
    _rates(left, timed, colours)
    _ratios(right, timed, {name: colours[name] for name in peers})
    handles = left.get_legend_handles_labels()[0] + [
        Line2D([], [], color="#222222", **_style(dtype), label=dtype)
        for dtype in dict.fromkeys(row.dtype for row in timed)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path)


def _rates(axes: Any, rows: Sequence[Row], colours: dict[str, str]) -> None:
    """GB/s below the ceiling; GFLOP/s of an op that is bound by arithmetic."""
    arithmetic = all(row.gigaflops_per_second for row in rows)
    field = "gigaflops_per_second" if arithmetic else "gigabytes_per_second"
    if not arithmetic:
        ceiling = [row for row in rows if row.variant in CEILINGS.values()]
        _lines(axes, ceiling, field, "#222222", "measured ceiling", alpha=0.35)
    for name, colour in colours.items():
        _lines(axes, [row for row in rows if row.variant == name], field, colour, name)
    axes.set_ylabel("GFLOP/s" if arithmetic else "GB/s")
    _finish(axes, "arithmetic" if arithmetic else "bandwidth")


def _ratios(axes: Any, rows: Sequence[Row], colours: dict[str, str]) -> None:
    for name, colour in colours.items():
        chosen = [row for row in rows if row.variant == name and row.ratio is not None]
        _lines(axes, chosen, "ratio", colour, name)
    axes.axhline(1, color=_OURS, linewidth=2)
    axes.set_ylabel("time / ours")
    _finish(axes, "time over ours (above 1: ours is faster)")


def _finish(axes: Any, title: str) -> None:
    """Title, grid and plain numbers on both logarithmic axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(xscale="log", yscale="log", xlabel="MiB moved by the op's model")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(which="major", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _style(dtype: str) -> dict[str, Any]:
    solid = dtype == "float32"
    return {"linestyle": "-" if solid else "--", "marker": "o" if solid else "s", "markersize": 5}


def _lines(
    axes: Any, rows: Sequence[Row], field: str, colour: str, label: str, alpha: float = 1.0
) -> None:
    """One line a dtype through the sizes of a variant."""
    for dtype in dict.fromkeys(row.dtype for row in rows):
        chosen = sorted((row for row in rows if row.dtype == dtype), key=lambda r: r.bytes_moved)
        axes.plot(
            [row.bytes_moved / 2**20 for row in chosen],
            [getattr(row, field) for row in chosen],
            color=colour,
            alpha=alpha,
            **_style(dtype),
            linewidth=2.2 if label == OURS else 1.4,
            label=label if dtype == rows[0].dtype else None,
        )


if __name__ == "__main__":
    draw_all(Report.load(Path(sys.argv[1])).rows, Path(sys.argv[2]))
