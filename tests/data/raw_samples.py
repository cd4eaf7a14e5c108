"""Raw samples on disk: the same twelve images in each storage."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy
import torch
from PIL import Image
from safetensors.torch import save_file

COUNT, SIDE = 12, 8


def pixels(index: int, height: int = SIDE, width: int = SIDE) -> numpy.ndarray:
    """An image of its own for each index, uint8 [height, width, 3]."""
    return numpy.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=numpy.uint8)


def encoded(array: numpy.ndarray, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


def image_folder(folder: Path, classes: int = 3) -> Path:
    """Images in a sub-folder for each class; the class of image i is i // 4."""
    for index in range(COUNT):
        file = folder / f"class-{index * classes // COUNT}" / f"{index:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(pixels(index)))
    return folder


def tar(file: Path, members: dict[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


def tar_shards(folder: Path) -> Path:
    """Three shards of four images each, with class and caption."""
    for shard in range(3):
        members = {}
        for index in range(4 * shard, 4 * shard + 4):
            members[f"{index:04d}.png"] = encoded(pixels(index))
            members[f"{index:04d}.cls"] = str(index // 4).encode()
            members[f"{index:04d}.txt"] = f"image {index}".encode()
        tar(folder / f"shard-{shard}.tar", members)
    return folder


def array_files(folder: Path) -> Path:
    """Two safetensors files of uint8 images and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = torch.stack([torch.from_numpy(pixels(index)) for index in range(COUNT)])
    samples, labels = whole.permute(0, 3, 1, 2).contiguous(), torch.arange(COUNT) // 4
    for number, (first, last) in enumerate(((0, 5), (5, COUNT))):
        tensors = {"samples": samples[first:last], "labels": labels[first:last]}
        save_file(tensors, folder / f"part-{number}.safetensors")
    return folder
