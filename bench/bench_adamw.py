"""`sum_of_squares` and `adamw_ema_` beside torch's clipping, AdamW, EMA and copy.

One update of a network of 60 tensors: the global norm, clipping, AdamW, one moving average and a
bfloat16 copy of the weights. Ours works on flat tensors, torch's on 60 views of the same memory,
with `clip_grad_norm_`, `torch.optim.AdamW` (fused or foreach), `_foreach_lerp_` and
`_foreach_copy_`. torch's AdamW takes gradients in the parameters' dtype alone, so that bfloat16
gradients are cast first.

Two cases stand for the arena of a shard: 200 ranges of three groups, and moments of 8 bits. Their
rivals have one group and float32 moments, which the judge of the second does not compare.

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
from fastdistill.ops import (
    MOMENT_BLOCK,
    adamw_ema_,
    dequantise_moment,
    quantise_moment,
    sum_of_squares,
)
from fastdistill.ops.adamw import _adamw_ema_
from fastdistill.ops.norm import _sum_of_squares

LR, BETAS, EPS, DECAY, MAX_NORM, EMA_DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01, 1.0, 0.999
STEPS_DONE = 10
TOLERANCE = 1e-3

OptimizerOf = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Tensors = tuple[Tensor, ...] | list[Tensor]


class Kind(NamedTuple):
    """What an update is of."""

    elements: int
    dtype: torch.dtype = torch.float32
    """Of the gradients"""
    ranges: int = 1
    coded: bool = False
    """Whether moments have 8 bits"""

    def __str__(self) -> str:
        ranges = f" in {self.ranges} ranges" if self.ranges > 1 else ""
        return f"{self.elements:,}{ranges}{', 8-bit moments' if self.coded else ''}"

    @property
    def bytes_moved(self) -> int:
        """Norm, then parameter, moments and EMA both ways, gradient, copy."""
        moments = 2 * (2 + 8 / 256) if self.coded else 2 * 8
        return int((2 * 8 + moments + 2 * self.dtype.itemsize + 2) * self.elements)


class State(NamedTuple):
    """One set: everything that an update reads and writes, flat."""

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    ema: Tensor
    copy: Tensor
    counters: Tensor
    ticket: Tensor
    exp_avg_scale: Tensor | None = None
    exp_avg_sq_scale: Tensor | None = None
    moment_key: Tensor | None = None


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    count = 1000 if small else 10_000_000
    kinds = [Kind(count), Kind(count, torch.bfloat16), Kind(count, ranges=200)]
    # Of a length that 256 does not divide, inductor (torch 2.13) reads past the end of the scales.
    kinds.append(Kind(count + -count % MOMENT_BLOCK, torch.bfloat16, coded=True))
    kinds += [] if small else [Kind(100_000_000), Kind(1_000_000)]
    return (_case(kind, device) for kind in kinds)


def _case(kind: Kind, device: torch.device) -> Case:
    count = kind.elements

    def make(generator: torch.Generator) -> State:
        numbers = [draw_long(count, torch.float32, generator) for _ in range(5)]
        parameter, gradient, exp_avg, exp_avg_sq, ema = numbers
        state = State(
            parameter.mul_(0.05),
            gradient.mul_(0.01).to(kind.dtype),
            exp_avg.mul_(1e-3),
            exp_avg_sq.square_().mul_(1e-6),
            torch.full((), float(STEPS_DONE), device=device),
            ema.mul_(0.05),
            torch.empty(count, dtype=torch.bfloat16, device=device),
            torch.zeros(2, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
        )
        return _with_codes(state) if kind.coded else state

    variants = {
        OURS: Variant(_ours(kind)),
        "torch fused AdamW, foreach EMA": Variant(_torch(adamw(fused=True))),
        "torch foreach AdamW, foreach EMA": Variant(_torch(adamw(foreach=True))),
    }
    if device.type == "cuda" and importlib.util.find_spec("apex"):
        variants["apex fused Adam, foreach EMA"] = Variant(_torch(_apex))
    return Case(
        *("adamw_ema_", str(kind), kind.dtype, kind.bytes_moved),
        make=make,
        variants=variants | reference_peers(_reference, tuple, device.type == "cuda", eager=False),
        judge=_judge,
        ceiling="scale",
        in_place=True,
    )


def _with_codes(state: State) -> State:
    m, m_scale = quantise_moment(state.exp_avg, signed=True)
    v, v_scale = quantise_moment(state.exp_avg_sq, signed=False)
    key = torch.tensor([1, 2, 3], device=m.device)
    scales = {"exp_avg_scale": m_scale, "exp_avg_sq_scale": v_scale}
    return state._replace(exp_avg=m, exp_avg_sq=v, **scales, moment_key=key)


def _moments(state: State) -> tuple[Tensor, Tensor]:
    """Moments in float32: the state's own, or new tensors where they are codes."""
    if state.exp_avg_scale is None or state.exp_avg_sq_scale is None:
        return state.exp_avg, state.exp_avg_sq
    return (
        dequantise_moment(state.exp_avg, state.exp_avg_scale, signed=True),
        dequantise_moment(state.exp_avg_sq, state.exp_avg_sq_scale, signed=False),
    )


def options() -> dict[str, Any]:
    """AdamW's hyper-parameters."""
    return {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}


def _ours(kind: Kind) -> Callable[[State], Run]:
    starts = [kind.elements * k // kind.ranges for k in range(kind.ranges)]
    groups = [k % 3 for k in range(kind.ranges)]

    def bind(state: State) -> Run:
        def run() -> Results:
            adamw_ema_(
                *state[:5],
                **options() | {"lr": [LR] * 3},
                starts=starts,
                groups=groups,
                squared_norm=sum_of_squares(state.gradient, ticket=state.ticket),
                max_norm=MAX_NORM,
                emas=(state.ema,),
                ema_decays=(EMA_DECAY,),
                copy=state.copy,
                counters=state.counters,
                exp_avg_scale=state.exp_avg_scale,
                exp_avg_sq_scale=state.exp_avg_sq_scale,
                moment_key=state.moment_key,
            )
            return ()

        return run

    return bind


def _reference(*values: Any) -> Results:
    state = State(*values)
    squared_norm = _sum_of_squares.reference(state.gradient)
    _adamw_ema_.reference(
        *(*state[:5], [state.ema], state.copy, state.exp_avg_scale, state.exp_avg_sq_scale),
        *(state.counters, squared_norm, None, None, None, state.moment_key),
        *([0], [0], [LR], [DECAY], *BETAS, EPS, MAX_NORM, [EMA_DECAY], False),
    )
    return ()


def adamw(**implementation: Any) -> OptimizerOf:
    """torch's AdamW in one of its implementations."""
    return lambda parameters: torch.optim.AdamW(parameters, **options(), **implementation)


def _apex(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from apex.optimizers import FusedAdam

    return FusedAdam(parameters, **options(), adam_w_mode=True)


class Views(NamedTuple):
    """What torch's functions work on: the tensors of a network in each role."""

    weights: Tensors
    gradients: Tensors
    exp_avg: Tensors
    exp_avg_sq: Tensors
    emas: Tensors
    copies: Tensors
    """In bfloat16; empty for a network that has none."""


class TorchUpdate:
    """Clip, step, average and copy by torch's functions, in place."""

    def __init__(self, optimizer_of: OptimizerOf, views: Views) -> None:
        self._views = views
        self.parameters = [nn.Parameter(weight) for weight in views.weights]
        cast = views.gradients[0].dtype != views.weights[0].dtype
        self._casts = [torch.empty_like(weight) for weight in views.weights] if cast else []
        for parameter, gradient in zip(
            self.parameters, self._casts or views.gradients, strict=True
        ):
            parameter.grad = gradient
        self.optimizer = optimizer_of(self.parameters)
        # As torch has it: on the host but for fused kernels, which would else wait for the device.
        device = views.weights[0].device if self.optimizer.defaults.get("fused") else "cpu"
        for parameter, m, v in zip(self.parameters, views.exp_avg, views.exp_avg_sq, strict=True):
            step = torch.full((), float(STEPS_DONE), device=device)
            self.optimizer.state[parameter] = {"step": step, "exp_avg": m, "exp_avg_sq": v}

    @torch.no_grad()
    def __call__(self) -> Results:
        weights, gradients, _, _, emas, copies = self._views
        if self._casts:
            torch._foreach_copy_(self._casts, gradients)
        nn.utils.clip_grad_norm_(self.parameters, MAX_NORM, foreach=True)
        self.optimizer.step()
        torch._foreach_lerp_(emas, weights, 1 - EMA_DECAY)
        if copies:
            torch._foreach_copy_(copies, weights)
        return ()


def _torch(optimizer_of: OptimizerOf) -> Callable[[State], Run]:
    """torch's update of views of the state that are as many as a network's tensors."""

    def bind(state: State) -> Run:
        flat = (state.parameter, state.gradient, *_moments(state), state.ema, state.copy)
        return TorchUpdate(optimizer_of, Views(*map(split_like_a_network, flat)))

    return bind


def exact_update(
    parameter: Tensor, gradient: Tensor, m: Tensor, v: Tensor, ema: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In float64: change of the parameter, change of the average, both moments."""
    g = gradient * (MAX_NORM / (norm + 1e-6)).clamp(max=1)
    t, (beta1, beta2) = STEPS_DONE + 1, BETAS
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    denominator = (v / (1 - beta2**t)).sqrt() + EPS
    changed = parameter * (1 - LR * DECAY) - LR / (1 - beta1**t) * m / denominator
    return changed - parameter, (1 - EMA_DECAY) * (changed - ema), m, v


def fault_of_copy(copy: Tensor, weights: Tensor) -> str | None:
    """What is wrong with a bfloat16 copy of weights, both as float64."""
    if ((copy - weights).abs() > 2**-7 * weights.abs()).any():
        return "the copy is more than one bfloat16 away from the parameter"
    return None


def _judge(state: State) -> Judge:
    """Compare the changes of about 10^5 elements with AdamW in float64."""
    stride = max(state.parameter.numel() // 10**5, 1)

    def taken(value: Tensor) -> Tensor:
        return value[::stride].double()

    parameter, gradient, ema = taken(state.parameter), taken(state.gradient), taken(state.ema)
    m, v = map(taken, _moments(state))
    norm = exact_sum_of_squares(state.gradient).sqrt()
    changes = exact_update(parameter, gradient, m, v, ema, norm)
    coded = state.moment_key is not None
    usual = near(changes[:2] if coded else changes, TOLERANCE)

    def judge(_: Results) -> str | None:
        weights, averages, copy = map(taken, (state.parameter, state.ema, state.copy))
        moments = () if coded else tuple(map(taken, _moments(state)))
        return fault_of_copy(copy, weights) or usual(
            (weights - parameter, averages - ema, *moments)
        )

    return judge
