"""`compare`: what moved between two runs."""

from __future__ import annotations

from typing import NamedTuple

from rich.table import Table

from bench.harness import CEILINGS, Row
from bench.machine import hardware
from bench.results import Report, busy, number


class Move(NamedTuple):
    """One variant of one case in both runs."""

    before: Row
    after: Row
    change: float
    """Time after over time before, less 1."""
    moved: bool
    """Whether the times differ by more than both spreads together."""


def compare(before: Report, after: Report) -> list[Move]:
    """Every row that both runs timed, the largest change first."""
    old = {row.key: row for row in before.rows}
    pairs = [(old[row.key], row) for row in after.rows if row.key in old]
    found = [move for move in map(_move, *zip(*pairs, strict=True)) if move] if pairs else []
    return sorted(found, key=lambda move: (not move.moved, -abs(move.change)))


def _move(before: Row, after: Row) -> Move | None:
    if before.microseconds is None or after.microseconds is None:
        return None
    spread = (before.spread or 0) * before.microseconds + (after.spread or 0) * after.microseconds
    change = after.microseconds / before.microseconds - 1
    return Move(before, after, change, abs(after.microseconds - before.microseconds) > spread)


def warnings(before: Report, after: Report) -> list[str]:
    """What a reader must know before he believes a comparison."""
    old, new = hardware(before.machine), hardware(after.machine)
    found = []
    if old != new:
        found.append(
            f"These are different machines ({old}; {new}): times say which machine is faster, not "
            "which code."
        )
    found += filter(None, (busy(report.rows) for report in (before, after)))
    keys = {row.key for row in before.rows} ^ {row.key for row in after.rows}
    if keys:
        found.append(f"{len(keys)} rows are in one of the two runs only and not compared.")
    return found


def table(moves: list[Move]) -> Table:
    """What moved, and how much the ceiling of the same case moved meanwhile."""
    memory = {m.after.key[:3]: m.change for m in moves if m.after.variant in CEILINGS.values()}
    grid = Table("op", "shape", "dtype", "variant")
    for name in ("before, µs", "after, µs", "change", "its ceiling"):
        grid.add_column(name, justify="right", no_wrap=True)
    for before, after, change, moved in moves:
        if moved:
            ceiling = memory.get(after.key[:3])
            times = (number(row.microseconds or 0) for row in (before, after))
            style = "red" if change > 0 else "green"
            shown = (f"{change:+.1%}", "-" if ceiling is None else f"{ceiling:+.1%}")
            grid.add_row(*after.key, *times, *shown, style=style)
    return grid
