"""The loops of docs/drop-in.md before and after each of its diffs: time, memory, launches.

    python -m bench.dropin --output docs/results/drop-in.md

The programs are those of the page, word for word. Variants take turns, so that what else the
machine does meets all of them alike; times are of the processor, and ratios of medians within one
run. A cycle is one iteration of the diffusers loop, and five of the DMD2-style loop: one update of
the student, five of the critic.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.data import Dataset, default_collate

from bench import machine
from bench.counting import Counting
from bench.dropin_page import CHANGES, LOOPS, blocks, program
from bench.peers import wide
from fastdistill.functional import distribution_matching_loss

SIZE, WIDTH, TOKENS = 16, 64, 16
"""Height and width of latents, width of embeddings, tokens of a prompt."""
BATCH = 4
ITERATIONS = {"diffusers": 1, "dmd2": 5}
"""Iterations of a cycle."""


class Variant(NamedTuple):
    """A program of the page."""

    loop: str
    name: str
    text: str


class Measured(NamedTuple):
    """What a cycle of a variant takes."""

    seconds: float
    peak: int
    """Most bytes of tensors at one moment, weights and states included."""
    launches: int
    """Operators that torch's dispatcher was asked for; a foreach operator is one."""


def variants() -> list[Variant]:
    """Every loop, as it is, after each diff, after all of them, and as the trainer's."""
    found = []
    for loop in LOOPS:
        found.append(Variant(loop, "as it was", program(loop)))
        found += [Variant(loop, change, program(loop, change)) for change in CHANGES]
        found.append(Variant(loop, "all three", program(loop, *CHANGES)))
        found.append(Variant(loop, "trainer", blocks()["trainer", loop]))
    return found


def make_pipeline(folder: Path, small: bool) -> Any:
    """A Stable Diffusion pipeline of a reduced UNet with random weights, saved in a folder too."""
    import diffusers

    torch.manual_seed(0)
    widths, layers = ((8, 16), 1) if small else ((32, 64), 1)
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIZE,
        block_out_channels=widths,
        layers_per_block=layers,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
    )
    scheduler = diffusers.DDIMScheduler(
        *(1000, 0.00085, 0.012, "scaled_linear"), clip_sample=False, steps_offset=1
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    pipe: Any = diffusers.StableDiffusionPipeline(
        *(vae, None, None, unet, scheduler, None, None), requires_safety_checker=False
    )
    if not folder.exists():
        pipe.save_pretrained(folder)
    return pipe


class Prompts(Dataset):
    """Embeddings, with latents where ``real``."""

    def __init__(self, real: bool) -> None:
        self.real = real

    def __len__(self) -> int:
        return 64

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(row)
        item = {"encoder_hidden_states": torch.randn(TOKENS, WIDTH, generator=generator)}
        if self.real:
            item["latents"] = torch.randn(4, SIZE, SIZE, generator=generator)
        return item


class Loader:
    """Batches of the page's loops, with a look at the clock and at the counters between two."""

    def __init__(self, loop: str, cycles: int, counting: Counting | None) -> None:
        self.real, self.iterations = loop == "diffusers", ITERATIONS[loop]
        self.cycles, self.counting = cycles, counting
        self.seconds: list[float] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        prompts = Prompts(self.real)
        for cycle in range(self.cycles + 1):  # the first is the warm-up
            if self.counting is not None and cycle == 1:
                self.counting.restart()
            begin = time.process_time()
            for k in range(self.iterations):
                first = BATCH * (cycle * self.iterations + k)
                with _disable_current_modes():  # data are nobody's gain
                    items = [prompts[(first + row) % len(prompts)] for row in range(BATCH)]
                    batch: dict[str, Any] = default_collate(items)
                yield batch | ({} if self.real else {"size": (SIZE, SIZE)})
            if cycle > 0:
                self.seconds.append(time.process_time() - begin)


def run(
    variant: Variant, home: Path, small: bool, cycles: int, counting: Counting | None
) -> tuple[list[float], dict[str, Any]]:
    """Seconds of each cycle of a variant's program, and its variables."""
    folder = home / "pipeline"
    scope: dict[str, Any] = {"pipe": make_pipeline(folder, small), "folder": folder}
    scope |= {"null": torch.zeros(1, TOKENS, WIDTH), "print": lambda *_: None}
    if variant.name == "trainer":
        return _run_trainer(variant, scope, home, cycles, counting), scope
    scope["loader"] = loader = Loader(variant.loop, cycles, counting)
    torch.manual_seed(0)
    exec(compile(variant.text, f"{variant.name} of {variant.loop}", "exec"), scope)
    return loader.seconds, scope


def _run_trainer(
    variant: Variant, scope: dict[str, Any], home: Path, cycles: int, counting: Counting | None
) -> list[float]:
    """The trainer's program: made by the page's code, then stepped cycle by cycle."""
    iterations = ITERATIONS[variant.loop]
    with tempfile.TemporaryDirectory(dir=home) as output:
        data = Prompts(variant.loop == "diffusers")
        scope |= {"prompts": data, "samples": data, "output": Path(output) / "run"}
        made = variant.text.partition("trainer.fit()")[0]
        exec(compile(made, f"trainer of {variant.loop}", "exec"), scope)
        loop, seconds = scope["trainer"].loop, []
        for cycle in range(cycles + 1):
            if counting is not None and cycle == 1:
                counting.restart()
            begin = time.process_time()
            for _ in range(iterations):
                loop.update()
            if cycle > 0:
                seconds.append(time.process_time() - begin)
        return seconds


def measure(
    home: Path, small: bool, rounds: int, cycles: int, say: Callable[[str], None]
) -> dict[tuple[str, str], Measured]:
    """Every variant, in turns."""
    counted: dict[tuple[str, str], Counting] = {}
    for variant in variants():
        counting = Counting()
        with counting:
            run(variant, home, small, 1, counting)
        counted[variant.loop, variant.name] = counting
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in counted}
    for number in range(rounds):
        for variant in variants():
            found, _ = run(variant, home, small, cycles, None)
            seconds[variant.loop, variant.name] += found
        say(f"round {number + 1} of {rounds}")
    return {
        key: Measured(statistics.median(values), counted[key].peak, counted[key].launches)
        for key, values in seconds.items()
    }


def report(found: dict[tuple[str, str], Measured], parameters: int) -> str:
    """The results as a page."""
    facts = machine.describe(torch.device("cpu"))
    kept = ("cpu", "threads", "system", "torch", "date", "command", "commit")
    lines = [HEAD.format(millions=parameters / 1e6, size=SIZE, batch=BATCH)]
    for loop in LOOPS:
        rows = {name: one for (of, name), one in found.items() if of == loop}
        before = rows["as it was"]
        lines += [
            f"## The {'diffusers script' if loop == 'diffusers' else 'DMD2-style loop'}",
            "",
            "| | processor time of a cycle | peak memory | launches |",
            "|---|---:|---:|---:|",
        ]
        for name, one in rows.items():
            share = f"{one.seconds / before.seconds:.2f}"
            if name == "as it was":
                share = f"{1000 * one.seconds:.0f} ms"
            peak = f"{one.peak / 2**20:.0f} MiB"
            lines.append(f"| {name} | {share} | {peak} | {one.launches:,} |")
        lines.append("")
    chain, fused = gradient_errors()
    lines += [
        READING.format(chain=chain, fused=fused),
        "",
        *(f"- {name}: {facts[name]}" for name in kept if name in facts),
    ]
    return "\n".join(lines) + "\n"


HEAD = """\
# Drop-in: what each diff gains on a CPU

The two loops of [the page](../drop-in.md) before and after each of its diffs, with a
UNet2DConditionModel of {millions:.1f} million parameters, latents of {size}x{size}, batch {batch},
float32.

- A cycle is one iteration of the diffusers loop, and five of the DMD2-style loop: one update of the
  student and five of the critic.
- Time: of the processor, one thread; median, as a share of the loop as it was in the same run, the
  variants taking turns.
- Peak memory: most bytes of tensors at one moment; weights, gradients and optimizer states too.
- Launches: calls of torch's operators in a cycle, views left out; a foreach operator is one.
"""

READING = """\
## How to read it

At this size a network's pass takes little more than its launches, so that losses and optimizers
weigh far more here than beside SDXL, where they are a few per cent of a step.

- **loss**: as many launches, since it saves passes over the samples and adds numbers a sample; what
  it gains is exactness. In bfloat16 the gradient of the DMD2-style loop's chain is {chain:.2%} off
  (relative to float64, in norm), that of the fused loss {fused:.2%}.
- **optimizer**: the launches of clipping, AdamW and the average, which a GPU's host would issue.
  The gradients stay in memory between updates, which the loops drop.
- **layers**: memory. On a CPU they take longer: what they compute again is not free there.
- **trainer**: all of it but the layers; it also keeps the teacher's weights apart.
"""


def gradient_errors() -> tuple[float, float]:
    """Relative errors of the student's gradient in bfloat16: the page's chain, and the fused loss.

    Teacher and critic differ by a tenth of their outputs' size, as they do late in a training.
    """
    generator = torch.Generator().manual_seed(0)
    x, noise, cond, other, gap = (
        torch.randn(16, 4, 64, 64, generator=generator, dtype=torch.float64) for _ in range(5)
    )
    alpha_bar = torch.linspace(0.05, 0.95, 16, dtype=torch.float64)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x_t = wide(alpha, x) * x + wide(sigma, x) * noise
    outputs = (x, x_t, cond, cond + 0.1 * other, cond + 0.1 * gap)
    stored = [value.bfloat16() for value in outputs]
    exact = _gradient([*(value.double() for value in stored), alpha, sigma])
    chain = _gradient([*stored, alpha.bfloat16(), sigma.bfloat16()])
    sample = stored[0].requires_grad_()
    loss = distribution_matching_loss(
        *(sample, stored[1], stored[2], stored[4], alpha.float(), sigma.float()),
        teacher_output_uncond=stored[3],
        guidance_scale=7.5,
    )
    fused = torch.autograd.grad(loss, sample)[0] * sample.numel()
    errors = [(found.double() - exact).norm() / exact.norm() for found in (chain, fused)]
    return float(errors[0]), float(errors[1])


def _gradient(tensors: list[Tensor]) -> Tensor:
    """The DMD2-style loop's gradient of the sample, in the dtype of its tensors."""
    x, x_t, cond, null, fake, alpha, sigma = tensors
    guided = null + 7.5 * (cond - null)
    real, fake = ((x_t - wide(sigma, x) * eps) / wide(alpha, x) for eps in (guided, fake))
    return (fake - real) / (x - real).abs().mean(dim=(1, 2, 3), keepdim=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, help="the page to write; printed if absent")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--cycles", type=int, default=3, help="timed cycles of a variant in a round"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        found = measure(Path(home), False, options.rounds, options.cycles, print)
        unet = make_pipeline(Path(home) / "count", False).unet
    page = report(found, sum(parameter.numel() for parameter in unet.parameters()))
    if options.output is None:
        print(page)
    else:
        options.output.write_text(page)


if __name__ == "__main__":
    main()
