"""`ArrayFiles`: samples that lie in safetensors files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastdistill.data.sources import Record, digest
from fastdistill.data.tensor_files import TensorFiles


class ArrayFiles:
    """Arrays of safetensors files: ``samples`` [n, C, H, W] and, if there are classes, ``labels``.

    Samples of dtype uint8 are pixels; floats are taken as the denoiser sees them.

    Args:
        files: the files, in order.

    Raises:
        ValueError: where names or shapes are others, naming the file.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files, self._tensors = list(files), TensorFiles(files)
        names = set(self._tensors.shapes)
        if "samples" not in names or names - {"samples", "labels"}:
            raise ValueError(
                f"{files[0]} holds {', '.join(sorted(names))}; expected samples, and labels if "
                "there are classes"
            )
        self.labels = self._tensors.whole("labels").long() if "labels" in names else None
        if self.labels is not None and (self.labels.dim() != 1 or int(self.labels.min()) < 0):
            raise ValueError(f"{files[0]}: expected labels from 0, one for each sample")

    def __len__(self) -> int:
        return len(self._tensors)

    def record(self, index: int) -> Record:
        sample = self._tensors.read("samples", [index])[0]
        label = None if self.labels is None else int(self.labels[index])
        return Record(f"{self._files[0].parent}, sample {index}", sample, label=label)

    def fingerprint(self) -> str:
        return digest((file.name, file.stat().st_size) for file in self._files)
