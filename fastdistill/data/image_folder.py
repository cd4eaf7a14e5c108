"""`ImageFolder`: images in a folder, with classes or captions."""

from __future__ import annotations

from pathlib import Path

from fastdistill.data.sources import (
    IMAGE_SUFFIXES,
    Record,
    as_label,
    decode_text,
    digest,
    labels_of,
    read_array,
    read_file,
    read_json_lines,
)

METADATA = "metadata.jsonl"
_SUFFIXES = IMAGE_SUFFIXES | {".npy"}


class ImageFolder:
    """Images of a folder and its sub-folders, sorted by name.

    With a ``metadata.jsonl`` of objects with ``file_name`` and ``text`` or ``label``, as
    Hugging Face's imagefolder has it, these files alone, in its order. Else a ``NAME.txt`` beside
    an image is its caption; and where there are no captions and every image lies in a sub-folder,
    sub-folders of the first level are the classes, in the order of their names.

    Arrays (``.npy``) may stand for images.

    Args:
        path: the folder.

    Raises:
        ValueError: for a folder without images, and naming the file that is missing or unlabelled.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if (path / METADATA).is_file():
            rows = read_json_lines(path / METADATA)
            self._files = [self._listed(row) for row in rows]
            self._texts: list[str | None] | None = [_text(row, path) for row in rows]
            labels = [row.get("label") for row in rows]
            found = [None if label is None else _label(label, path) for label in labels]
            self.labels = labels_of(map(str, self._files), found)
        else:
            every = sorted(path.rglob("*"))
            self._files = [file for file in every if file.suffix.lower() in _SUFFIXES]
            self._captions = {file for file in every if file.suffix == ".txt"}
            self._texts = None
            self.labels = labels_of(map(str, self._files), self._folders())
        if not self._files:
            raise ValueError(
                f"{path} holds no samples; expected images ({', '.join(sorted(IMAGE_SUFFIXES))}), "
                f".npy arrays, .tar shards or .safetensors files"
            )

    def __len__(self) -> int:
        return len(self._files)

    def record(self, index: int) -> Record:
        file = self._files[index]
        content = read_file(file)
        is_array = file.suffix.lower() == ".npy"
        return Record(
            str(file),
            read_array(content, str(file)) if is_array else content,
            self._text_of(index),
            None if self.labels is None else int(self.labels[index]),
        )

    def fingerprint(self) -> str:
        files = [(file.relative_to(self.path), file.stat().st_size) for file in self._files]
        texts = [self._text_of(index) for index in range(len(self))]
        labels = [] if self.labels is None else self.labels.tolist()
        return digest((*files, *map(repr, texts), *labels))

    def _listed(self, row: dict) -> Path:
        name = row.get("file_name")
        if not isinstance(name, str):
            raise ValueError(f"{self.path / METADATA} has an object without file_name: {row}")
        file = self.path / name
        if not file.is_file():
            raise ValueError(f"{file} is missing, but {METADATA} names it")
        return file

    def _folders(self) -> list[int] | list[None]:
        """Class of each image by its sub-folder, or none."""
        parts = [file.relative_to(self.path).parts for file in self._files]
        has_captions = any(file.with_suffix(".txt") in self._captions for file in self._files)
        if has_captions or any(len(part) < 2 for part in parts):
            return [None] * len(self._files)
        number = {name: index for index, name in enumerate(sorted({part[0] for part in parts}))}
        return [number[part[0]] for part in parts]

    def _text_of(self, index: int) -> str | None:
        if self._texts is not None:
            return self._texts[index]
        file = self._files[index].with_suffix(".txt")
        if file not in self._captions:
            return None
        return decode_text(read_file(file), str(file)).strip()


def _text(row: dict, path: Path) -> str | None:
    text = row.get("text")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{path / METADATA}: {row['file_name']} has text {text!r}")
    return text


def _label(value: object, path: Path) -> int:
    return as_label(value, str(path / METADATA))
