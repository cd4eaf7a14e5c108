"""`Prompts`: a text file of prompts."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from fastdistill.data.sources import Record, decode_text, digest, read_file, read_json_lines


class Prompts:
    """Prompts of a file, one a line; blank lines are left out.

    Args:
        path: a ``.txt`` file, or a ``.jsonl`` file of objects with ``text``.

    Raises:
        ValueError: for a file without prompts, or a line that has none.
    """

    labels: Tensor | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.suffix == ".jsonl":
            rows = read_json_lines(path)
            for number, row in enumerate(rows, 1):
                if not isinstance(row.get("text"), str):
                    raise ValueError(f"{path}, object {number} has no text")
            self._texts = [row["text"] for row in rows]
        else:
            lines = decode_text(read_file(path), str(path)).splitlines()
            self._texts = [line.strip() for line in lines if line.strip()]
        if not self._texts:
            raise ValueError(f"{path} holds no prompts; expected one a line")

    def __len__(self) -> int:
        return len(self._texts)

    def record(self, index: int) -> Record:
        return Record(f"{self.path}, prompt {index + 1}", text=self._texts[index])

    def fingerprint(self) -> str:
        return digest(map(repr, self._texts))
