"""A planned cycle is the trainer's: the same operations, and the memory that a real one takes."""

from __future__ import annotations

import dataclasses
import gc
import json
from typing import Any

import pytest
import torch
from small import small_recipe
from torch.profiler import ProfilerActivity, profile, record_function

from fastdistill.config import Recipe
from fastdistill.data import RealBatch, digits
from fastdistill.engine.counting import Counter
from fastdistill.engine.cycle import Cycle, count_cycle
from fastdistill.engine.gpus import find_gpu
from fastdistill.engine.plan_recipe import job_of_recipe
from fastdistill.engine.planning import PlannedJob, Planner
from fastdistill.engine.roles import checkpoint_blocks, make_objective
from fastdistill.engine.trainer import Trainer
from fastdistill.models import Denoiser
from fastdistill.models.adapters import build_network
from fastdistill.models.configs import model_configuration
from fastdistill.models.digits import DigitsNetwork
from fastdistill.objectives import Objective

GAN = ["objective.gan_weight=0.1", "training.discriminator={lr: 0.001}"]
BF16, RECOMPUTED = "training.precision=bfloat16", "parallel.checkpoint_blocks=true"
GUIDED = ["teacher.condition_dropout=0.1", "objective.guidance_scale=3"]


def cycle_of(recipe: Recipe) -> Cycle:
    job, recomputed = job_of_recipe(recipe), recipe.parallel.checkpoint_blocks
    return count_cycle(job.objective(recomputed), job.training, job.shape, job.inputs)


def counted_while_training(recipe: Recipe) -> dict[str, float]:
    """Operations of one cycle of the trainer itself, on real tensors."""
    model, data = recipe.model, digits()
    network = DigitsNetwork(data.shape, data.classes, model.width, model.blocks)
    teacher = Denoiser(network, recipe.process, recipe.parametrisation)
    objective = make_objective(recipe, teacher)
    if recipe.parallel.checkpoint_blocks:
        checkpoint_blocks(objective)
    trainer = Trainer(objective, data, recipe.training)
    with Counter() as counter:
        for _ in range(recipe.training.critic_updates_per_student_update):
            trainer.update()
    return {kind: size.at(1) for kind, size in counter.work.flops.items()}


@pytest.mark.parametrize(
    "options",
    [
        [],
        GUIDED,
        [*GAN, *GUIDED],
        [*GAN, "objective.gan_features=critic"],
        ["objective.divergence=jensen_shannon", "training.discriminator={lr: 0.001}"],
        ["training.critic_updates_per_student_update=5"],
        ["training.critic_updates_per_student_update=5", "training.sample_reuse=2"],
        ["training.critic_updates_per_student_update=4", "training.sample_reuse=4"],
        ["objective.share_critic_forward=true"],
        [*GAN, "objective.gan_features=critic", "objective.share_feature_forward=true"],
        ["training.accumulation=3"],
        [RECOMPUTED],
        [*GAN, "objective.gan_features=critic", RECOMPUTED],
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_a_cycle_has_the_operations_of_the_trainer(options):
    recipe = small_recipe(*options)
    batch, accumulation = recipe.training.batch_size, recipe.training.accumulation
    planned = {
        kind: accumulation * size.at(batch) for kind, size in cycle_of(recipe).work.flops.items()
    }
    assert planned == counted_while_training(recipe)


def test_backward_simulation_adds_half_of_the_earlier_steps_on_average():
    one = cycle_of(small_recipe())
    three = cycle_of(small_recipe("objective.student_times=[80, 2, 0.5]"))
    forward = next(
        part.work.total_flops.per_sample
        for part in one.parts
        if part.name == "student forward" and not part.has_graph
    )
    extra = three.work.total_flops.per_sample - one.work.total_flops.per_sample
    assert extra == 2 * 1 * forward  # two updates a cycle, (3 - 1) / 2 steps more in each


def test_parts_say_whose_they_are_and_what_keeps_a_graph():
    cycle = cycle_of(small_recipe(*GUIDED))
    found = {(part.update, part.name, part.has_graph): part.times for part in cycle.parts}
    assert found == {
        ("critic", "losses", False): 2,  # of its update; those of the samples once
        ("critic", "student forward", False): 1,
        ("critic", "critic forward", True): 2,
        ("critic", "backward", False): 2,
        ("student", "losses", False): 1,
        ("student", "student forward", True): 1,
        ("student", "teacher forward", False): 1,
        ("student", "critic forward", False): 1,
        ("student", "backward", False): 1,
    }
    assert cycle.updates == {"student": 1, "critic": 2}
    assert cycle.passes == {"student": 3, "critic": 5, "teacher": 1}
    assert cycle.activations.keys() == {"student", "critic"}


@dataclasses.dataclass
class Ones:
    """Data of one sample, for networks of any kind."""

    network: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.network.sample_shape

    def batch(
        self, seed: int, step: int, count: int, share: slice, device: str = "cpu"
    ) -> RealBatch:
        condition, null = (self.network.example_condition(count, device=device) for _ in range(2))
        return RealBatch(torch.zeros(count, *self.shape, device=device), condition, null)


REDUCED = {
    "sdxl": {
        "sample_size": 32,
        "block_out_channels": [32, 64, 64],
        "attention_head_dim": [1, 2, 2],
        "transformer_layers_per_block": [1, 1, 2],
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 6 * 32 + 64,
    },
    "dit_xl2_256": {"num_layers": 3, "num_attention_heads": 4},
}


def planned_and_made(name: str, recipe: Recipe) -> tuple[PlannedJob, Any]:
    """The job of a reduced network, and what makes its objective on a device."""
    config = model_configuration(name) | REDUCED[name]

    def make(checkpointed: bool, device: str = "meta") -> Objective:
        with torch.device(device):
            teacher = Denoiser(build_network(config), recipe.process, recipe.parametrisation)
            objective = make_objective(recipe, teacher)
        if checkpointed:
            checkpoint_blocks(objective)
        return objective

    with torch.device("meta"):
        data = Ones(build_network(config))
    job = PlannedJob(
        make,
        recipe.training,
        recipe.parallel,
        data.shape,
        lambda batch: data.batch(0, 0, batch, slice(None), "meta"),
    )
    return job, data


def measured(tmp_path, recipe: Recipe, job: PlannedJob, data: Any) -> tuple[int, int]:
    """Bytes that torch's CPU allocator holds: before a cycle, and at most during one."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        objective = job.objective(recipe.parallel.checkpoint_blocks, "cpu")  # type: ignore
        trainer = Trainer(objective, data, recipe.training)
        gc.collect()
        with record_function("cycle begins"):
            pass
        for _ in range(recipe.training.critic_updates_per_student_update):
            trainer.update()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    begins = next(event["ts"] for event in events if event.get("name") == "cycle begins")
    memory = [
        (event["ts"], event["args"]["Total Allocated"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]"
    ]
    earlier = memory[0][1] - memory[0][2]  # what other profiles left in the count
    before = [total for time, total, _ in memory if time <= begins][-1] - earlier
    return before, max(total for time, total, _ in memory if time > begins) - earlier


LARGER = ["training.critic_updates_per_student_update=2", "training.batch_size=8"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sdxl", []),
        ("dit_xl2_256", [BF16]),
        ("dit_xl2_256", [RECOMPUTED]),
        ("dit_xl2_256", GAN),
        (
            "dit_xl2_256",
            [*GAN, "objective.gan_features=critic", "training.sample_reuse=2", *LARGER],
        ),
        ("dit_xl2_256", ["objective.share_critic_forward=true"]),
        ("dit_xl2_256", ["training.drop_gradients=true"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "plain",
)
def test_memory_is_what_a_real_cycle_takes(tmp_path, name, options):
    """Within 5 %, states and activations each; measured by torch's profiler on the CPU.

    Workspaces of kernels, as those of the discriminator's convolutions, are not counted.
    """
    one = ["training.critic_updates_per_student_update=1", "training.batch_size=4"]
    recipe = small_recipe(*one, *GUIDED, *options)
    job, data = planned_and_made(name, recipe)
    planner = Planner(job, 1, find_gpu("H200"))
    memory = planner.memory(planner.own_layout(), planner.own_batch())
    before, peak = measured(tmp_path, recipe, job, data)
    assert memory.activations > 20e6  # large enough that tensors, not scalars, are compared
    assert memory.states == pytest.approx(before, rel=0.05)
    assert memory.activations == pytest.approx(peak - before, rel=0.05)
