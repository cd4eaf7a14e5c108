"""A training cycle, one student update and five critic updates, as two loops write it.

`OurCycle` is `fastdistill.engine.trainer.Trainer`. `EagerCycle` is the loop of DMD2 and FastGen:
separate passes for the teacher with and without its condition, conversions in float64, a mean
squared error against a pseudo-target, `clip_grad_norm_`, foreach AdamW, a moving average parameter
by parameter and two values read by the host an update. Both do one student sample a step, which
the student's update (every fifth step) and the critic's share, on the same networks with the same
numbers of passes. What engines log, check or synchronise beyond that is left out, and the average
follows the student's updates alone, though FastGen's moves at every step.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdistill.config import OptimizerSettings, TrainingSettings
from fastdistill.data import RealBatch
from fastdistill.diffusion import VP, Uniform
from fastdistill.diffusion.parametrisation import Epsilon
from fastdistill.engine.trainer import Trainer
from fastdistill.models import Denoiser
from fastdistill.models.adapters import build_network
from fastdistill.models.compiling import compile_blocks
from fastdistill.models.configs import model_configuration
from fastdistill.objectives import DistributionMatching, MatchingSettings

CRITIC_UPDATES = 5
GUIDANCE, TIME, MAX_NORM, EMA_DECAY = 7.5, 399.0, 10.0, 0.999
OPTIMIZER: dict[str, Any] = {"lr": 1e-6, "betas": (0.9, 0.999), "weight_decay": 0.01}
REDUCED: dict[str, dict[str, Any]] = {
    "sdxl": {
        "sample_size": 32,
        "block_out_channels": [32, 64, 128],
        "transformer_layers_per_block": [1, 1, 2],
        "attention_head_dim": [1, 2, 4],
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 6 * 32 + 64,
    },
    "dit": {
        "sample_size": 16,
        "num_layers": 8,
        "num_attention_heads": 4,
        "attention_head_dim": 48,
        "num_embeds_ada_norm": 100,
    },
}

Precision = Literal["float32", "autocast", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained: a configuration of `fastdistill.models.configs`, whole or reduced."""

    model: str
    batch: int
    small: bool
    device: torch.device

    @property
    def label(self) -> str:
        """As tables show it."""
        return f"{self.model}{', reduced' if self.small else ''}, batch {self.batch}"


class Problem:
    """The networks of a setting with fresh weights, and a batch that every step gets."""

    def __init__(self, setting: Setting, dtype: torch.dtype) -> None:
        config = model_configuration(setting.model)
        self.is_dit = config["_class_name"] == "DiTTransformer2DModel"
        if setting.small:
            config |= REDUCED["dit" if self.is_dit else "sdxl"]
        torch.manual_seed(0)
        with setting.device:
            self.network = build_network(config).to(dtype).requires_grad_(False)
        self.process = VP.dit() if self.is_dit else VP.stable_diffusion()
        self.shape = tuple(self.network.sample_shape)
        self.setting = setting
        condition = self.network.example_condition(
            setting.batch, dtype=dtype, device=setting.device
        )
        self.given = RealBatch(None, condition, self._null(condition))

    def _null(self, condition: Any) -> Any:
        if self.is_dit:
            return self.network.null_condition(condition)
        return pytree.tree_map(torch.zeros_like, condition)

    def batch(self, seed: int, step: int, count: int, share: slice = slice(None)) -> RealBatch:
        """The one batch, as `fastdistill.data.Data` gives it to one process."""
        return self.given

    def trainable(self, dtype: torch.dtype) -> nn.Module:
        """A copy of the network to train."""
        return copy.deepcopy(self.network).to(dtype).requires_grad_(True).train()


class Cycle(Protocol):
    """One of the two loops."""

    def run(self) -> None:
        """One student update and five critic updates."""

    def held(self) -> Iterator[Tensor]:
        """All tensors that stay from one cycle to the next."""

    def on_host(self) -> Iterator[Tensor]:
        """Those of them that a GPU's host has."""


class OurCycle:
    """The trainer of this project.

    Args:
        setting: what is trained.
        precision: float32 or bfloat16 with float32 masters.
        accelerated: replace layers by `fastdistill.accelerate`.
        training: more keys of `TrainingSettings`.
        matching: more keys of `MatchingSettings`.
    """

    def __init__(
        self,
        setting: Setting,
        precision: Precision,
        accelerated: bool = False,
        training: dict[str, Any] | None = None,
        matching: dict[str, Any] | None = None,
    ) -> None:
        low = precision == "bfloat16"
        problem = Problem(setting, torch.float32)
        student, critic = (problem.trainable(torch.float32) for _ in range(2))
        teacher = problem.network.to(torch.bfloat16 if low else torch.float32)
        if accelerated:
            from fastdistill.layers import accelerate

            for network in (student, critic, teacher):
                accelerate(network)
        dtype = torch.bfloat16 if low else None
        roles = [
            Denoiser(network, problem.process, Epsilon(), dtype)
            for network in (student, teacher, critic)
        ]
        objective = DistributionMatching(
            roles[0],
            roles[1],
            roles[2],
            student_times=[TIME],
            matching_law=Uniform(0.02, 0.98),
            critic_law=Uniform(),
            settings=MatchingSettings(guidance_scale=GUIDANCE, **(matching or {})),
        )
        rates = OptimizerSettings(**OPTIMIZER, clip_norm=MAX_NORM)
        settings = TrainingSettings(
            steps=10**6,
            batch_size=setting.batch,
            critic_updates_per_student_update=CRITIC_UPDATES,
            precision="bfloat16" if low else "float32",
            student=rates,
            critic=rates,
            **(training or {}),
        )
        if low:  # conditions in the dtype that the networks compute in
            problem.given = pytree.tree_map(
                lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v,
                problem.given,
            )
        self.trainer = Trainer(objective, problem, settings)

    def run(self) -> None:
        for _ in range(CRITIC_UPDATES):
            self.trainer.update()

    def held(self) -> Iterator[Tensor]:
        for arena in self.trainer.arenas.values():
            yield from arena.ranges.values()
            yield from arena.scales.values()
        yield from self.trainer.objective.networks()["teacher"].parameters()

    def on_host(self) -> Iterator[Tensor]:
        return iter(())


class EagerCycle:
    """The loop of DMD2 and FastGen.

    Args:
        setting: what is trained.
        precision: float32; autocast: bfloat16 forwards over float32 weights, the teacher's weights
            in bfloat16; bfloat16: bfloat16 weights, and float32 masters that torch's AdamW updates.
        compiled: torch.compile the networks' repeated blocks.
    """

    def __init__(self, setting: Setting, precision: Precision, compiled: bool = False) -> None:
        weights = torch.bfloat16 if precision == "bfloat16" else torch.float32
        problem = Problem(setting, torch.float32)
        self.networks = {role: problem.trainable(weights) for role in ("student", "critic")}
        low = precision != "float32"
        self.networks["teacher"] = problem.network.to(torch.bfloat16 if low else torch.float32)
        if compiled:
            for network in self.networks.values():
                compile_blocks(network)
        self.setting, self.precision, self.shape = setting, precision, problem.shape
        self.condition, self.uncondition = problem.given.condition, problem.given.uncondition
        self.input_dtype = weights
        alpha, sigma = problem.process.alpha_sigma(torch.arange(1000.0, device=setting.device))
        self.alphas, self.sigmas = alpha.double(), sigma.double()
        self.parameters = {r: list(self.networks[r].parameters()) for r in ("student", "critic")}
        self.masters = {r: self._masters(values) for r, values in self.parameters.items()}
        self.optimizers = {
            role: torch.optim.AdamW(values, foreach=True, **OPTIMIZER)
            for role, values in self.masters.items()
        }
        self.average = [value.detach().clone() for value in self.masters["student"]]
        self.log: dict[str, tuple[float, float]] = {}

    def _masters(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        if self.precision != "bfloat16":
            return parameters
        return [nn.Parameter(value.detach().float()) for value in parameters]

    def run(self) -> None:
        for step in range(CRITIC_UPDATES):
            student_turn = step == CRITIC_UPDATES - 1
            with torch.set_grad_enabled(student_turn):
                sample = self._generate()
            if student_turn:
                self._update("student", self._matching_loss(sample))
                self._move_average()
            self._update("critic", self._denoising_loss(sample.detach()))

    def held(self) -> Iterator[Tensor]:
        for network in self.networks.values():
            yield from network.parameters()
        for role, optimizer in self.optimizers.items():
            yield from self.masters[role]
            for state in optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))
        yield from self.average

    def on_host(self) -> Iterator[Tensor]:
        for optimizer in self.optimizers.values():
            yield from (state["step"] for state in optimizer.state.values())

    def _generate(self) -> Tensor:
        count, device = self.setting.batch, self.setting.device
        noise = torch.randn(count, *self.shape, device=device)
        t = torch.full((count,), int(TIME), device=device)
        return self._x0("student", noise, t, self.condition)

    def _x0(self, role: str, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """A network's denoised sample, converted in float64."""
        network = self.networks[role]
        dtype = next(network.parameters()).dtype
        cast = self.precision == "autocast" and role != "teacher"
        condition = pytree.tree_map(
            lambda v: v.to(dtype) if v.is_floating_point() else v, condition
        )
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=cast):
            eps = network(x_t.to(dtype), t.float(), condition)
        alpha, sigma = (v[t].view(-1, 1, 1, 1) for v in (self.alphas, self.sigmas))
        return ((x_t.double() - sigma * eps.double()) / alpha).float()

    def _noised(self, sample: Tensor, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
        t = torch.randint(low, high, (len(sample),), device=sample.device)
        noise = torch.randn_like(sample)
        alpha, sigma = (v[t].view(-1, 1, 1, 1) for v in (self.alphas, self.sigmas))
        return (alpha * sample.double() + sigma * noise.double()).float(), noise, t

    def _matching_loss(self, sample: Tensor) -> Tensor:
        with torch.no_grad():
            x_t, _, t = self._noised(sample, 20, 981)
            fake = self._x0("critic", x_t, t, self.condition)
            real = self._x0("teacher", x_t, t, self.condition)
            unconditional = self._x0("teacher", x_t, t, self.uncondition)
            real = unconditional + GUIDANCE * (real - unconditional)
            gradient = (fake - real) / (sample - real).abs().mean(dim=[1, 2, 3], keepdim=True)
            gradient = torch.nan_to_num(gradient)
            target = (sample.double() - gradient.double()).float()
        return 0.5 * nn.functional.mse_loss(sample, target)

    def _denoising_loss(self, sample: Tensor) -> Tensor:
        x_t, noise, t = self._noised(sample, 0, 1000)
        x0 = self._x0("critic", x_t, t, self.condition)
        alpha, sigma = (v[t].view(-1, 1, 1, 1) for v in (self.alphas, self.sigmas))
        eps = ((x_t.double() - alpha * x0.double()) / sigma).float()
        return nn.functional.mse_loss(eps, noise)

    def _update(self, role: str, loss: Tensor) -> None:
        loss.backward()
        parameters, masters = self.parameters[role], self.masters[role]
        if masters is not parameters:
            for master, value in zip(masters, parameters, strict=True):
                assert value.grad is not None
                master.grad, value.grad = value.grad.float(), None
        norm = nn.utils.clip_grad_norm_(masters, MAX_NORM)
        self.optimizers[role].step()
        self.optimizers[role].zero_grad(set_to_none=True)
        if masters is not parameters:
            with torch.no_grad():
                torch._foreach_copy_(list(parameters), list(masters))
        self.log[role] = loss.item(), norm.item()

    @torch.no_grad()
    def _move_average(self) -> None:
        for average, value in zip(self.average, self.masters["student"], strict=True):
            average.lerp_(value, 1 - EMA_DECAY)
