"""`TarShards`: WebDataset shards, read at random through an index of each.

A shard is a plain tar whose neighbouring members of one key are a sample: ``key.jpg`` (or jpeg,
png, webp, or an array ``key.npy``) with ``key.txt``, ``key.cls`` or ``key.json``. The index, made
once, lies beside the shard (``NAME.tar.index.npz``) where that folder can be written.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import os
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdistill.data.sources import (
    IMAGE_SUFFIXES,
    Record,
    as_label,
    decode_text,
    digest,
    labels_of,
    read_array,
)

CONTENTS = (*sorted(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES), "npy")
PARTS = (*CONTENTS, "txt", "cls", "json")
FORMAT = 1

Index = dict[str, NDArray]
"""``keys``; ``spans``, first byte and size of each of PARTS (-1 without) [n, 9, 2]; ``labels``."""


class TarShards:
    """Samples of WebDataset shards, one shard after the other.

    Args:
        files: uncompressed tar files, in order.

    Raises:
        ValueError: naming a shard that is truncated, compressed or empty, and a sample that is
            incomplete.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = list(files)
        self._indices = [_index(file) for file in self._files]
        self._ends = list(itertools.accumulate(len(index["keys"]) for index in self._indices))
        self.labels = self._labels()

    def __len__(self) -> int:
        return self._ends[-1]

    def record(self, index: int) -> Record:
        file, parts, row = self._find(index)
        spans, key = parts["spans"][row], parts["keys"][row].decode()
        kind = next(kind for kind in CONTENTS if spans[PARTS.index(kind), 0] >= 0)
        content, name = _read(file, spans[PARTS.index(kind)]), f"{file}, member {key}.{kind}"
        return Record(
            name,
            read_array(content, name) if kind == "npy" else content,
            _caption(file, key, spans),
            None if self.labels is None else int(self.labels[index]),
        )

    def fingerprint(self) -> str:
        return digest((file.name, file.stat().st_size) for file in self._files)

    def _find(self, index: int) -> tuple[Path, Index, int]:
        shard = bisect.bisect_right(self._ends, index)
        first = self._ends[shard - 1] if shard else 0
        return self._files[shard], self._indices[shard], index - first

    def _labels(self) -> Tensor | None:
        labels = numpy.concatenate([index["labels"] for index in self._indices])
        if not (labels < 0).any():
            return torch.from_numpy(labels)
        found = [None if label < 0 else int(label) for label in labels]
        return labels_of((self._name(index) for index in range(len(self))), found)

    def _name(self, index: int) -> str:
        file, parts, row = self._find(index)
        return f"{file}, sample {parts['keys'][row].decode()}"


def _index(file: Path) -> Index:
    """The index of a shard: read where it fits, else made and kept."""
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    state = file.stat()
    stamp = numpy.array([FORMAT, state.st_size, state.st_mtime_ns])
    kept = file.with_name(f"{file.name}.index.npz")
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        found = dict(numpy.load(kept, allow_pickle=False))
        if numpy.array_equal(found.pop("stamp"), stamp):
            return found
    made = _scan(file)
    partial = file.with_name(f".partial-{os.getpid()}-{kept.name}")
    with contextlib.suppress(OSError):  # a folder that cannot be written: indexed at every start
        with partial.open("wb") as stream:
            numpy.savez(stream, **{"stamp": stamp, **made})  # type: ignore[arg-type]
        partial.replace(kept)
    return made


def _scan(file: Path) -> Index:
    keys, spans, labels = [], [], []
    for key, members in itertools.groupby(_members(file), lambda member: member[0]):
        parts = {kind: span for _, kind, span in members}
        if not any(kind in parts for kind in CONTENTS):
            raise ValueError(
                f"{file}, sample {key} has {', '.join(sorted(parts))}, but no image; expected one "
                f"of {', '.join(CONTENTS)}"
            )
        keys.append(key.encode())
        spans.append([parts.get(kind, (-1, 0)) for kind in PARTS])
        labels.append(_label(file, key, parts))
    if not keys:
        raise ValueError(f"{file} holds no samples")
    return {
        "keys": numpy.array(keys),
        "spans": numpy.array(spans, dtype=numpy.int64),
        "labels": numpy.array(labels, dtype=numpy.int64),
    }


def _members(file: Path) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Key, kind, and first byte and size of each member that is part of a sample."""
    end = 0
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                end = member.offset_data + -(-member.size // 512) * 512
                path = PurePosixPath(member.name)
                stem, _, kind = path.name.partition(".")
                if member.isfile() and stem and not path.name.startswith("__"):
                    yield str(path.with_name(stem)), kind.lower(), (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(
            f"{file} is truncated, compressed or no tar: {error}; make it again, uncompressed"
        ) from error
    if _read(file, (end, 512)) != bytes(512):  # where tarfile, meeting what is no header, stops too
        raise ValueError(f"{file} is damaged at byte {end}; make it again")


def _label(file: Path, key: str, parts: dict[str, tuple[int, int]]) -> int:
    """The class of a sample, -1 without one."""
    if "cls" in parts:
        name = f"{file}, member {key}.cls"
        return as_label(decode_text(_read(file, parts["cls"]), name), name)
    facts = _facts(file, key, parts.get("json", (-1, 0)))
    return -1 if facts.get("label") is None else as_label(facts["label"], f"{file}, {key}.json")


def _caption(file: Path, key: str, spans: NDArray) -> str | None:
    text, facts = spans[PARTS.index("txt")], spans[PARTS.index("json")]
    if text[0] >= 0:
        return decode_text(_read(file, text), f"{file}, member {key}.txt").strip()
    found = _facts(file, key, facts)
    return found.get("text", found.get("caption"))


def _facts(file: Path, key: str, span: Sequence[int] | NDArray) -> dict:
    if span[0] < 0:
        return {}
    name = f"{file}, member {key}.json"
    try:
        facts = json.loads(decode_text(_read(file, span), name))
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{name} holds no object")
    return facts


def _read(file: Path, span: Sequence[int] | NDArray) -> bytes:
    try:
        with file.open("rb", buffering=0) as stream:
            content = os.pread(stream.fileno(), int(span[1]), int(span[0]))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    if len(content) != span[1]:
        raise ValueError(
            f"{file} is truncated: it ends before byte {int(span[0]) + int(span[1])}; make it again"
        )
    return content
