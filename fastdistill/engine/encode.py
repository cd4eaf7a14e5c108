"""`encode`: latents and embeddings of a source, computed before the training.

Shards are committed one by one, so that an encode that was killed continues at the next shard and
ends with the same bytes. Several processes, as torchrun starts them, share the shards and the
folder, and exchange nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastdistill.data.encoded import INDEX, EncodedData
from fastdistill.data.images import Decoder, count_classes
from fastdistill.data.pixels import Decoded
from fastdistill.data.sources import Source, open_source
from fastdistill.engine.encoded_writer import EncodedWriter, check_finite, verify_encoded
from fastdistill.engine.encoders import SIZES, Encoder, PipelineEncoder, PixelEncoder

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
POSTERIORS = ("sample", "mean")


@dataclass(frozen=True)
class EncodeSettings:
    """What determines an encoded set, besides source and teacher."""

    size: int | None = None
    """Height and width of the images; the teacher's own if None."""
    dtype: str = "float16"
    """Storage of latents and embeddings."""
    shard_size: int = 1024
    """Samples of a shard."""
    precision: str = "float32"
    """What the text encoders compute in."""
    posterior: str = "sample"
    """Which latents: a sample of the VAE's posterior, or its mean."""
    seed: int = 0
    """Seed of the posterior's samples."""
    max_length: int | None = None
    """Tokens of a prompt, for T5; the pipeline's own number if None."""
    guidance: float = 3.5
    """What a Flux model with embedded guidance is told."""

    def __post_init__(self) -> None:
        for name, known in (
            ("dtype", DTYPES),
            ("precision", DTYPES),
            ("posterior", POSTERIORS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {', '.join(known)}")


@dataclass(frozen=True)
class Place:
    """Where an encode runs: nothing here changes the set, but for rounding."""

    device: torch.device | str = "cpu"
    batch_size: int = 4
    """Samples that the networks take at once."""
    workers: int = 4
    """Threads that decode images."""
    rank: int = 0
    """Number of this process."""
    ranks: int = 1
    """Processes that share the shards."""

    @classmethod
    def of_process(cls, device: torch.device, batch_size: int = 4, workers: int = 4) -> Place:
        """Where this process runs, one of those that ``torchrun`` started or alone."""
        rank, ranks = (int(os.environ.get(name, x)) for name, x in (("RANK", 0), ("WORLD_SIZE", 1)))
        if device == torch.device("cuda"):
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        return cls(device, batch_size, workers, rank, ranks)


def encode(
    source: Source | Path | str,
    to: Path | str,
    teacher: Path | str | None = None,
    settings: EncodeSettings | None = None,
    place: Place | None = None,
    say: Callable[[str], None] = print,
) -> bool:
    """Encode a source into a folder that `fastdistill.data.EncodedData` reads.

    Args:
        source: a `Source`, or a path that `open_source` knows.
        to: the folder, made if absent; an encode that was begun in it is continued.
        teacher: a pipeline's folder or its name on the Hub; None keeps pixels, for models of them.
        settings: what determines the set.
        place: where it runs.
        say: called with each line for the screen.

    Returns:
        Whether the set is finished; other processes may still be at work.

    Raises:
        ValueError: naming what cannot be used: source, record, teacher or folder.
        BlockingIOError: where another process encodes the same share into the folder.
    """
    settings, place = settings or EncodeSettings(), place or Place()
    source = open_source(source) if isinstance(source, (Path, str)) else source
    encoder = _encoder(teacher, source, settings, place)
    labels = _labels(source, encoder)
    writer = EncodedWriter(
        to,
        len(source),
        encoder.shape,
        shard_size=settings.shard_size,
        classes=labels.classes,
        null=_stored(encoder.null | labels.null, settings),
        facts={"source": source.fingerprint(), "dtype": settings.dtype, **encoder.facts},
        rank=place.rank,
    )
    with _alone(writer.folder, place.rank):
        mine = [shard for shard in writer.missing if shard % place.ranks == place.rank]
        if mine:
            _encode_shards(source, encoder, labels, writer, mine, settings, place, say)
        elif (writer.folder / INDEX).exists():
            verify_encoded(writer.folder)
        return _finish(writer, say)


@dataclass(frozen=True)
class _Labels:
    """Labels of a set, if its denoiser is told classes."""

    values: Tensor | None
    classes: int

    @property
    def null(self) -> dict[str, Tensor]:
        return {} if self.values is None else {"labels": torch.tensor([self.classes])}


def _labels(source: Source, encoder: Encoder) -> _Labels:
    if encoder.null:  # texts
        return _Labels(None, 0)
    if encoder.classes is not None and source.labels is None:
        raise ValueError(
            f"{source.record(0).name} has no label, but the teacher is told classes; sort images "
            "into a folder for each class, or give labels"
        )
    return _Labels(source.labels, count_classes(source, encoder.classes))


def _encoder(
    teacher: Path | str | None, source: Source, settings: EncodeSettings, place: Place
) -> Encoder:
    if teacher is None:
        if settings.size is None:
            raise ValueError("without a teacher, size must say the height and width of the images")
        return PixelEncoder(settings.size)
    options = asdict(settings)
    for name in ("dtype", "shard_size"):
        del options[name]
    options["precision"] = DTYPES[settings.precision]
    has_content = source.record(0).content is not None
    return PipelineEncoder(teacher, images=has_content, device=place.device, **options)


def _encode_shards(
    source: Source,
    encoder: Encoder,
    labels: _Labels,
    writer: EncodedWriter,
    shards: list[int],
    settings: EncodeSettings,
    place: Place,
    say: Callable[[str], None],
) -> None:
    begin, done = time.perf_counter(), 0
    total = sum(len(writer.rows(shard)) for shard in shards)
    with Decoder(source, encoder.size, place.workers) as decoder:
        for shard in shards:
            rows = writer.rows(shard)
            batches = [
                rows[at : at + place.batch_size] for at in range(0, len(rows), place.batch_size)
            ]
            parts = [
                _encode_batch(encoder, decoded, batch.start, settings)
                for batch, decoded in zip(batches, decoder.batches(batches), strict=True)
            ]
            tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            if labels.values is not None:
                tensors["labels"] = labels.values[rows.start : rows.stop]
            writer.write(shard, tensors)
            done += len(rows)
            rate = done / (time.perf_counter() - begin)
            left = (total - done) / rate
            say(f"shard {shard}: {done} of {total} samples, {rate:.3g} a second, {left:.0f} s left")


def _encode_batch(
    encoder: Encoder, decoded: list[Decoded], first: int, settings: EncodeSettings
) -> dict[str, Tensor]:
    rows = _stored(encoder.encode(decoded, first), settings)
    for name, value in rows.items():
        check_finite(name, value, [one.record.name for one in decoded])
    return rows


def _stored(rows: dict[str, Tensor], settings: EncodeSettings) -> dict[str, Tensor]:
    """Rows in the storage dtype; sizes keep theirs, integers too."""
    return {
        name: value.to(DTYPES[settings.dtype])
        if value.is_floating_point() and name not in SIZES
        else value
        for name, value in rows.items()
    }


def _finish(writer: EncodedWriter, say: Callable[[str], None]) -> bool:
    if not writer.finish():
        say(f"{len(writer.missing)} shards are still to be encoded by other processes")
        return False
    data = EncodedData(writer.folder)
    say(f"{len(data)} samples of shape {list(data.shape)} are in {writer.folder}")
    return True


@contextlib.contextmanager
def _alone(folder: Path, rank: int) -> Iterator[None]:
    """Keep a second process with the same share out of the folder."""
    path = folder / f".lock-{rank}"
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, f"another process encodes into {folder}") from None
        yield
