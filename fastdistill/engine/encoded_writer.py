"""`EncodedWriter`: writes what `fastdistill.data.EncodedData` reads, shard by shard.

Each file is written under a temporary name, forced to the disk and renamed. A shard's size and
digest stand beside it until all shards are there; then the index, which makes the set visible, is
written. Nothing is said between processes that share a folder: whoever finds all shards there
writes the index, and all would write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fastdistill.data.encoded import FORMAT, INDEX, NULL, PLAN
from fastdistill.engine.folder import (
    check_files,
    dump_document,
    partial_name,
    write_tensors,
    write_text,
)

Entry = dict[str, Any]


class EncodedWriter:
    """A folder that becomes an encoded set; one that was begun is continued.

    Args:
        folder: the set, made if absent.
        samples: number of samples.
        shape: shape of one sample, as the denoiser sees it.
        shard_size: samples of a shard.
        classes: number of classes, for sets with ``labels``.
        null: the null condition, one row [1, ...] of each condition that has one.
        facts: whatever else the index shall say; a set is continued with the same alone.
        rank: number of this process among those that share the folder.

    Raises:
        ValueError: where the folder holds something else, or a set that was begun differently.
    """

    def __init__(
        self,
        folder: Path | str,
        samples: int,
        shape: tuple[int, ...],
        *,
        shard_size: int = 1024,
        classes: int = 0,
        null: Mapping[str, Tensor] | None = None,
        facts: Mapping[str, Any] | None = None,
        rank: int = 0,
    ) -> None:
        self.folder, self.rank = Path(folder), rank
        self.samples, self.shard_size = samples, shard_size
        null = dict(sorted((null or {}).items()))
        self._plan = {
            "format": FORMAT,
            "samples": samples,
            "shape": list(shape),
            "classes": classes,
            "shard_size": shard_size,
            **(facts or {}),
            "null_condition": _digest(null),
        }
        self._begin(null)

    @property
    def missing(self) -> list[int]:
        """Numbers of the shards that are not there yet, or have another size than was written."""
        return [number for number, entry in enumerate(self._entries()) if entry is None]

    def rows(self, shard: int) -> range:
        """Numbers of a shard's samples."""
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.samples))

    def write(self, shard: int, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard: ``samples``, ``labels`` and conditions, one row for each of `rows`.

        Raises:
            ValueError: for another number of rows, and values that are not finite.
            OSError: if the disk is full; shards that are there stay.
        """
        rows = self.rows(shard)
        for name, value in tensors.items():
            if len(value) != len(rows):
                raise ValueError(f"shard {shard} has {len(value)} {name}, expected {len(rows)}")
            check_finite(name, value, [f"sample {row}" for row in rows])
        file = self.folder / _shard_name(shard)
        partial = partial_name(file)
        try:
            entry = write_tensors(partial, _contiguous(tensors))
            write_text(_entry_file(file), dump_document(entry))
            partial.replace(file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def finish(self) -> bool:
        """Write the index if every shard is there; whether the set is finished."""
        entries = self._entries()
        if None in entries:
            return False
        files = [self.folder / _shard_name(number) for number in range(len(entries))]
        shards = [
            {"file": file.name, "rows": len(self.rows(number)), **(entry or {})}
            for number, (file, entry) in enumerate(zip(files, entries, strict=True))
        ]
        index = self._plan | {"shards": shards, "null": self._null_entry()}
        self._write_shared(self.folder / INDEX, dump_document(index).encode())
        for file in files:
            _entry_file(file).unlink(missing_ok=True)
        return True

    def _begin(self, null: dict[str, Tensor]) -> None:
        """Take the folder, or find that it was taken for the same."""
        self.folder.mkdir(parents=True, exist_ok=True)
        plan = self.folder / PLAN
        found = {path.name for path in self.folder.iterdir() if not path.name.startswith(".")}
        if not found:
            self._write_shared(plan, dump_document(self._plan).encode())
        elif not plan.exists():
            raise ValueError(f"{self.folder} holds other things; choose an empty or new folder")
        _check_same(self.folder, json.loads(plan.read_text()), self._plan)
        if null and not (self.folder / NULL).exists():
            self._write_shared(self.folder / NULL, save(null))

    def _write_shared(self, file: Path, content: bytes) -> None:
        """Write a small file that every process would write alike; it is whole or absent."""
        partial = file.with_name(f".partial-{self.rank}-{file.name}")
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)

    def _entries(self) -> list[Entry | None]:
        """Size and digest of each shard that is there and has that size."""
        count = -(-self.samples // self.shard_size)
        index = self.folder / INDEX
        listed = json.loads(index.read_text())["shards"] if index.exists() else [None] * count
        return [self._entry(number, listed[number]) for number in range(count)]

    def _entry(self, shard: int, listed: Entry | None) -> Entry | None:
        file = self.folder / _shard_name(shard)
        try:
            found = json.loads(_entry_file(file).read_text())
        except FileNotFoundError:
            found = listed and {name: listed[name] for name in ("bytes", "sha256")}
        whole = found and file.exists() and file.stat().st_size == found["bytes"]
        return found if whole else None

    def _null_entry(self) -> Entry | None:
        file = self.folder / NULL
        if not file.exists():
            return None
        content = file.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        return {"file": NULL, "bytes": len(content), "sha256": digest}


def verify_encoded(folder: Path | str) -> None:
    """Read every file of a finished set and compare its digest.

    Raises:
        DamagedFolderError: naming the first file that is missing, truncated or altered.
    """
    index = json.loads((Path(folder) / INDEX).read_text())
    for entry in [*index["shards"], *filter(None, [index["null"]])]:
        check_files(Path(folder), {entry["file"]: {key: entry[key] for key in ("bytes", "sha256")}})


def check_finite(kind: str, values: Tensor, names: Sequence[str]) -> None:
    """Raise a ValueError that names the first sample with nan or infinite values.

    Args:
        kind: what the values are.
        values: one row for each sample  # [n, ...]
        names: of the samples.
    """
    if not values.is_floating_point():
        return
    finite = torch.isfinite(values).reshape(len(values), -1).all(1)
    broken = (~finite).nonzero().flatten()
    if len(broken):
        dtype = str(values.dtype).removeprefix("torch.")
        raise ValueError(
            f"{names[int(broken[0])]} has {kind} with nan or infinite values in {dtype}; if "
            "float16 cannot hold them, take bfloat16 or float32"
        )


def _shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def _entry_file(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.json")


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in sorted(tensors.items())}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for name, value in tensors.items():
        whole.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        whole.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def _check_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    wanted = json.loads(json.dumps(wanted))
    for name in wanted.keys() | found.keys():
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{folder} was begun with {name} {found.get(name)}, but now it is "
                f"{wanted.get(name)}; continue it with the same, or choose another folder"
            )
