"""The bench of methods: every case is a recipe that can be run, and its table tells the runs."""

from __future__ import annotations

import pytest

from bench.methods import CASES, COLUMNS, name, table
from fastdistill.config import load_recipe


@pytest.mark.parametrize("recipe", COLUMNS)
def test_every_case_is_a_recipe_that_can_be_run(recipe, tmp_path):
    (tmp_path / "warmup").mkdir()
    for case in CASES:
        if recipe in case.without:
            continue
        chosen = load_recipe(recipe, case.arguments(recipe, tmp_path))
        assert chosen.teacher.path == str(tmp_path / "teacher")
        assert chosen.start == (str(tmp_path / "warmup") if case.warm else None)
        assert chosen.warmup is None


def test_cases_have_folders_of_their_own():
    assert len({name(case.label) for case in CASES}) == len(CASES)


def test_a_table_has_means_ranges_and_what_failed():
    values = dict.fromkeys(COLUMNS["digits"].values(), 1.0)
    values |= {key.replace("_student", "_teacher"): 0.5 for key in COLUMNS["digits"].values()}
    values |= {"minutes": 2.0, "peak_memory_gib": 0.5}
    values |= {"evaluations_student": 1, "evaluations_teacher": 35}
    other = values | {"recall_student": 2.0, "vendi_student": None}
    lines = table("digits", {"DMD": [values, other], "SiD": []}).splitlines()
    assert lines[0].startswith("| method | steps | pixels | features |")
    assert lines[2].startswith("| *teacher* | 35 | 0.5 |")
    assert lines[3] == "| DMD | 1 | 1 | 1 | 1 | 1.5 ± 0.5 | - | 2 | 0.5 |"
    assert lines[4].count("failed") == len(lines[0].split("|")) - 4
