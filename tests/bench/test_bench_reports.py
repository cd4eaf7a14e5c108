"""Tables, files, charts and comparisons of runs."""

from __future__ import annotations

import dataclasses
import sys

import pytest
from typer.testing import CliRunner

from bench import charts, compare, results, suite
from bench.harness import CEILINGS, OURS, Row
from bench.results import Report
from fastdistill import cli
from fastdistill.cli import app, main

MACHINE = {"device": "cpu", "cpu": "one", "cores": "2", "threads": "2", "date": "today"}


def row(variant=OURS, microseconds=100.0, spread=0.02, **other):
    known = {"op": "double", "shape": "8x4", "dtype": "float32", "bytes_moved": 10**6} | other
    numbers = {"ratio": 1.0, "gigabytes_per_second": 1e3 / microseconds, "ceiling": 0.5}
    extra = {"least": 0.99 * microseconds, "cpu_microseconds": 7.0, "peak_bytes": 2**20}
    return Row(
        variant=variant, microseconds=microseconds, spread=spread, **known, **numbers, **extra
    )


def refused():
    return Row("double", "8x4", "float32", "rival", 10**6, note="wrong result, refused: [red]")


def written(folder, name, *rows, **machine):
    report = Report(MACHINE | machine, list(rows))
    report.save(folder / name)
    return folder / name


def moves(before, after):
    found = compare.compare(Report(MACHINE, [before]), Report(MACHINE, [after]))
    return [move.moved for move in found]


def test_reports_survive_their_file(tmp_path):
    rows = [row(), refused()]
    path = written(tmp_path, "a.json", *rows)
    assert Report.load(path) == Report(MACHINE, rows)


@pytest.mark.parametrize("content", ["{", "[]", '{"machine": {}}', '{"machine": {}, "rows": [{}]}'])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is no benchmark's result"):
        Report.load(path)


def test_only_times_beyond_both_spreads_moved():
    assert moves(row(), row(microseconds=105.0)) == [True]
    assert moves(row(), row(microseconds=95.0)) == [True]
    assert moves(row(), row(microseconds=103.0)) == [False]
    assert moves(row(spread=0.06), row(microseconds=105.0)) == [False]
    assert moves(row(), row(microseconds=105.0, spread=0.1)) == [False]


def test_rows_without_a_partner_or_a_time_are_not_compared():
    before = Report(MACHINE, [row(), row(shape="old"), refused()])
    after = Report(MACHINE, [row(), row(shape="new"), dataclasses.replace(row("rival"))])
    assert [move.after.shape for move in compare.compare(before, after)] == ["8x4"]
    assert any("2 rows" in warning for warning in compare.warnings(before, after))


def test_what_moved_most_comes_first():
    before = Report(MACHINE, [row(name) for name in "abc"])
    after = Report(MACHINE, [row("a"), row("b", 150.0), row("c", 30.0)])
    assert [m.after.variant for m in compare.compare(before, after)] == ["c", "b", "a"]


def run_cli(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_the_command_says_what_moved(tmp_path):
    copy = CEILINGS["copy"]
    before = written(tmp_path, "a.json", row(), row(copy), row("constant"))
    after = written(tmp_path, "b.json", row(microseconds=50.0), row(copy, 90.0), row("constant"))
    result = run_cli("--compare", before, after)
    assert result.exit_code == 0, result.output
    assert "2 of 3 times moved" in result.output
    assert "-50.0%" in result.output
    assert "-10.0%" in result.output
    assert "constant" not in result.output
    assert "different machines" not in result.output


def test_the_command_says_that_machines_differ(tmp_path):
    before = written(tmp_path, "a.json", row())
    after = written(tmp_path, "b.json", row(), cpu="another")
    result = run_cli("--compare", before, after)
    assert "These are different machines" in result.output
    assert "cpu another" in result.output
    assert "0 of 1 times moved" in result.output


def test_tables_show_numbers_and_refusals():
    console = results.wide_console()
    with console.capture() as captured:
        console.print(results.table("double", [row(), refused()]))
    text = captured.get()
    assert "wrong result, refused: [red]" in " ".join(text.split())
    assert "50%" in text
    page = results.markdown([row(), refused()])
    assert "## double" in page
    assert "| 8x4 | float32 | fastdistill | 100 | 99 | 2% | 1.00 |" in page


def test_a_busy_machine_is_told(tmp_path):
    busy = row(others=0.4)
    assert "up to 40%" in results.table("double", [busy]).caption
    assert results.table("double", [row()]).caption is None
    warnings = compare.warnings(Report(MACHINE, [row()]), Report(MACHINE, [busy]))
    assert warnings == ["Other programs took up to 40% of the CPU."]


def test_a_chart_is_drawn_of_every_op_with_times(tmp_path):
    rows = [row(bytes_moved=size) for size in (10**5, 10**7)]
    rows += [row(CEILINGS["copy"], 50.0), row("eager", 300.0), row("eager", dtype="bfloat16")]
    charts.draw("double", [*rows, refused()], tmp_path / "double.svg")
    text = (tmp_path / "double.svg").read_text()
    assert text.startswith("<?xml")
    charts.draw("double", [refused()], tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def measured(op, device, **_):
    return [[row(op=op[0]), row("rival", 200.0, op=op[0])]]


def test_the_command_measures_and_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "run", measured)
    result = run_cli("--ops", "renoise,adamw_ema_", "--quick", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"bench.json", "renoise.svg", "adamw_ema.svg"}
    report = Report.load(tmp_path / "out" / "bench.json")
    assert [found.op for found in report.rows] == ["renoise"] * 2 + ["adamw_ema_"] * 2
    assert {"date", "command", "torch", "commit", "threads"} <= report.machine.keys()


def test_the_command_fails_where_ours_is_wrong(tmp_path, monkeypatch):
    wrong = dataclasses.replace(refused(), variant=OURS)
    monkeypatch.setattr(suite, "run", lambda *_, **__: [[wrong]])
    result = run_cli("--ops", "renoise", "-o", tmp_path)
    assert result.exit_code == 1
    assert "wrong result, refused" in result.output


def test_an_installation_without_benchmarks_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "fastdistill" / "cli.py"))
    with pytest.raises(ValueError, match="run this in a checkout"):
        CliRunner().invoke(app, ["bench"], catch_exceptions=False)


def test_unknown_ops_end_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastdistill", "bench", "--ops", "renose"])
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 1
    assert capsys.readouterr().err.startswith("error: there is no benchmark of renose")
