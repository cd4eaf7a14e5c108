"""`sum_of_squares` and `adamw_ema_` beside torch's clipping, AdamW, EMA and copy.

One update of a network of 60 tensors: the global norm, clipping, AdamW, one moving average and a
bfloat16 copy of the weights. Ours works on flat tensors, torch's on 60 views of the same memory,
with `clip_grad_norm_`, `torch.optim.AdamW` (fused or foreach), `_foreach_lerp_` and
`_foreach_copy_`. torch's AdamW takes gradients in the parameters' dtype alone, so that bfloat16
gradients are cast first.

Everything is changed in place: the ceiling is a scaling in place, every variant is proven on a
fresh set, and compared are the changes, not the weights that an update leaves almost as they were.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.bench_norm import exact_sum_of_squares
from bench.harness import OURS, Case, Judge, Results, Run, Variant, near
from bench.inputs import draw_long
from bench.peers import reference_peers, split_like_a_network
from fastdistill.ops import adamw_ema_, sum_of_squares
from fastdistill.ops.adamw import _adamw_ema_
from fastdistill.ops.norm import _sum_of_squares

LR, BETAS, EPS, DECAY, MAX_NORM, EMA_DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01, 1.0, 0.999
STEPS_DONE = 10
TOLERANCE = 1e-3


class State(NamedTuple):
    """One set: everything that an update reads and writes, flat."""

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    ema: Tensor
    copy: Tensor


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    if small:
        return (_case(1000, dtype, device) for dtype in (torch.float32, torch.bfloat16))
    sizes = [(10_000_000, torch.float32), (10_000_000, torch.bfloat16)]
    sizes += [(100_000_000, torch.float32), (1_000_000, torch.float32)]
    return (_case(count, dtype, device) for count, dtype in sizes)


def _case(count: int, dtype: torch.dtype, device: torch.device) -> Case:
    def make(generator: torch.Generator) -> State:
        numbers = [draw_long(count, torch.float32, generator) for _ in range(5)]
        parameter, gradient, exp_avg, exp_avg_sq, ema = numbers
        return State(
            parameter.mul_(0.05),
            gradient.mul_(0.01).to(dtype),
            exp_avg.mul_(1e-3),
            exp_avg_sq.square_().mul_(1e-6),
            torch.full((), float(STEPS_DONE), device=device),
            ema.mul_(0.05),
            torch.empty(count, dtype=torch.bfloat16, device=device),
        )

    variants = {
        OURS: Variant(_ours),
        "torch fused AdamW, foreach EMA": Variant(_torch(_adamw(fused=True))),
        "torch foreach AdamW, foreach EMA": Variant(_torch(_adamw(foreach=True))),
    }
    if device.type == "cuda" and importlib.util.find_spec("apex"):
        variants["apex fused Adam, foreach EMA"] = Variant(_torch(_apex))
    # Bytes a parameter: norm, then parameter, moments and EMA both ways, gradient, copy.
    per_parameter = dtype.itemsize + (4 * 8 + dtype.itemsize + 2)
    return Case(
        *("adamw_ema_", f"{count:,}", dtype, per_parameter * count),
        make=make,
        variants=variants | reference_peers(_reference, tuple, device.type == "cuda", eager=False),
        judge=_judge,
        ceiling="scale",
        in_place=True,
    )


def _options() -> dict[str, Any]:
    return {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}


def _ours(state: State) -> Run:
    def run() -> Results:
        adamw_ema_(
            *state[:5],
            **_options(),
            squared_norm=sum_of_squares(state.gradient),
            max_norm=MAX_NORM,
            emas=(state.ema,),
            ema_decays=(EMA_DECAY,),
            copy=state.copy,
        )
        return ()

    return run


def _reference(*state: Any) -> Results:
    parameter, gradient, exp_avg, exp_avg_sq, step, ema, copy = state
    squared_norm = _sum_of_squares.reference(gradient)
    _adamw_ema_.reference(
        *(parameter, gradient, exp_avg, exp_avg_sq, step, [ema], copy, squared_norm),
        *(None, None, None, [0], [LR], [DECAY], *BETAS, EPS, MAX_NORM, [EMA_DECAY], False),
    )
    return ()


def _adamw(**implementation: Any) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, **_options(), **implementation)


def _apex(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from apex.optimizers import FusedAdam

    return FusedAdam(parameters, **_options(), adam_w_mode=True)


def _torch(
    optimizer_of: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> Callable[[State], Run]:
    """Clip, step, average and copy over views of the state that are as many as a network's."""

    def bind(state: State) -> Run:
        views = [split_like_a_network(value) for value in state if value.ndim]
        weights, gradients, exp_avg, exp_avg_sq, emas, copies = views
        parameters = [nn.Parameter(weight) for weight in weights]
        cast = state.gradient.dtype != state.parameter.dtype
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.empty_like(parameter) if cast else gradient
        own = [parameter.grad for parameter in parameters if parameter.grad is not None]
        optimizer = optimizer_of(parameters)
        for parameter, m, v in zip(parameters, exp_avg, exp_avg_sq, strict=True):
            step = state.step.clone()
            optimizer.state[parameter] = {"step": step, "exp_avg": m, "exp_avg_sq": v}

        @torch.no_grad()
        def run() -> Results:
            if cast:
                torch._foreach_copy_(own, gradients)
            nn.utils.clip_grad_norm_(parameters, MAX_NORM, foreach=True)
            optimizer.step()
            torch._foreach_lerp_(emas, weights, 1 - EMA_DECAY)
            torch._foreach_copy_(copies, weights)
            return ()

        return run

    return bind


def _judge(state: State) -> Judge:
    """Compare the changes of about 10^5 elements with AdamW in float64."""
    stride = max(state.parameter.numel() // 10**5, 1)
    taken = [value[::stride].double() for value in state if value.ndim]
    parameter, gradient, m, v, ema, _ = taken
    norm = exact_sum_of_squares(state.gradient).sqrt()
    g = gradient * (MAX_NORM / (norm + 1e-6)).clamp(max=1)
    t, (beta1, beta2) = STEPS_DONE + 1, BETAS
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    denominator = (v / (1 - beta2**t)).sqrt() + EPS
    changed = parameter * (1 - LR * DECAY) - LR / (1 - beta1**t) * m / denominator
    moved = (1 - EMA_DECAY) * (changed - ema)
    usual = near((changed - parameter, m, v, moved), TOLERANCE)

    def judge(_: Results) -> str | None:
        found = [value[::stride] for value in state if value.ndim]
        weights, averages, copy = (found[place].double() for place in (0, 4, 5))
        if ((copy - weights).abs() > 2**-7 * weights.abs()).any():
            return "the copy is more than one bfloat16 away from the parameter"
        changes = weights - parameter, averages - ema
        return usual((changes[0], found[2], found[3], changes[1]))

    return judge
