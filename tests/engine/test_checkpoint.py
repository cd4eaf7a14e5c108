"""Checkpoints are whole or refused by name, and writing one never harms another."""

from __future__ import annotations

import errno
import json

import pytest
import torch

from fastdistill.engine import checkpoint, folder, shards
from fastdistill.engine.checkpoint import CheckpointStore
from fastdistill.engine.folder import (
    DamagedFolderError,
    check_folder,
    commit_folder,
    read_document,
)
from fastdistill.engine.shards import load_, read_tensors

TENSORS = {"networks": {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7)}}


@pytest.fixture
def store(tmp_path):
    said: list[str] = []
    made = CheckpointStore(
        tmp_path / "checkpoints", ("teacher", "distill"), keep=2, say=said.append
    )
    made.said = said
    return made


def save(store, stage="distill", step=1):
    return store.save(stage, step, TENSORS, {"state": {"step": step}}, wait=True)


def test_what_is_saved_is_read_back(tmp_path):
    commit_folder(tmp_path / "x", TENSORS, {"state": {"step": 3}})
    check_folder(tmp_path / "x")
    read = read_tensors(tmp_path / "x", "networks")
    assert all(torch.equal(read[name], value) for name, value in TENSORS["networks"].items())
    assert read_document(tmp_path / "x", "state") == {"step": 3}


def test_newest_is_by_stage_then_step_and_old_ones_go(store):
    for stage, step in (("distill", 5), ("teacher", 90), ("distill", 20), ("distill", 100)):
        save(store, stage, step)
    assert (store.newest().stage, store.newest().step) == ("distill", 100)
    left = sorted(path.name for path in store.folder.iterdir())
    assert left == ["distill-000000020", "distill-000000100", "latest", "teacher-000000090"]


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def _flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_truncate, _flip_a_bit, lambda path: path.unlink()])
@pytest.mark.parametrize("file", ["shard-00000-of-00001.safetensors", "state.json", "manifest.json"])
def test_a_damaged_newest_checkpoint_is_refused_by_name_and_the_one_before_used(
    store, damage, file
):
    save(store, step=1)
    damage(save(store, step=2) / file)
    assert store.newest().step == 1
    assert "distill-000000002" in store.said[0]


def test_a_manifest_that_was_edited_is_refused(tmp_path):
    commit_folder(tmp_path / "x", TENSORS, {})
    path = tmp_path / "x" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = {}
    path.write_text(json.dumps(manifest))
    with pytest.raises(DamagedFolderError, match="checksum"):
        check_folder(tmp_path / "x")


def test_all_damaged_means_none(store):
    _truncate(save(store) / "manifest.json")
    assert store.newest() is None


@pytest.mark.parametrize(
    ("module", "failing"),
    [
        (folder, "save_file"),
        (folder, "_synchronise"),
        (checkpoint, "write_file"),
        (checkpoint, "replace_folder"),
    ],
)
def test_a_full_disk_leaves_the_checkpoints_before_and_no_litter(
    store, monkeypatch, module, failing
):
    save(store, step=1)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        save(store, step=2)
    assert sorted(path.name for path in store.folder.iterdir()) == ["distill-000000001", "latest"]
    assert store.newest().step == 1


def test_replacing_a_folder_keeps_the_old_one_if_the_new_one_fails(tmp_path, monkeypatch):
    commit_folder(tmp_path / "x", {}, {"state": 1})
    original = folder._synchronise
    monkeypatch.setattr(folder, "_synchronise", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        commit_folder(tmp_path / "x", {}, {"state": 2})
    monkeypatch.setattr(folder, "_synchronise", original)
    assert read_document(tmp_path / "x", "state") == 1
    commit_folder(tmp_path / "x", {}, {"state": 3})
    assert read_document(tmp_path / "x", "state") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_partial_folder_of_a_killed_process_is_ignored_and_replaced(store):
    partial = store.folder / ".partial-distill-000000001"
    partial.mkdir(parents=True)
    (partial / "rubbish").write_text("x")
    assert store.newest() is None
    save(store, step=1)
    assert store.newest().step == 1
    assert not partial.exists()


def test_weights_that_share_memory_are_saved(tmp_path):
    shared = torch.arange(4.0)
    commit_folder(tmp_path / "x", {"networks": {"a": shared, "b": shared}}, {})
    assert torch.equal(read_tensors(tmp_path / "x", "networks")["b"], shared)
