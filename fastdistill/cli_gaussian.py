"""`fastdistill gaussian`: fit and diagnose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

gaussian_app = typer.Typer(
    help="Fit a Gaussian to data or a teacher, and say where it can stand in for the teacher.",
    no_args_is_help=True,
)


@gaussian_app.command()
def fit(
    source: Annotated[
        str,
        typer.Argument(
            help="digits, an encoded set, images, or a saved denoiser for its own samples."
        ),
    ],
    to: Annotated[Path, typer.Option("--to", help="The file, as gaussian.safetensors.")],
    rank: Annotated[int, typer.Option(help="Principal directions.", min=0)] = 64,
    by_class: Annotated[bool, typer.Option("--by-class", help="One for each class.")] = False,
    clusters: Annotated[int, typer.Option(help="One for each of so many clusters.", min=0)] = 0,
    count: Annotated[
        int | None, typer.Option(help="Samples; all of a set, 50,000 of a teacher.", min=2)
    ] = None,
    size: Annotated[int | None, typer.Option(help="Height and width of images.", min=1)] = None,
    sampler_steps: Annotated[int, typer.Option(help="Heun steps of a teacher.", min=2)] = 18,
    guidance: Annotated[float, typer.Option(help="Guidance of a teacher's samples.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Samples read at once.", min=1)] = 256,
    seed: Annotated[int, typer.Option(help="Seed of samples and clusters.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
) -> None:
    """Fit mean and covariance in one pass; under torchrun over all processes."""
    import torch

    from fastdistill.cli import say
    from fastdistill.engine.gaussian import FitSettings, fit_source
    from fastdistill.gaussian import GaussianMixture, save_gaussian
    from fastdistill.parallel import Ranks

    torch.set_num_threads(threads)
    settings = FitSettings(
        rank=rank,
        by_class=by_class,
        clusters=clusters,
        count=count,
        size=size,
        sampler_steps=sampler_steps,
        guidance_scale=guidance,
        batch_size=batch_size,
        seed=seed,
    )
    ranks = Ranks.start("cpu")
    found = fit_source(source, settings, ranks, say if ranks.is_first else lambda line: None)
    if ranks.is_first:
        save_gaussian(to, found, torch.float32)
        components = (
            [found[k] for k in range(len(found))] if isinstance(found, GaussianMixture) else [found]
        )
        for k, one in enumerate(components):
            left = f"{one.fit.left_out[-1]:.2%} of the variance in the floor {one.floor:.3g}"
            sketched = one.fit.sketch_error
            error = f", sketch error {sketched:.2%}" if sketched else ""
            name = f"component {k}: " if len(components) > 1 else ""
            say(f"{name}{one.fit.samples} samples, rank {one.rank}, {left}{error}")
        say(f"saved: {to}")
    ranks.close()


@gaussian_app.command()
def diagnose(
    gaussian: Annotated[Path, typer.Argument(help="A file of `fastdistill gaussian fit`.")],
    teacher: Annotated[str, typer.Option(help="A saved denoiser, or a diffusers folder.")],
    data: Annotated[str, typer.Option(help="The teacher's data, as of fit.")],
    bound: Annotated[float, typer.Option(help="Largest relative score error allowed.")] = 0.05,
    count: Annotated[int, typer.Option(help="Samples.", min=1)] = 1000,
    levels: Annotated[int, typer.Option(help="Noise levels.", min=2)] = 24,
    size: Annotated[int | None, typer.Option(help="Height and width of images.", min=1)] = None,
    guidance: Annotated[float, typer.Option(help="Guidance of the teacher.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the noise.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "cpu",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A .png of the errors; numbers go beside it.")
    ] = Path("diagnosis.png"),
) -> None:
    """Say how far a teacher is from its Gaussian, noise level by noise level."""
    from rich.table import Table

    from fastdistill.cli import console, say
    from fastdistill.engine.devices import choose_device
    from fastdistill.engine.gaussian import diagnose_source, load_any_teacher, open_samples
    from fastdistill.gaussian import load_gaussian

    if output.suffix != ".png":
        raise ValueError(f"--output is {output}; expected a name that ends in .png")
    loaded = load_gaussian(gaussian)
    found = diagnose_source(
        loaded,
        load_any_teacher(teacher, choose_device(device)),
        open_samples(data, size)[0],
        count,
        guidance,
        levels,
        seed,
    )
    table = Table("sigma / alpha", "log-SNR", "score error", "denoiser error")
    for row in zip(
        found.ratios, found.log_snrs, found.score_errors, found.denoiser_errors, strict=True
    ):
        table.add_row(*(f"{value:.4g}" for value in row))
    console.print(table)
    found.save_plot(output, bound)
    level = found.level(bound)
    numbers = found.as_json() | {"bound": bound, "level": level}
    output.with_suffix(".json").write_text(json.dumps(numbers, indent=2) + "\n")
    if level is None:
        say(f"the score error is above {bound:g} at every level")
    else:
        say(f"the score error is at most {bound:g} from sigma / alpha = {level:.4g} on")
    say(f"plot and numbers: {output}, {output.with_suffix('.json')}")
