"""Checkpoints: folders of safetensors, committed by a manifest with checksums.

A folder is written under a temporary name, every file is forced to the disk, the manifest with the
size and SHA-256 of each file comes last, and one rename makes it visible. A folder whose manifest
or files do not fit is refused by name; `CheckpointStore.newest` then takes the one before. Nothing
is unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "manifest.json"
_FORMAT = 1


class DamagedFolderError(ValueError):
    """A committed folder that is truncated, altered or incomplete."""


def commit_folder(
    path: Path, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]
) -> None:
    """Write a folder of safetensors and JSON files so that it is whole or absent.

    Args:
        path: the folder; one that exists is replaced.
        tensors: tensors by name, by file name (without the extension).
        documents: JSON documents, by file name (without the extension).

    Raises:
        OSError: if the disk is full or not writable; nothing is left behind, and a folder that was
            there before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        for name, group in tensors.items():
            _save_tensors(_separate(group), partial / f"{name}.safetensors")
        for name, document in documents.items():
            (partial / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
        entries = {file.name: _describe(file) for file in sorted(partial.iterdir())}
        body = {"format": _FORMAT, "files": entries}
        (partial / MANIFEST).write_text(json.dumps(body | {"sha256": _digest(body)}, indent=2))
        for file in partial.iterdir():
            _synchronise(file)
        _synchronise(partial)
        _replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is whole or absent."""
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(text)
    _synchronise(partial)
    partial.replace(path)


def check_folder(path: Path) -> None:
    """Verify a committed folder against its manifest.

    Raises:
        DamagedFolderError: naming the folder and the file that does not fit.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        body = {key: manifest[key] for key in ("format", "files")}
        intact = manifest["sha256"] == _digest(body)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedFolderError(f"{path} has no readable {MANIFEST}: {error}") from error
    if not intact:
        raise DamagedFolderError(f"{path / MANIFEST} was altered: its checksum does not fit")
    if body["format"] != _FORMAT:
        raise DamagedFolderError(
            f"{path} has format {body['format']}, but this version of fastdistill reads {_FORMAT}"
        )
    for name, expected in body["files"].items():
        file = path / name
        if not file.is_file():
            raise DamagedFolderError(f"{file} is missing")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise DamagedFolderError(f"{file} has {size} bytes, expected {expected['bytes']}")
        if _describe(file) != expected:
            raise DamagedFolderError(f"{file} was altered: its checksum does not fit")


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """Tensors of one file of a committed folder."""
    return load_file(path / f"{name}.safetensors")


def read_document(path: Path, name: str) -> Any:
    """One JSON document of a committed folder."""
    return json.loads((path / f"{name}.json").read_text())


class Checkpoint(NamedTuple):
    """A verified checkpoint."""

    path: Path
    stage: str
    step: int


class CheckpointStore:
    """The checkpoints of a run, ``<stage>-<step>``, of which the newest few are kept.

    Args:
        folder: where they lie.
        stages: names of the run's stages in their order.
        keep: how many to keep of each stage.
        say: called with one line for each checkpoint that is refused.
    """

    def __init__(
        self, folder: Path, stages: tuple[str, ...], keep: int, say: Callable[[str], None] = print
    ) -> None:
        self.folder, self.stages, self.keep, self.say = folder, stages, keep, say

    def save(
        self,
        stage: str,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        documents: Mapping[str, Any],
    ) -> Path:
        """Commit a checkpoint, then drop the stage's oldest beyond ``keep``."""
        path = self.folder / f"{stage}-{step:09d}"
        commit_folder(path, tensors, documents)
        own = [checkpoint for checkpoint in self._listed() if checkpoint.stage == stage]
        for old in own[: -self.keep]:
            shutil.rmtree(old.path, ignore_errors=True)
        return path

    def newest(self) -> Checkpoint | None:
        """The newest intact checkpoint; damaged ones are named and passed over."""
        for checkpoint in reversed(self._listed()):
            try:
                check_folder(checkpoint.path)
            except DamagedFolderError as error:
                self.say(f"refusing checkpoint {checkpoint.path.name}: {error}")
                continue
            return checkpoint
        return None

    def _listed(self) -> list[Checkpoint]:
        """All committed checkpoints from the oldest to the newest."""
        found = []
        for path in self.folder.glob("*-*") if self.folder.is_dir() else ():
            match = re.fullmatch(r"(\w+)-(\d{9,})", path.name)
            if match and match[1] in self.stages and path.is_dir():
                found.append(Checkpoint(path, match[1], int(match[2])))
        return sorted(found, key=lambda entry: (self.stages.index(entry.stage), entry.step))


def _separate(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no storage, which safetensors refuses: tied weights, views."""
    seen: set[int] = set()
    separate = {}
    for key, value in group.items():
        value = value.detach().contiguous()
        storage = value.untyped_storage().data_ptr()
        separate[key] = value.clone() if storage in seen else value
        seen.add(storage)
    return separate


def _save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        save_file(tensors, file)
    except safetensors.SafetensorError as error:
        # safetensors hides the system's error number in its text.
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        number = int(code[1])
        raise OSError(number, os.strerror(number), str(file)) from error


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256") if hasattr(hashlib, "file_digest") else None
        if digest is None:  # Python 3.10
            digest = hashlib.sha256()
            while block := stream.read(1 << 20):
                digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(partial: Path, path: Path) -> None:
    """Rename over a folder that may exist: the old one is set aside first, then removed."""
    old = path.with_name(f".old-{path.name}")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    _synchronise(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def is_disk_full(error: OSError) -> bool:
    """Whether an error says that a disk or a quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
