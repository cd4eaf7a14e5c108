"""The page of how long a training step waits for its data, to standard output.

python -m bench.data_loading > docs/results/data.md

Two data sets are written into a temporary folder: an encoded set of SDXL's size (latents
4 x 128 x 128, embeddings 77 x 2048, pooled 1280, float16) and tar shards of JPEG photographs. A
step stands for one on a GPU: the host waits (sleeps), or launches kernels all the while (a fixed
number of small torch calls, which hold Python's lock for most of the time, as launching does).
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy
import torch
from PIL import Image

from bench import machine
from fastdistill.data import Data, EncodedData, ImageData, Prefetched
from fastdistill.engine.encoded_writer import EncodedWriter

INTRODUCTION = """\
# How long a step waits for its data

{facts}

Measured by `{command}`.

- *alone*: milliseconds a step without data. The host *waits* for the device (sleeps), or
  *launches* kernels all the while: a fixed number of small torch calls, which hold Python's lock.
- *making*: milliseconds to make a batch in the thread that asks, with no step beside it;
  *CPU*: the processor time that this takes, of all threads, whatever else the machine does.
- *direct*: milliseconds a step that asks the data set itself; *prefetched*: one that asks
  `Prefetched(data)` with its defaults (three batches ahead, two threads). *Waited*: the share of
  that time in which the step waited for its batch.
- *cold*: the files' pages are thrown out of the system's cache before each round.
- The first step, for which nothing can be ready, is not counted.
- The variants take turns in {rounds} rounds of {steps} steps; numbers are those of the fastest
  round, which others on the machine disturbed least.

The latents' set has {latents} samples, {latent_bytes:.0f} KB each; the images are {images} JPEGs of
{width} x {height} pixels, {jpeg_bytes:.0f} KB each, cut and resized to 512 x 512.
"""

HEADER = """\
| data | batch | host | alone | making | CPU | direct | waited | prefetched | waited |
|---|---:|---|---:|---:|---:|---:|---:|---:|---:|"""

WIDTH, HEIGHT = 768, 640


@dataclass
class Round:
    """What one round took."""

    step: float
    """Milliseconds a step."""
    waited: float
    """Share of the time in which the step waited for its batch."""
    cpu: float
    """Milliseconds of processor time a step, of all threads."""


def make_latents(folder: Path, count: int) -> Path:
    """An encoded set of SDXL's size with random numbers."""
    generator = torch.Generator().manual_seed(0)

    def rows(number: int, *shape: int) -> torch.Tensor:
        return torch.randn(number, *shape, generator=generator, dtype=torch.float32).half()

    null = {"encoder_hidden_states": torch.zeros(1, 77, 2048).half()}
    null["text_embeds"] = torch.zeros(1, 1280).half()
    writer = EncodedWriter(folder, count, (4, 128, 128), shard_size=256, null=null)
    for shard in writer.missing:
        number = len(writer.rows(shard))
        tensors = {
            "samples": rows(number, 4, 128, 128),
            "encoder_hidden_states": rows(number, 77, 2048),
            "text_embeds": rows(number, 1280),
            "time_ids": torch.full((number, 6), 1024.0),
        }
        writer.write(shard, tensors)
    writer.finish()
    return folder


def make_images(folder: Path, count: int) -> Path:
    """Tar shards of JPEGs of smooth shapes and a little grain, which pack as photographs do."""
    folder.mkdir(parents=True)
    generator = numpy.random.default_rng(0)
    for shard in range(-(-count // 128)):
        with tarfile.open(folder / f"shard-{shard:03d}.tar", "w") as archive:
            for index in range(shard * 128, min(count, shard * 128 + 128)):
                coarse = generator.integers(0, 256, (20, 24, 3), dtype=numpy.uint8)
                image = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
                grain = generator.normal(0, 6, (HEIGHT, WIDTH, 3))
                array = (numpy.asarray(image) + grain).clip(0, 255).astype(numpy.uint8)
                stream = io.BytesIO()
                Image.fromarray(array).save(stream, "JPEG", quality=90)
                for kind, content in (("jpg", stream.getvalue()), ("cls", b"%d" % (index % 10))):
                    member = tarfile.TarInfo(f"{index:06d}.{kind}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder


def waiting_step(seconds: float) -> Callable[[], None]:
    """A step during which the host waits for the device."""
    return lambda: time.sleep(seconds)


def launching_step(seconds: float) -> Callable[[], None]:
    """A step during which the host launches: small calls that fill the time."""
    x = torch.ones(8)

    def calls(number: int) -> None:
        for _ in range(number):
            torch.add(x, x)

    fastest = min(_seconds(lambda: calls(2000)) for _ in range(20))
    number = round(2000 * seconds / fastest)
    return lambda: calls(number)


def run(data: Data | None, step: Callable[[], None], batch: int, steps: int) -> Round:
    """Steps with the batches of a data set, after a first one; without data if None."""
    if data is not None:
        data.batch(0, 0, batch)
        step()
    waited, begin, begin_cpu = 0.0, time.perf_counter(), time.process_time()
    for number in range(1, steps + 1):
        if data is not None:
            waited += _seconds(lambda number=number: data.batch(0, number, batch))  # type: ignore[misc]
        step()
    took = time.perf_counter() - begin
    cpu = time.process_time() - begin_cpu
    return Round(1000 * took / steps, waited / took, 1000 * cpu / steps)


def throw_out(folder: Path) -> None:
    """Throw the files' pages out of the system's cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(
    open_data: Callable[[], Data],
    folder: Path,
    step: Callable[[], None],
    *,
    batch: int,
    steps: int,
    rounds: int,
    cold: bool = False,
) -> list[str]:
    """Columns of a row of the table, from *alone* on; the variants are measured in turns."""
    alone: list[Round] = []
    making: list[Round] = []
    direct: list[Round] = []
    prefetched: list[Round] = []
    for _ in range(rounds):
        alone.append(run(None, step, batch, steps))
        for rows, idle in ((making, True), (direct, False)):
            if cold:
                throw_out(folder)
            rows.append(run(open_data(), _nothing if idle else step, batch, steps))
        if cold:
            throw_out(folder)
        with Prefetched(open_data()) as data:
            prefetched.append(run(data, step, batch, steps))
    best = [min(found, key=lambda one: one.step) for found in (alone, making, direct, prefetched)]
    columns = [f"{best[0].step:.1f}", f"{best[1].step:.1f}", f"{best[1].cpu:.1f}"]
    for one in best[2:]:
        columns += [f"{one.step:.1f}", f"{one.waited:.1%}"]
    return columns


def table(folder: Path, latents: Path, images: Path, steps: int, rounds: int, tenth: bool) -> None:
    """Print the table, a row as soon as it is measured."""
    scale = 0.1 if tenth else 1.0
    cases: list[tuple[str, Callable[[], Data], Path, int, float, bool]] = [
        ("latents and embeddings", lambda: EncodedData(latents), latents, 4, 0.05, False),
        ("the same, cold", lambda: EncodedData(latents), latents, 4, 0.05, True),
        ("latents and embeddings", lambda: EncodedData(latents), latents, 16, 0.1, False),
        ("JPEG at 512 pixels", lambda: ImageData(images, 512), images, 8, 0.1, False),
        ("the same, cold", lambda: ImageData(images, 512), images, 8, 0.1, True),
    ]
    print(HEADER)
    for name, open_data, where, batch, seconds, cold in cases:
        for host, make in (("waits", waiting_step), ("launches", launching_step)):
            step = make(seconds * scale)
            columns = measure(
                open_data, where, step, batch=batch, steps=steps, rounds=rounds, cold=cold
            )
            print(f"| {name} | {batch} | {host} | {' | '.join(columns)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=int, default=2048, help="samples of the encoded set")
    parser.add_argument("--images", type=int, default=512, help="JPEGs")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tenth", action="store_true", help="steps of a tenth, to try this out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        latents = make_latents(folder / "latents", options.latents)
        images = make_images(folder / "images", options.images)
        introduction = INTRODUCTION.format(
            facts=_facts(),
            command=shlex.join(["python", "-m", "bench.data_loading", *sys.argv[1:]]),
            latents=options.latents,
            latent_bytes=_bytes(latents, "shard-*.safetensors") / options.latents / 1000,
            images=options.images,
            jpeg_bytes=_bytes(images, "*.tar") / options.images / 1000,
            width=WIDTH,
            height=HEIGHT,
            rounds=options.rounds,
            steps=options.steps,
        )
        print(introduction, flush=True)
        table(folder, latents, images, options.steps, options.rounds, options.tenth)


def _facts() -> str:
    facts = machine.describe(torch.device("cpu"))
    return (
        f"{facts['date']}; {facts['cores']} cores of an {facts['cpu']}, load average "
        f"{os.getloadavg()[0]:.1f} at the start; Python {facts['python']}, torch {facts['torch']}, "
        f"safetensors {version('safetensors')}, Pillow {version('pillow')}."
    )


def _bytes(folder: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in folder.glob(pattern))


def _nothing() -> None:
    """The step of an idle host."""


def _seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
