"""`Source`: raw samples at random, and `open_source`, which finds what a path holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy
import torch
from torch import Tensor

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})


class Record(NamedTuple):
    """One raw sample."""

    name: str
    """Where it is, for messages."""
    content: bytes | Tensor | None = None
    """An image file's bytes, an array [C, H, W], or None where there is text alone."""
    text: str | None = None
    """Its caption or prompt."""
    label: int | None = None
    """Its class."""


class Source(Protocol):
    """Raw samples, each by its number; several threads may read at once."""

    labels: Tensor | None
    """Class of every sample, int64 [n]; None without classes."""

    def __len__(self) -> int: ...

    def record(self, index: int) -> Record:
        """The sample of this number.

        Raises:
            ValueError: naming the file that cannot be read.
        """

    def fingerprint(self) -> str:
        """A digest that differs for other samples or another order of them."""


def open_source(path: Path | str) -> Source:
    """The source at a path.

    Args:
        path: a text file of prompts (``.txt``, ``.jsonl``), a tar shard, a safetensors file of
            arrays, a folder of such shards or files, or a folder of images.

    Raises:
        ValueError: for a path that holds none of these, or more than one kind.
    """
    from fastdistill.data.array_files import ArrayFiles
    from fastdistill.data.image_folder import ImageFolder
    from fastdistill.data.prompts import Prompts
    from fastdistill.data.tar_shards import TarShards

    path = Path(path)
    if path.is_dir():
        tars, arrays = sorted(path.glob("*.tar")), sorted(path.glob("*.safetensors"))
        if tars and arrays:
            raise ValueError(f"{path} holds .tar and .safetensors files; expected one kind")
        if tars:
            return TarShards(tars)
        return ArrayFiles(arrays) if arrays else ImageFolder(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.suffix in (".txt", ".jsonl"):
        return Prompts(path)
    if path.suffix == ".tar":
        return TarShards([path])
    if path.suffix == ".safetensors":
        return ArrayFiles([path])
    raise ValueError(
        f"{path} is no source of samples; expected a folder of images, .tar shards (uncompressed), "
        ".safetensors files, or a .txt or .jsonl file of prompts"
    )


def read_file(path: Path) -> bytes:
    """All bytes of a file, or a ValueError that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def decode_text(content: bytes, name: str) -> str:
    """UTF-8 text, or a ValueError that names where it is."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}") from error


def read_json_lines(path: Path) -> list[dict]:
    """The objects of a .jsonl file; blank lines are left out."""
    rows = []
    for number, line in enumerate(decode_text(read_file(path), str(path)).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is {line[:40]!r}; expected an object")
        rows.append(row)
    return rows


def as_label(value: object, name: str) -> int:
    """A class as a number from 0, or a ValueError that names where it is."""
    try:
        label = int(str(value).strip())
    except ValueError:
        label = -1
    if label < 0:
        raise ValueError(f"{name} has label {value!r}; expected a whole number from 0")
    return label


def labels_of(names: Iterable[str], labels: Sequence[int | None]) -> Tensor | None:
    """All labels, or None where no sample has one.

    Raises:
        ValueError: naming the first sample without a label where others have one.
    """
    if all(label is None for label in labels):
        return None
    for name, label in zip(names, labels, strict=True):
        if label is None:
            raise ValueError(f"{name} has no label, but other samples have one")
    return torch.tensor(labels, dtype=torch.int64)


def read_array(content: bytes, name: str) -> Tensor:
    """The array of a .npy file, never unpickled."""
    import io

    try:
        return torch.from_numpy(numpy.load(io.BytesIO(content), allow_pickle=False))
    except (ValueError, EOFError, OSError, TypeError) as error:
        raise ValueError(f"{name} is no array that can be read: {error}") from error


def digest(parts: Iterable[object]) -> str:
    """SHA-256 of the texts of parts."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
