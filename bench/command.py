"""What `fastdistill bench` and ``python -m bench`` do."""

from __future__ import annotations

from pathlib import Path

from bench import charts, compare, machine, results, suite
from bench.harness import Row
from bench.results import Report


def run(ops: str | None, device: str, quick: bool, output: Path) -> bool:
    """Measure, print a table an op, write bench.json and a chart an op into ``output``.

    Returns:
        Whether all our own results were right.
    """
    chosen, where = suite.choose(ops), suite.find_device(device)
    facts = machine.describe(where)
    console = results.wide_console()
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), style="dim")
    output.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for op in chosen:
        found: list[Row] = []
        with console.status(op):
            for case in suite.run([op], where, quick=quick):
                found += case
                Report(facts, rows + found).save(output / "bench.json")
        rows += found
        console.print(results.table(op, found))
        charts.draw_all(found, output)
    console.print(results.FOOTNOTE, style="dim")
    console.print(f"bench.json and a chart of each op are in {output}")
    return not suite.ours_is_wrong(rows)


def show_comparison(before: Path, after: Path) -> None:
    """Print what moved between two files that `run` wrote."""
    reports = Report.load(before), Report.load(after)
    console = results.wide_console()
    for warning in compare.warnings(*reports):
        console.print(warning, style="bold yellow")
    moves = compare.compare(*reports)
    moved = [move for move in moves if move.moved]
    if moved:
        console.print(compare.table(moves))
    console.print(
        f"{len(moved)} of {len(moves)} times moved by more than both spreads. Its ceiling: how "
        "much the copy or scaling of the same case moved, which no code of ours changes."
    )
