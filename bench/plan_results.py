"""The page of counts of the published models and of plans for two of them, to standard output.

python -m bench.plan_results > docs/results/plan.md
"""

from __future__ import annotations

import functools

import torch

from fastdistill.config import load_recipe
from fastdistill.engine.counting import Training, count_training
from fastdistill.engine.gpus import GIB, GPUS
from fastdistill.engine.plan_recipe import TEXT_TOKENS, job_of_recipe
from fastdistill.engine.plan_report import Plan
from fastdistill.engine.planning import Planner
from fastdistill.models.adapters import Adapter, build_network
from fastdistill.models.configs import known_configurations, model_configuration

BATCH = 61
"""Batch size to count at: it divides no dimension of the networks."""
CYCLE = (
    "training.precision=bfloat16",
    "training.critic_updates_per_student_update=5",
    "objective.guidance_scale=7",
    "teacher.condition_dropout=0.1",
)
JOBS = {
    ("sdxl", 1, "H200"): 2,
    ("sdxl", 8, "H100"): 4,
    ("sdxl", 64, "H100"): 4,
    ("dit_xl2_512", 1, "H200"): 32,
    ("dit_xl2_512", 8, "H100"): 32,
    ("dit_xl2_512", 64, "H100"): 32,
}
"""Samples on each GPU of the jobs that are planned."""

INTRODUCTION = """\
# Counts of published models, and plans for SDXL and DiT-XL/2

Written by `python -m bench.plan_results > docs/results/plan.md`, in minutes, on any machine: the
networks are on the meta device, nothing is computed.
[What is counted, what is assumed](../planning.md).

Operations, bytes and memory are counted. **Times are predicted, none was measured**: no GPU has run
this.

## One sample, in bfloat16

Operations in TFLOP: of a forward (linear, convolution, attention), of a backward to all weights, to
the input alone. GiB that autograd saves: in training, to the input alone; with recomputed blocks
what the forward keeps, and the peak of both passes. GB that kernels bound by memory move, in eager
PyTorch. Text tokens: 77, PixArt 120, SD3 333, Flux 512.
"""
PLANS = """\
## Plans

A cycle is a student update and five critic updates with guidance, without a GAN; there is one
moving average; the student's update shares its samples with the fifth critic update. *a GPU* is the
batch on each; *fits* is the largest there with all activations kept, and with recomputed blocks.
*accelerated* is with `fastdistill.accelerate`.
"""


def network_of(name: str) -> Adapter:
    with torch.device("meta"):
        return build_network(model_configuration(name)).bfloat16().train()


def trained(network: Adapter, to_input: bool = False) -> Training:
    tokens = TEXT_TOKENS.get(network.architecture, 77)
    condition = network.example_condition(
        BATCH, text_tokens=tokens, dtype=torch.bfloat16, device="meta"
    )
    model_input = torch.empty(
        BATCH, *network.sample_shape, dtype=torch.bfloat16, device="meta", requires_grad=to_input
    )
    t = torch.empty(BATCH, device="meta")
    network.requires_grad_(not to_input)
    return count_training(functools.partial(network, model_input, t, condition), BATCH)


def counts_line(name: str) -> list[str]:
    network = network_of(name)
    size = sum(parameter.numel() for parameter in network.parameters())
    full, to_input = trained(network), trained(network, to_input=True)
    network.enable_gradient_checkpointing()
    recomputed = trained(network)
    flops = {kind: count.at(1) / 1e12 for kind, count in full.forward.flops.items()}
    kinds = " / ".join(
        f"{flops.get(kind, 0):.2f}" for kind in ("linear", "convolution", "attention")
    )
    peak = recomputed.peak.at(1025) - recomputed.peak.at(1024)
    return [
        name,
        f"{size / 1e6:,.0f}",
        f"{sum(flops.values()):.3f} ({kinds})",
        *(f"{one.backward.total_flops.at(1) / 1e12:.2f}" for one in (full, to_input)),
        *(f"{one.saved.at(1) / GIB:.2f}" for one in (full, to_input)),
        f"{recomputed.kept.per_sample / GIB:.2f}, {peak / GIB:.2f}",
        *(f"{one.total_bytes.per_sample / 1e9:.2f}" for one in (full.forward, full.backward)),
    ]


def plan_line(name: str, gpus: int, gpu: str, batch: int, accelerated: bool) -> list[str]:
    changes = [f"training.batch_size={batch * gpus}", f"training.accelerate={accelerated}"]
    job = job_of_recipe(load_recipe("digits", [*CYCLE, *changes]), name)
    planner = Planner(job, gpus, GPUS[gpu])
    limit = planner.gpu.memory
    plan = Plan.of(name, planner, limit)
    shares = plan.prediction.shares()
    of_cycle = {kind: seconds / plan.prediction.cycle for kind, seconds in shares.items()}
    matrix = sum(of_cycle.get(kind, 0) for kind in ("linear", "convolution", "attention"))
    exchange = of_cycle["collectives"] + of_cycle.get("copies of collectives", 0)
    most = [
        planner.largest_batch(planner.layouts(recomputed)[0], limit) for recomputed in (False, True)
    ]
    return [
        name + (", accelerated" if accelerated else ""),
        f"{gpus} x {gpu}",
        str(plan.layout),
        str(batch),
        *(
            f"{size / GIB:.1f}"
            for size in (plan.memory.states, plan.memory.activations, plan.memory.total)
        ),
        ", ".join(str(count) for count in most),
        f"{1e3 * plan.prediction.cycle:,.0f}",
        f"{plan.prediction.samples_per_second:,.1f}",
        f"{matrix:.0%} / {of_cycle['memory-bound']:.0%} / {of_cycle['optimizer']:.0%} / "
        f"{exchange:.0%} / {of_cycle['host']:.0%}",
    ]


def print_table(columns: list[str], lines: list[list[str]]) -> None:
    print(f"| {' | '.join(columns)} |\n|{'---|' * 3}{'---:|' * (len(columns) - 3)}")
    for line in lines:
        print(f"| {' | '.join(line)} |")
    print()


def main() -> None:
    print(INTRODUCTION)
    columns = ["model", "M parameters", "forward", "backward", "to input", "saved", "to input"]
    columns += ["recomputed", "GB forward", "GB backward"]
    print_table(columns, [counts_line(name) for name in known_configurations()])
    print(PLANS)
    columns = [
        "model",
        "GPUs",
        "mode",
        "a GPU",
        "networks GiB",
        "activations GiB",
        "all GiB",
        "fits",
    ]
    columns += ["cycle ms", "samples / s", "matrix / memory / optimizer / exchange / host"]
    lines = [
        plan_line(*job, batch, accelerated)
        for job, batch in JOBS.items()
        for accelerated in (False, True)
    ]
    print_table(columns, lines)


if __name__ == "__main__":
    main()
