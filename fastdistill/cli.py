"""The command line: encode, plan, train, sample, evaluate, export, gaussian, bench and others."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastdistill.cli_gaussian import gaussian_app

if TYPE_CHECKING:
    from fastdistill.engine.job import Job

app = typer.Typer(
    help="Distil diffusion models into one-step generators.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False, soft_wrap=True)

RunFolder = Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)]


def say(line: str) -> None:
    """Print one line for a person."""
    console.print(line, markup=False)


app.add_typer(gaussian_app, name="gaussian")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or the name of one that ships.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Keys to change, as training.steps=100.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the run; made if absent.")
    ] = None,
) -> None:
    """Run a recipe from data to report."""
    from fastdistill.config import load_recipe
    from fastdistill.engine.job import Job, start_ranks

    loaded = load_recipe(recipe, overrides)
    ranks = start_ranks(loaded)
    folder = ranks.broadcast_object(output or _unused(Path("runs") / loaded.name))
    job = Job.create(folder, loaded, say, ranks)
    job.say(f"run folder: {job.folder}")
    _run(job)


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or the name of one that ships.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Keys to change, as training.batch_size=64.")
    ] = None,
    gpus: Annotated[int, typer.Option(help="Number of GPUs.", min=1)] = 1,
    gpu: Annotated[str, typer.Option(help="Their kind, as H100, H200, B200, A100.")] = "H100",
    memory: Annotated[
        str | None, typer.Option(help="Memory of each, as 80GiB; the whole of its kind if absent.")
    ] = None,
    model_config: Annotated[
        str | None,
        typer.Option(help="A diffusers folder, a JSON file or a published model, as sdxl."),
    ] = None,
    text_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a prompt; the model's usual ones if absent.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A JSON file of all numbers.")
    ] = None,
) -> None:
    """Say what a recipe will take, before anything is allocated: memory, work, predicted time."""
    import json

    from fastdistill.config import load_recipe
    from fastdistill.engine.gpus import find_gpu, parse_size
    from fastdistill.engine.plan_recipe import job_of_recipe
    from fastdistill.engine.plan_report import Plan
    from fastdistill.engine.planning import Planner

    kind = find_gpu(gpu)
    limit = kind.memory if memory is None else parse_size(memory)
    loaded = load_recipe(recipe, overrides)
    job = job_of_recipe(loaded, model_config, text_tokens=text_tokens)
    made = Plan.of(loaded.name, Planner(job, gpus, kind), limit)
    made.show(console)
    if output is not None:
        output.write_text(json.dumps(made.as_json(), indent=2) + "\n")
        say(f"all numbers: {output}")
    if not made.fits:
        raise ValueError(made.verdict())


@app.command()
def resume(
    run: RunFolder,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Keys of the machine to change, as parallel.mode=fsdp."),
    ] = None,
) -> None:
    """Continue a run from its newest intact checkpoint, over any number of processes."""
    from fastdistill.engine.job import Job

    _run(Job.open(run, say, overrides))


@app.command()
def sample(
    run: RunFolder,
    count: Annotated[int, typer.Option(help="Number of images.", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the noise.", min=0)] = 0,
    label: Annotated[
        int | None, typer.Option(help="Class of all images; all in turn if absent.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Encoded prompts, in their order; the run's data if absent.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "cpu",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A .png grid or .npy array of samples; samples.png."),
    ] = None,
) -> None:
    """Draw images with a run's student."""
    import numpy

    from fastdistill.engine import drawing

    path = output or run / "samples.png"
    if path.suffix not in (".png", ".npy"):
        raise ValueError(f"--output is {path}; expected a name that ends in .png or .npy")
    samples, pictures = drawing.draw(run, count, seed, label, data, device)
    if path.suffix == ".npy":
        numpy.save(path, samples.cpu().numpy())
    else:
        drawing.save_grid(path, {"student": samples}, pictures)
    say(f"{count} images: {path}")


@app.command()
def evaluate(run: RunFolder) -> None:
    """Judge a run's saved teacher and student again, and print the table."""
    from fastdistill.engine.job import Job

    _print_comparison(Job.open(run, say).evaluate())


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, finished or not.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of compare.html, table.md, table.json.")
    ] = Path("runs/compare"),
) -> None:
    """Put several runs into one table, and into one page with their curves and grids."""
    from fastdistill.engine.compare import Comparison

    comparison = Comparison.read(runs)
    titles, body = comparison.table()
    table = Table(*(escape(title).replace(" ", "\n") for title in titles))
    for column in table.columns:
        column.no_wrap = True
    for row in body:
        table.add_row(*map(escape, row))
    Console(width=10_000, highlight=False).print(table)  # its lines are never cut
    for note in comparison.notes:
        say(note)
    say(f"curves and grids: {comparison.write(output)}")


@app.command()
def encode(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of images, tar shards, safetensors files, or a file of prompts."
        ),
    ],
    to: Annotated[Path, typer.Option("--to", help="Folder of the encoded set.")],
    teacher: Annotated[
        str | None,
        typer.Option(help="Folder of a diffusers pipeline; without one, pixels are kept."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Height and width; the teacher's own if absent.", min=1)
    ] = None,
    dtype: Annotated[str, typer.Option(help="Storage: float16, bfloat16, float32.")] = "float16",
    precision: Annotated[
        str, typer.Option(help="What text encoders compute in: float32, bfloat16, float16.")
    ] = "float32",
    posterior: Annotated[str, typer.Option(help="Latents: sample or mean.")] = "sample",
    seed: Annotated[int, typer.Option(help="Seed of the posterior's samples.", min=0)] = 0,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a prompt for T5; the pipeline's if absent.", min=1)
    ] = None,
    guidance: Annotated[float, typer.Option(help="Guidance that a Flux model is told.")] = 3.5,
    shard_size: Annotated[int, typer.Option(help="Samples of a shard.", min=1)] = 1024,
    batch_size: Annotated[int, typer.Option(help="Samples encoded at once.", min=1)] = 4,
    workers: Annotated[int, typer.Option(help="Threads that decode images.", min=1)] = 4,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Precompute latents and embeddings; repeat the command to continue after a crash."""
    from fastdistill.engine.encode import EncodeSettings, Place
    from fastdistill.engine.encode import encode as run
    from fastdistill.engine.job import choose_device

    settings = EncodeSettings(
        size, dtype, shard_size, precision, posterior, seed, max_length, guidance
    )
    place = Place.of_process(choose_device(device), batch_size, workers)
    run(source, to, teacher, settings, place, say)


@app.command()
def export(
    run: RunFolder,
    to: Annotated[Path, typer.Option("--to", help="The new folder.")],
    teacher: Annotated[
        str | None, typer.Option(help="The teacher's pipeline, where it has moved since.")
    ] = None,
    merge_lora: Annotated[
        bool, typer.Option("--merge-lora", help="Write LoRA weights into the model.")
    ] = False,
    guidance: Annotated[
        float, typer.Option(help="What a model with embedded guidance was told; 1 is nothing.")
    ] = 1.0,
) -> None:
    """Write a run's student as a pipeline folder that diffusers loads alone."""
    from fastdistill.engine.export import export as write

    folder = write(run, to, teacher=teacher, merge_lora=merge_lora, guidance=guidance)
    say(f"{folder} holds the student; its README.md says how diffusers samples it")


@app.command()
def bench(
    ops: Annotated[str | None, typer.Option(help="Ops with commas between; all if absent.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="One case an op, for less time.")] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of bench.json and the charts.")
    ] = Path("runs/bench"),
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Two bench.json files: say what moved, and measure nothing."),
    ] = None,
) -> None:
    """Time every op beside its rivals, or compare two such runs."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "bench" / "command.py").exists():
        raise ValueError("the benchmarks are not part of an installation; run this in a checkout")
    sys.path.insert(0, str(checkout))
    from bench import command

    if compare is not None:
        command.show_comparison(*compare)
    elif not command.run(ops, device, quick, output):
        raise typer.Exit(1)


@app.command()
def info() -> None:
    """Say which versions, backends and devices there are, and what is missing."""
    from fastdistill.engine.info import describe_installation

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in describe_installation():
        table.add_row(name, value)
    console.print(table, markup=False)


def main() -> NoReturn:
    """Entry point: faults of the user, the disk and the keyboard end with one clear message."""
    from fastdistill.engine.trainer import TrainingDivergedError

    try:
        app(standalone_mode=False)
    except typer.Abort:
        _stop("stopped", 130)
    except typer.Exit as request:
        sys.exit(request.exit_code)
    except KeyboardInterrupt:
        _stop("stopped", 130)
    except (OSError, ValueError, TrainingDivergedError) as error:
        _stop(f"error: {error}", 1)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "show"):
            error.show()
            sys.exit(getattr(error, "exit_code", 2))
        raise
    sys.exit(0)


def _stop(message: str, code: int) -> NoReturn:
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)
    sys.exit(code)


def _unused(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3, ... that does not exist."""
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _run(job: Job) -> None:
    import torch

    from fastdistill.engine.folder import is_disk_full
    from fastdistill.engine.trainer import Interrupted
    from fastdistill.parallel import RankLostError

    folder = job.folder
    advice = f"continue with `fastdistill resume {folder}`"
    try:
        summary = job.run()
    except Interrupted as request:
        _stop(f"{request}; {advice}", 130)
    except KeyboardInterrupt:
        _stop(f"stopped; {advice}", 130)
    except RankLostError as error:
        console.file.flush()
        sys.stderr.write(f"error: {error}; {advice}\n")
        sys.stderr.flush()
        os._exit(1)  # the end of torch's process groups would wait for the lost rank
    except OSError as error:
        if not is_disk_full(error):
            raise
        _stop(f"error: {error}; make room, then {advice}", 1)
    except torch.OutOfMemoryError as error:
        size = job.recipe.training.batch_size
        _stop(
            f"error: {job.device} has too little memory for training.batch_size={size} over "
            f"{job.ranks.size} processes ({str(error).splitlines()[0]}); `fastdistill plan` says "
            "what fits: start again with a smaller batch and more training.accumulation, or "
            f"{advice} parallel.checkpoint_blocks=true",
            1,
        )
    job.ranks.close()
    if summary is None:
        return
    _print_comparison(summary)
    say("summary.json, grid.png, report.html, metrics.jsonl and student/ are in")
    say(str(folder))


def _print_comparison(summary: dict) -> None:
    from fastdistill.engine.report import comparison

    table = Table("", "teacher", "student", "real data")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row(
        "evaluations", str(summary["evaluations_teacher"]), str(summary["evaluations_student"]), ""
    )
    for row in comparison(summary):
        table.add_row(*row)
    console.print(table)
    say(
        f"{summary['speedup']:.0f} times faster an image than the teacher; peak memory "
        f"{summary['peak_memory_gib']:.2f} GiB"
    )
