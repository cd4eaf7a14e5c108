"""Runs side by side: whose numbers stand in which row, and what is said of runs that do not fit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from small import small_recipe
from typer.testing import CliRunner

from fastdistill.cli import app
from fastdistill.config import dump_recipe
from fastdistill.engine.compare import Comparison
from fastdistill.engine.job import Job

_QUICK = ["teacher.training.steps=4", "training.steps=4", "training.log_every=2"]


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """Two finished runs that differ by their seed."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("zero", 0), ("one", 1)):
        recipe = small_recipe(*_QUICK, "training.sample_every=2", f"seed={seed}")
        Job.create(folder / name, recipe, lambda line: None).run()
    return folder


def made_up(folder: Path, *overrides: str, student: float = 2.0, steps: int = 4) -> Path:
    """A run's folder with numbers of our choice; without a summary where it stops before step 4."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(small_recipe(*_QUICK, *overrides)))
    rows = [
        {"stage": "distill", "step": step, "student/loss": 1.0 / step, "student/score_gap": 3.0}
        for step in range(2, steps + 1, 2)
    ]
    times = [
        {"stage": "distill", "step": row["step"], "images_per_second": 2.0, "memory_gib": 0.25}
        for row in rows
    ]
    for name, lines in (("metrics", rows), ("timings", times)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    if steps == 4:
        scores = {"evaluations": 1, "frechet_pixel": student, "energy": 10 * student}
        summary = {f"{name}_student": value for name, value in scores.items()}
        summary |= {"frechet_pixel_teacher": 1.0, "evaluations_teacher": 7, "peak_memory_gib": 0.5}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def table(*folders: Path) -> dict[str, dict[str, str]]:
    """Cells by row and title."""
    titles, body = Comparison.read(folders).table()
    return {row[0]: dict(zip(titles[1:], row[1:], strict=True)) for row in body}


def test_real_runs_become_a_table_and_a_page_that_needs_no_other_file(real, tmp_path):
    done = CliRunner().invoke(
        app, ["compare", str(real / "zero"), str(real / "one"), "-o", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    summaries = [json.loads((real / name / "summary.json").read_text()) for name in ("zero", "one")]
    values = [summary["frechet_pixel_student"] for summary in summaries]
    mean, half = sum(values) / 2, abs(values[0] - values[1]) / 2
    assert "zero, one (2 seeds)" in done.output
    assert f"{mean:.4g} ± {half:.3g}" in done.output
    written = json.loads((tmp_path / "out" / "table.json").read_text())
    row = next(row for row in written["rows"] if row["label"] != "teacher")
    assert row["numbers"]["frechet_pixel"] == {"mean": mean, "half_range": half}
    assert written["runs"]["one"]["minutes"] > 0
    assert f"| {mean:.4g} ± {half:.3g} |" in (tmp_path / "out" / "table.md").read_text()
    page = (tmp_path / "out" / "compare.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert page.count("data:image/png") == 2, "a grid of each run"
    assert page.count("data:image/svg") >= 5, "curves"
    for metric in ("student/score_gap", "critic/loss", "evaluation/frechet_pixel"):
        assert f'alt="{metric}"' in page


def test_a_row_is_the_runs_that_differ_by_seed_alone_and_a_column_is_what_differs_else(tmp_path):
    found = table(
        made_up(tmp_path / "a", student=2.0),
        made_up(tmp_path / "b", "seed=1", "training.checkpoint_every=9", student=5.0),
        made_up(tmp_path / "c", "objective.divergence=jensen_shannon", "seed=1", student=3.0),
    )
    assert list(found) == ["teacher", "a, b (2 seeds)", "c"]
    column = [row["objective.divergence"] for row in found.values()]
    assert column == ["", "reverse_kl", "jensen_shannon"]
    assert "seed" not in found["c"]
    assert [row["Fréchet distance, pixels"] for row in found.values()] == ["1", "3.5 ± 1.5", "3"]
    assert found["c"]["energy"] == "30", "a metric that is unknown here keeps its name"
    assert found["c"]["minutes of distillation"] == f"{4 * 32 / 2 / 60:.4g}"
    assert found["c"]["peak memory, GiB"] == "0.5"
    assert list(found["c"])[-2:] == ["minutes of distillation", "peak memory, GiB"]


def test_a_setting_that_one_method_alone_has_is_no_difference(tmp_path):
    """Of a method there is its name; its other keys would fill the table with empty cells."""
    made_up(tmp_path / "a")
    path = made_up(tmp_path / "b") / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["objective"] = {"name": "another", "weight": 0.5, "student_times": [2.5]}
    path.write_text(yaml.safe_dump(recipe))
    assert Comparison.read([tmp_path / "a", tmp_path / "b"]).keys == ["objective.name"]


def test_teachers_of_other_recipes_have_a_row_each(tmp_path):
    comparison = Comparison.read(
        [made_up(tmp_path / "a"), made_up(tmp_path / "b", "teacher.sampler_steps=9")]
    )
    assert [row.label for row in comparison.rows] == ["teacher", "teacher", "a", "b"]
    assert [row.runs for row in comparison.rows[:2]] == [["a"], ["b"]]


def test_an_unfinished_run_is_shown_as_far_as_it_is(tmp_path):
    whole, half = made_up(tmp_path / "whole"), made_up(tmp_path / "half", steps=2)
    found = table(whole, half)
    assert found["half"]["state"] == "unfinished: distill 2/4"
    assert found["half"]["Fréchet distance, pixels"] == ""
    assert found["half"]["minutes of distillation"]
    assert found["whole"]["state"] == "finished"
    comparison = Comparison.read([whole, half])
    assert any("Not finished: half" in note for note in comparison.notes)
    assert 'alt="student/loss"' in comparison.write(tmp_path / "out").read_text()


def test_runs_of_other_data_sets_are_said_to_be(tmp_path):
    made_up(tmp_path / "a")
    path = made_up(tmp_path / "b") / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(recipe | {"data": {"name": "labels"}}))
    [note] = Comparison.read([tmp_path / "a", tmp_path / "b"]).notes
    assert "different data sets" in note
    assert '{"name": "labels"}: b' in note


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    folders = [made_up(tmp_path / parent / "run", f"seed={k}") for k, parent in enumerate("xy")]
    assert list(Comparison.read(folders).runs) == ["x/run", "y/run"]


def test_what_is_no_run_is_refused_by_name(tmp_path):
    run = made_up(tmp_path / "run")
    with pytest.raises(ValueError, match="nowhere holds no run"):
        Comparison.read([run, tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="at least two"):
        Comparison.read([run])
    with pytest.raises(ValueError, match="given twice"):
        Comparison.read([run, run / ".." / "run"])
    shutil.copytree(run, tmp_path / "other")
    (tmp_path / "other" / "recipe.yaml").write_text("a line\n")
    with pytest.raises(ValueError, match="no recipe as a run writes it"):
        Comparison.read([run, tmp_path / "other"])
