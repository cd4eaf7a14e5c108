"""Folders that are whole or absent: committed by a manifest with checksums.

A folder is written under a temporary name, every file is forced to the disk, the manifest with the
size and SHA-256 of each file comes last, and one rename makes it visible. A folder whose manifest
or files do not fit is refused by name. Nothing is unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor

MANIFEST = "manifest.json"
FORMAT = 1


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
    partial = partial_name(path)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        entries = {}
        for name, group in tensors.items():
            file = partial / f"{name}.safetensors"
            entries[file.name] = write_tensors(file, _separate(group))
        for name, document in documents.items():
            file = partial / f"{name}.json"
            entries[file.name] = write_file(file, dump_document(document))
        write_manifest(partial, entries, FORMAT)
        replace_folder(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def partial_name(path: Path) -> Path:
    """Where a file or folder lies until it is whole."""
    return path.with_name(f".partial-{path.name}")


def write_tensors(
    file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> dict[str, Any]:
    """Write contiguous tensors and force them to the disk; the file's entry in a manifest."""
    try:
        save_file(tensors, file, metadata)
    except safetensors.SafetensorError as error:
        # safetensors hides the system's error number in its text.
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        number = int(code[1])
        raise OSError(number, os.strerror(number), str(file)) from error
    return _finish(file)


def dump_document(document: Any) -> str:
    """The text of a JSON document."""
    return json.dumps(document, indent=2) + "\n"


def write_file(file: Path, text: str) -> dict[str, Any]:
    """Write text and force it to the disk; the file's entry in a manifest."""
    file.write_text(text)
    return _finish(file)


def write_manifest(path: Path, entries: Mapping[str, Mapping[str, Any]], format: int) -> None:
    """Write the manifest, after every file that it names."""
    body = {"format": format, "files": dict(sorted(entries.items()))}
    write_file(path / MANIFEST, dump_document(body | {"sha256": _digest(body)}))
    _synchronise(path)


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is whole or absent."""
    partial = partial_name(path)
    partial.write_text(text)
    _synchronise(partial)
    partial.replace(path)


def check_folder(path: Path) -> None:
    """Verify a committed folder against its manifest.

    Raises:
        DamagedFolderError: naming the folder and the file that does not fit.
    """
    check_files(path, read_manifest(path, FORMAT))


def read_manifest(path: Path, format: int) -> dict[str, dict[str, Any]]:
    """The files of a committed folder, with the size and digest of each.

    Raises:
        DamagedFolderError: for a manifest that is missing, altered or of another format, and for
            tensors in the folder that it does not name.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        body = {key: manifest[key] for key in ("format", "files")}
        intact = manifest["sha256"] == _digest(body)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedFolderError(f"{path} has no readable {MANIFEST}: {error}") from error
    if not intact:
        raise DamagedFolderError(f"{path / MANIFEST} was altered: its checksum does not fit")
    if body["format"] != format:
        age = "an older" if body["format"] < format else "a newer"
        raise DamagedFolderError(
            f"{path} was made by {age} version of fastdistill: it has format {body['format']}, "
            f"this version reads {format}"
        )
    for file in path.glob("*.safetensors"):
        if file.name not in body["files"]:
            raise DamagedFolderError(f"{file} is foreign: the manifest does not name it")
    return body["files"]


def check_files(path: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Verify files of a folder against their entries in its manifest.

    Raises:
        DamagedFolderError: naming the first file that does not fit.
    """
    for name, expected in entries.items():
        file = path / name
        if not file.is_file():
            raise DamagedFolderError(f"{file} is missing")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise DamagedFolderError(f"{file} has {size} bytes, expected {expected['bytes']}")
        if _describe(file) != expected:
            raise DamagedFolderError(f"{file} was altered: its checksum does not fit")


def read_document(path: Path, name: str) -> Any:
    """One JSON document of a committed folder."""
    return json.loads((path / f"{name}.json").read_text())


def replace_folder(partial: Path, path: Path) -> None:
    """Rename over a folder that may exist: the old one is set aside first, then removed."""
    old = _old_name(path)
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


def replace_link(link: Path, target: str) -> None:
    """Let a symbolic link point to ``target``; at no moment does it point to nothing."""
    partial = partial_name(link)
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    if not link.is_symlink():
        remove_link(link)
    partial.replace(link)
    _synchronise(link.parent)


def remove_link(link: Path) -> None:
    """Remove a link, or the folder that copying made of it."""
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    else:
        link.unlink(missing_ok=True)


def remove_folders(paths: Iterable[Path]) -> None:
    """Remove committed folders; one that is half removed no longer looks like one."""
    for path in paths:
        partial = partial_name(path)
        path.rename(partial)
        shutil.rmtree(partial, ignore_errors=True)


def restore_folders(folder: Path) -> None:
    """Put back what was set aside for a new folder that never came, its writer being killed."""
    for old in folder.glob(".old-*"):
        path = folder / old.name.removeprefix(".old-")
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(path)


def remove_partial(folder: Path) -> None:
    """Remove the parts that killed writers left."""
    for partial in folder.glob(".partial-*"):
        if partial.is_dir() and not partial.is_symlink():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink()


def is_disk_full(error: OSError) -> bool:
    """Whether an error says that a disk or a quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


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


def _finish(file: Path) -> dict[str, Any]:
    _synchronise(file)
    return _describe(file)


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


def _old_name(path: Path) -> Path:
    return path.with_name(f".old-{path.name}")
