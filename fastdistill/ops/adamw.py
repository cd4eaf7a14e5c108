"""`adamw_ema_`: everything that one update does to parameter-sized memory, in one pass.

With n = step updates done, t = n + 1, and the squared norm of the scaled gradient on the device,

    skip the update where squared_norm is not finite: nothing below is written
    norm   = sqrt(squared_norm) / grad_scale
    g      = gradient / grad_scale * min(1, max_norm / (norm + 1e-6))
    p      = p (1 - lr weight_decay)
    m      = beta1 m + (1 - beta1) g
    v      = beta2 v + (1 - beta2) g^2
    p      = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    ema_k  = ema_k + (1 - decay_k) (p - ema_k),    decay_k = min(decay_k, (1 + n) / (10 + n))
    copy   = p, rounded to nearest or stochastically
    step   = t

which is `torch.optim.AdamW` after `torch.nn.utils.clip_grad_norm_`. A stochastically rounded
bfloat16 copy is (bits(p) + w) with its low 16 bits cleared, w the high half of the word that
`fastdistill.ops.noise` gives element e of sample e // 2^34 from counter block (e // 4) mod 2^32.

Learning rate and weight decay may differ between groups, contiguous ranges of the flat tensors;
lr_factor is a device scalar that multiplies the learning rate, so that a captured graph follows a
schedule.

Bytes moved, float32 state: parameter, moments and each EMA read and written once (8 bytes each),
the gradient read once, the copy written once: 38 bytes a parameter with float32 gradients, one EMA
and a bfloat16 copy. Stochastic rounding adds none: its noise is made in registers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.ops._arguments import check_floating
from fastdistill.ops._op import Op
from fastdistill.ops.noise import check_key, philox_4x32

CLIP_FLOOR = 1e-6


def _per_element(values: Sequence[float], starts: Sequence[int], like: Tensor) -> Tensor:
    """The value of each element's group, or one scalar where there is one group."""
    exact = torch.tensor(values, dtype=torch.float64, device=like.device)
    if len(starts) == 1:
        return exact[0]
    ends = [*starts[1:], like.numel()]
    sizes = torch.tensor([end - start for start, end in zip(starts, ends, strict=True)])
    return exact.repeat_interleave(sizes.to(like.device))


def _stochastic_bfloat16(value: Tensor, key: Tensor) -> Tensor:
    """float32 rounded to bfloat16, up with the probability of what is cut off."""
    mask = 0xFFFFFFFF
    seed, stream, step = key.unbind()
    block = torch.arange(-(-value.numel() // 4), device=value.device)
    counter = (block & mask, block >> 32, step & mask, stream & mask)
    words = philox_4x32(counter, (seed & mask, (seed >> 32) & mask))
    noise = (torch.stack(words, dim=-1).flatten()[: value.numel()] >> 16).to(torch.int32)
    bits = value.float().view(torch.int32)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value.float()).to(torch.bfloat16)


def _reference(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    emas: Sequence[Tensor],
    copy: Tensor | None,
    squared_norm: Tensor | None,
    grad_scale: Tensor | None,
    lr_factor: Tensor | None,
    key: Tensor | None,
    starts: Sequence[int],
    lr: Sequence[float],
    weight_decay: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
    max_norm: float | None,
    ema_decays: Sequence[float],
    ema_warmup: bool,
) -> None:
    compute = parameter.dtype
    finite = torch.ones((), dtype=torch.bool, device=parameter.device)
    factor = torch.ones((), dtype=compute, device=parameter.device)
    if grad_scale is not None:
        factor = factor / grad_scale.to(compute)
    if squared_norm is not None:
        finite = squared_norm.isfinite()
        norm = squared_norm.to(compute).sqrt() * factor
        if max_norm is not None:
            factor = factor * (max_norm / (norm + CLIP_FLOOR)).clamp(max=1.0)
    done = step.double()
    correction1, correction2 = 1 - beta1 ** (done + 1), 1 - beta2 ** (done + 1)
    rate = _per_element(lr, starts, parameter)
    rate = rate if lr_factor is None else rate * lr_factor.double()
    decay = 1 - rate * _per_element(weight_decay, starts, parameter)

    g = gradient.to(compute) * factor
    m = exp_avg.lerp(g, 1 - beta1)
    v = beta2 * exp_avg_sq + (1 - beta2) * g * g
    denominator = v.sqrt() / correction2.sqrt().to(compute) + eps
    p = parameter * decay.to(compute) - (rate / correction1).to(compute) * m / denominator
    early = (1 + done) / (10 + done)
    updates = [(parameter, p), (exp_avg, m), (exp_avg_sq, v)]
    for ema, wanted in zip(emas, ema_decays, strict=True):
        kept = early.clamp(max=wanted) if ema_warmup else torch.full_like(early, wanted)
        updates.append((ema, ema.lerp(p, (1 - kept).to(compute))))
    if copy is not None:
        rounded = p.to(copy.dtype) if key is None else _stochastic_bfloat16(p, key)
        updates.append((copy, rounded))
    for old, new in updates:
        old.copy_(torch.where(finite, new, old))
    step.add_(finite.to(step.dtype))


_adamw_ema_ = Op(
    "adamw_ema_",
    "(Tensor(a!) parameter, Tensor gradient, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
    "Tensor(d!) step, Tensor(e!)[] emas, Tensor(f!)? copy, Tensor? squared_norm, "
    "Tensor? grad_scale, Tensor? lr_factor, Tensor? key, int[] starts, float[] lr, "
    "float[] weight_decay, float beta1, float beta2, float eps, float? max_norm, "
    "float[] ema_decays, bool ema_warmup) -> ()",
    _reference,
    lambda *args: None,
    kernel="adamw",
    batch_outputs=0,
    replicated=None,
)


def _check_flat(like: Tensor, **tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if value is None:
            continue
        check_floating(name, value)
        if value.shape != like.shape or value.device != like.device:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} on {value.device}; expected "
                f"{tuple(like.shape)} on {like.device}, as parameter has"
            )
        if not value.is_contiguous():
            raise ValueError(f"{name} has strides {value.stride()}; expected a contiguous range")


def _check_scalar(parameter: Tensor, **tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if value is not None and (value.numel() != 1 or value.device != parameter.device):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} on {value.device}; expected a scalar on "
                f"{parameter.device}, where parameter is"
            )


def _check_groups(parameter: Tensor, starts: Sequence[int], *values: Sequence[float]) -> None:
    ascending = all(a < b for a, b in itertools.pairwise((*starts, max(parameter.numel(), 1))))
    if not starts or starts[0] != 0 or not ascending:
        raise ValueError(
            f"starts is {list(starts)}; expected the first elements of the groups, ascending from "
            f"0 and below {parameter.numel()}"
        )
    if any(len(value) != len(starts) for value in values):
        raise ValueError(
            f"{len(starts)} groups have {' and '.join(str(len(value)) for value in values)} values "
            "of lr and weight_decay; expected one number, or one for each group"
        )


def adamw_ema_(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    lr: float | Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 0.01,
    starts: Sequence[int] = (0,),
    squared_norm: Tensor | None = None,
    max_norm: float | None = None,
    grad_scale: Tensor | None = None,
    lr_factor: Tensor | None = None,
    emas: Sequence[Tensor] = (),
    ema_decays: Sequence[float] = (),
    ema_warmup: bool = False,
    copy: Tensor | None = None,
    key: Tensor | None = None,
) -> None:
    """One AdamW update of a flat range, in place, with all that belongs to it.

    Nothing waits for the host: whether the update happens is decided on the device.

    Args:
        parameter: master weights, float32 (float64 off the GPU), contiguous, any shape.
        gradient: gradients in any floating dtype; they are only read.
        exp_avg: first moments, in the parameters' dtype.
        exp_avg_sq: second moments, in the parameters' dtype.
        step: number of updates done, a float32 scalar on the device; counted up.
        lr: learning rate, or one for each group.
        betas: decays of the moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay, or one for each group.
        starts: first element of each group, ascending from 0.
        squared_norm: `sum_of_squares` of all gradients that are clipped together, as they are
            stored; where it is not finite the update is skipped. Without it nothing is checked.
        max_norm: bound of the global norm; needs ``squared_norm``.
        grad_scale: the loss scale that gradients are divided by, a device scalar.
        lr_factor: device scalar that multiplies every learning rate.
        emas: moving averages of the parameters, in their dtype.
        ema_decays: share of itself that each average keeps.
        ema_warmup: let averages forget at least as fast as (1 + n) / (10 + n) after n updates.
        copy: the parameters in a dtype to compute in, written.
        key: noise key (seed, stream, step), int64 [3]: round a bfloat16 copy stochastically.

    Raises:
        ValueError: for tensors that do not belong together and options that exclude each other.
    """
    check_floating("parameter", parameter)
    if hasattr(parameter, "to_local"):
        raise ValueError(
            "parameter is a DTensor; an update is of one rank's range: pass to_local() of all"
        )
    if parameter.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"parameter is {parameter.dtype}; expected float32 master weights, with the "
            "low-precision weights as copy"
        )
    state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    state |= {f"emas[{k}]": ema for k, ema in enumerate(emas)}
    for name, value in state.items():
        if value.dtype != parameter.dtype:
            raise ValueError(f"{name} is {value.dtype}; expected {parameter.dtype}")
    _check_flat(parameter, parameter=parameter, gradient=gradient, copy=copy, **state)
    scalars = {"squared_norm": squared_norm, "grad_scale": grad_scale, "lr_factor": lr_factor}
    _check_scalar(parameter, step=step, **scalars)
    rates = [lr] * len(starts) if isinstance(lr, (int, float)) else list(lr)
    decays = (
        [weight_decay] * len(starts)
        if isinstance(weight_decay, (int, float))
        else list(weight_decay)
    )
    _check_groups(parameter, starts, rates, decays)
    if len(emas) != len(ema_decays):
        raise ValueError(f"there are {len(emas)} emas and {len(ema_decays)} ema_decays")
    if max_norm is not None and squared_norm is None:
        raise ValueError(f"max_norm is {max_norm}, which needs squared_norm")
    if key is not None:
        check_key(key, key)
        if copy is None or copy.dtype != torch.bfloat16:
            raise ValueError("key rounds a bfloat16 copy stochastically; there is none")
    with torch.no_grad():
        _adamw_ema_(
            *(parameter, gradient, exp_avg, exp_avg_sq, step, list(emas), copy),
            *(squared_norm, grad_scale, lr_factor, key, list(starts), rates, decays),
            *(*betas, eps, max_norm, list(ema_decays), ema_warmup),
        )
