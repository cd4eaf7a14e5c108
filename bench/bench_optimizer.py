"""`ArenaAdamW` beside torch's optimizers: the whole update of a network of 60 or 1,680 tensors.

An update is clipping by the global norm, AdamW, one moving average and, where the network computes
in bfloat16 ("copy"), the cast of its weights. torch's are `clip_grad_norm_`, `torch.optim.AdamW`
(fused or foreach), `_foreach_lerp_` and `_foreach_copy_`, on the same memory: the arena's views.
Shapes name the parameters and the tensors that they are in; 1,680 tensors are SDXL's, scaled, and
60 grow with a cube. The dtype is that of the gradients.

Bytes a parameter: gradient read twice, weights, moments and average both ways, copy written: 42; 38
with bfloat16 gradients, 26 with 8-bit moments too ("8bit"), which torch has not. It takes gradients
in the parameters' dtype alone, so that bfloat16 ones are cast first.

"backward" adds what gradients cost: `zero_grad`, then the backward of a graph that is kept, which
computes each gradient as a new tensor and does no more. torch drops the old gradients and takes the
new ones over, at no cost in time. Ours clears its range (4 bytes a parameter) and autograd adds to
it (12). "gradients dropped" is `module.zero_grad()`: the update copies the new ones in (8).

"of 1 element" is the host's time: an update of as many tensors with next to nothing in them. (Ours
still walks through the 256 elements to which the arena aligns each.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.bench_adamw import (
    EMA_DECAY,
    MAX_NORM,
    STEPS_DONE,
    TOLERANCE,
    TorchUpdate,
    Views,
    adamw,
    exact_update,
    fault_of_copy,
    options,
)
from bench.bench_norm import exact_sum_of_squares
from bench.harness import OURS, Case, Judge, Results, Run, Variant, near
from bench.inputs import draw_long
from bench.networks import sizes_like_sdxl
from bench.peers import split_like_a_network
from fastdistill.ops import MOMENT_BLOCK
from fastdistill.optim import ArenaAdamW
from fastdistill.optim.arena import Moments

SDXL, SDXL_TENSORS = 2_567_463_684, 1680
ROLES = {"parameter": 0.05, "gradient": 0.01, "exp_avg": 1e-3, "exp_avg_sq": 1e-6, "ema_0": 0.05}
"""What a parameter has, in the order of `Views`, and how large the numbers in it are."""
ROUNDING = 0.05
"""Relative error of 8-bit moments."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One network and what is done with it."""

    count: int
    tensors: int
    copy: bool = True
    gradient: torch.dtype = torch.float32
    moments: Moments = "float32"
    backward: bool = False

    @property
    def label(self) -> str:
        """The shape as tables show it."""
        count = f"{self.count / 1e6:,.0f}M" if self.count >= 10**6 else f"{self.count:,}"
        alone = self.count == self.tensors
        size = f"{count} of 1 element" if alone else f"{count} in {self.tensors:,}"
        marks = {"copy": self.copy, "8bit": self.moments == "8bit", "backward": self.backward}
        return ", ".join([size, *(mark for mark, holds in marks.items() if holds)])

    @property
    def bytes_moved(self) -> int:
        """By the model at the top of this file; a backward reads one number and writes one."""
        moments = 2 * (2 + 8 / MOMENT_BLOCK) if self.moments == "8bit" else 2 * 8
        update = 2 * 8 + moments + 2 * self.gradient.itemsize + 2 * self.copy
        return int(self.count * (update + 24 * self.backward))

    def sizes(self) -> list[int]:
        """Elements of each tensor."""
        if self.count == self.tensors:
            return [1] * self.count
        if self.tensors == SDXL_TENSORS:
            return sizes_like_sdxl(self.count)
        pieces = split_like_a_network(torch.empty(self.count, device="meta"), self.tensors)
        return [len(piece) for piece in pieces]


class Inputs(NamedTuple):
    """One set: an optimizer, and all that an update reads and changes."""

    optimizer: ArenaAdamW
    ranges: dict[str, Tensor]
    scales: dict[str, Tensor]
    step: Tensor
    cotangents: list[Tensor]
    """What a backward gives; empty where there is none."""


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    if small:
        whole, few, many = 10_000, 3, 5
    else:
        whole, few, many = _largest(device), 60, SDXL_TENSORS
    settings = [
        Setting(whole, many),
        Setting(whole, few),
        Setting(many, many),
        Setting(few, few),
        Setting(whole, many, gradient=torch.bfloat16),
        Setting(whole, many, gradient=torch.bfloat16, moments="8bit"),
        Setting(whole, many, copy=False),
        Setting(whole, few, copy=False),
        Setting(min(whole, 100_000_000), many, copy=False, backward=True),
    ]
    return (_case(setting) for setting in settings)


def _largest(device: torch.device) -> int:
    """SDXL's parameters where a GPU has room, else 100 million.

    A parameter takes 22 bytes in its arena, as many in what the ceiling scales, and up to 12 in
    torch's temporaries.
    """
    if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory > 56 * SDXL:
        return SDXL
    return 100_000_000


def _case(setting: Setting) -> Case:
    ours = {OURS: _ours(setting, dropped=False)}
    if setting.backward:
        ours["fastdistill, gradients dropped"] = _ours(setting, dropped=True)
    peers = {
        "torch fused AdamW, foreach EMA": Variant(_by_torch(setting, fused=True)),
        "torch foreach AdamW, foreach EMA": Variant(_by_torch(setting, foreach=True)),
    }
    return Case(
        *("optimizer", setting.label, setting.gradient, setting.bytes_moved),
        make=lambda generator: _make(setting, generator),
        variants=ours | ({} if setting.moments == "8bit" else peers),
        judge=_judge,
        ceiling="scale",
        in_place=True,
    )


def _make(setting: Setting, generator: torch.Generator) -> Inputs:
    device, sizes = generator.device, setting.sizes()
    dtype = torch.bfloat16 if setting.copy else torch.float32
    optimizer = ArenaAdamW(
        [nn.Parameter(torch.zeros(size, dtype=dtype, device=device)) for size in sizes],
        **options(),
        max_norm=MAX_NORM,
        ema_decays=[EMA_DECAY],
        moments=setting.moments,
        gradient_dtype=setting.gradient,
    )
    arena, step = optimizer.arena, optimizer.counts["step"]
    for role, scale in ROLES.items():
        numbers = draw_long(max(sizes), torch.float32, generator).mul_(scale)
        if role == "exp_avg_sq":
            numbers.abs_()
        arena.load(role, [numbers[:size] for size in sizes])
    step.fill_(STEPS_DONE)
    gradients = arena.views("gradient") if setting.backward else []
    cotangents = [gradient.clone() for gradient in gradients]
    return Inputs(optimizer, arena.ranges, arena.scales, step, cotangents)


def _ours(setting: Setting, dropped: bool) -> Variant:
    def bind(inputs: Inputs) -> Run:
        optimizer = inputs.optimizer
        parameters = optimizer.arena.parameters

        def drop() -> None:
            for parameter in parameters:
                parameter.grad = None

        def update() -> Results:
            optimizer.step()
            return ()

        if not setting.backward:
            return update
        return _after_backward(inputs, parameters, update, drop if dropped else optimizer.zero_grad)

    return Variant(bind)


def _by_torch(setting: Setting, **implementation: Any) -> Callable[[Inputs], Run]:
    def bind(inputs: Inputs) -> Run:
        arena = inputs.optimizer.arena
        copies = arena.views("copy") if setting.copy else []
        views = Views(*[*map(arena.views, ROLES), copies])
        update = TorchUpdate(adamw(**implementation), views)
        if not setting.backward:
            return update
        return _after_backward(inputs, update.parameters, update, update.optimizer.zero_grad)

    return bind


def _after_backward(
    inputs: Inputs, parameters: Sequence[Tensor], update: Run, zero_grad: Callable[[], None]
) -> Run:
    """Let every update clear the gradients of the last one and get its own from a backward."""
    pairs = zip(parameters, inputs.cotangents, strict=True)
    # By .data autograd does not mind when cotangents are filled anew.
    roots = [torch.dot(parameter, cotangent.data) for parameter, cotangent in pairs]

    def run() -> Results:
        zero_grad()
        torch.autograd.backward(roots, retain_graph=True)
        return update()

    return run


def _judge(inputs: Inputs) -> Judge:
    """Compare the changes of about 10^5 elements with AdamW in float64."""
    arena = inputs.optimizer.arena
    stride = max(arena.layout.size // 10**5, 1)

    def taken(role: str) -> Tensor:
        return arena.decoded(role)[::stride].double()

    norm = exact_sum_of_squares(arena.ranges["gradient"]).sqrt()
    parameter, gradient, m, v, ema = map(taken, ROLES)
    exact = exact_update(parameter, gradient, m, v, ema, norm)
    changes = near(exact[:2], TOLERANCE)
    moments = near(exact[2:], ROUNDING if arena.scales else TOLERANCE)

    def judge(_: Results) -> str | None:
        weights = taken("parameter")
        fault = fault_of_copy(taken("copy"), weights) if "copy" in arena.ranges else None
        fault = fault or changes((weights - parameter, taken("ema_0") - ema))
        return fault or moments((taken("exp_avg"), taken("exp_avg_sq")))

    return judge
