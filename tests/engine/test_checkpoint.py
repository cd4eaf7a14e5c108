"""Checkpoints are whole or refused by name, and writing one never harms another."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch

from fastdistill.engine import checkpoint, folder
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
@pytest.mark.parametrize(
    "file", ["shard-00000-of-00001.safetensors", "state.json", "manifest.json"]
)
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


def test_a_save_holds_what_was_there_before_an_in_place_change(store, monkeypatch):
    """The writer is held back until the training has moved on."""
    go, write = threading.Event(), checkpoint.write_shard
    monkeypatch.setattr(checkpoint, "write_shard", lambda *args: go.wait() and write(*args))
    values = {"networks": {"a": torch.zeros(4)}}
    for step in (1, 2):  # the second time into the memory of the first
        path = store.save("distill", step, values, {})
        values["networks"]["a"] += 1
        assert not path.exists()
        go.set()
        store.wait()
        assert torch.equal(read_tensors(path, "networks")["a"], torch.full((4,), step - 1.0))
        go.clear()


def test_a_second_save_waits_for_the_first_and_memory_is_allocated_once(store):
    first = store.save("distill", 1, TENSORS, {})
    buffers = [value.data_ptr() for value in store._host._buffers.values()]
    store.save("distill", 2, TENSORS, {})
    assert (first / "manifest.json").exists()
    assert [value.data_ptr() for value in store._host._buffers.values()] == buffers
    store.wait()


def test_an_error_of_the_writer_surfaces_at_the_next_save_once(store, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_shard", fail)
        store.save("distill", 1, TENSORS, {})
        with pytest.raises(OSError, match="No space left"):
            store.save("distill", 2, TENSORS, {})
    save(store, step=3)
    assert store.newest().step == 3


def test_documents_are_taken_as_they_are_at_the_save(store):
    document = {"step": 1}
    path = store.save("distill", 1, TENSORS, {"state": document})
    document["step"] = 2
    store.wait()
    assert read_document(path, "state") == {"step": 1}


def test_tensors_are_filled_in_place(store):
    path = save(store)
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    load_(path, {"networks": {"a": parameter, "b": torch.tensor(0)}})
    assert torch.equal(parameter, TENSORS["networks"]["a"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"a": torch.zeros(2, 3)}, r"unknown: networks/b"),
        (dict.fromkeys("bcdef", torch.tensor(0)), r"missing: networks/c, .*/d, .*/e and 1 more"),
        (
            {"a": torch.zeros(3, 3), "b": torch.tensor(0)},
            r"networks/a \(saved torch.float32 \[2, 3\], here torch.float32 \[3, 3\]\)",
        ),
        ({"a": torch.zeros(2, 3), "b": torch.tensor(0.0)}, r"networks/b \(saved torch.int64"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(store, given, said):
    with pytest.raises(ValueError, match=said):
        load_(save(store), {"networks": given})


def test_a_group_that_is_not_asked_for_is_not_read(store):
    path = store.save("distill", 1, TENSORS | {"ema": {"a": torch.ones(1)}}, {}, wait=True)
    (ema := torch.zeros(1)).requires_grad_()
    load_(path, {"ema": {"a": ema}})
    assert ema == 1
    assert read_tensors(path, "metrics") == {}


def test_a_group_with_a_slash_in_its_name_is_refused(store):
    with pytest.raises(ValueError, match="slash"):
        store.save("distill", 1, {"a/b": {}}, {})


@pytest.mark.parametrize("keep", [1, 2])
def test_latest_always_points_to_a_whole_checkpoint(store, monkeypatch, keep):
    """Looked at before and after every change of a name, with steps repeated and in disorder."""
    store.keep = keep
    latest, broken = store.folder / "latest", []

    def watched(change):
        def look():
            if latest.is_symlink() and not (latest / "manifest.json").exists():
                broken.append(os.readlink(latest))

        def run(*args, **options):
            look()
            result = change(*args, **options)
            look()
            return result

        return run

    for name in ("rename", "replace", "unlink"):
        monkeypatch.setattr(Path, name, watched(getattr(Path, name)))
    monkeypatch.setattr(shutil, "rmtree", watched(shutil.rmtree))
    for step in (10, 20, 30, 40, 15, 40, 40):
        save(store, step=step)
        assert os.readlink(latest) == f"distill-{step:09d}"
        assert not broken


def test_everything_is_on_the_disk_before_the_name_changes_and_the_manifest_comes_last(
    store, monkeypatch
):
    events, fsync, rename = [], os.fsync, Path.rename

    def watched_fsync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def watched_rename(path, target):
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    name = save(store).name
    assert events == [
        "shard-00000-of-00001.safetensors",
        "state.json",
        "manifest.json",
        f".partial-{name}",
        "rename",
        "checkpoints",  # the name
        "checkpoints",  # the link
    ]


def test_a_copy_in_which_latest_became_a_folder_goes_on(store, tmp_path):
    save(store, step=1)
    copy = CheckpointStore(shutil.copytree(store.folder, tmp_path / "copy"), store.stages, 2)
    assert not (copy.folder / "latest").is_symlink()
    for step in (1, 2):
        save(copy, step=step)
        assert os.readlink(copy.folder / "latest") == f"distill-{step:09d}"


def test_a_run_resumed_from_before_damaged_checkpoints_keeps_what_it_saves(store):
    for step in (10, 20, 30):
        save(store, step=step)
    for step in (20, 30):
        _truncate(store.folder / f"distill-{step:09d}" / "manifest.json")
    for step in (11, 12):
        save(store, step=step)
        assert store.newest().step == step
    _truncate(store.folder / "distill-000000012" / "manifest.json")
    assert store.newest().step == 11


def test_a_folder_set_aside_for_one_that_never_came_is_put_back(store):
    path = save(store, step=1)
    path.rename(path.with_name(f".old-{path.name}"))
    assert store.newest().step == 1


def test_a_checkpoint_of_another_version_is_refused_by_name(store):
    commit_folder(store.folder / "distill-000000001", TENSORS, {})
    assert store.newest() is None
    assert "older version" in store.said[0]


def test_tensors_that_the_manifest_does_not_name_are_refused(store):
    path = save(store)
    shutil.copy(path / "shard-00000-of-00001.safetensors", path / "more.safetensors")
    assert store.newest() is None
    assert "more.safetensors is foreign" in store.said[0]


class _Bomb:
    def __reduce__(self):
        return os._exit, (13,)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "x.pt"])
def test_a_pickle_in_the_folder_is_never_opened(store, name):
    path = save(store)
    (path / name).write_bytes(pickle.dumps(_Bomb()))
    assert store.newest().path == path
    assert torch.equal(read_tensors(path, "networks")["a"], TENSORS["networks"]["a"])


def test_a_pickle_in_place_of_a_shard_is_refused(store):
    path = save(store)
    (path / "shard-00000-of-00001.safetensors").write_bytes(pickle.dumps(_Bomb()))
    assert store.newest() is None


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3, dtype=torch.int64),
        torch.tensor([1, 255], dtype=torch.uint8),
        torch.tensor([True, False]),
        torch.randn(3, 2).bfloat16(),
        torch.randn(3).half(),
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.zeros(0, 3),
        torch.tensor([float("nan"), -0.0]),
    ],
)
def test_every_kind_of_tensor_survives_bit_for_bit(store, tensor):
    path = store.save("distill", 1, {"g": {"x": tensor}}, {}, wait=True)
    read = read_tensors(path, "g")["x"]
    assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(_bits(read), _bits(tensor))


def _bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)
