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

Learning rate and weight decay may differ between groups of parameters, each of which is any number
of contiguous ranges of the flat tensors; lr_factor is a device scalar that multiplies the learning
rate, so that a captured graph follows a schedule.

Moments may have 8 bits (`fastdistill.ops._moments`): they are read as codes times scales, the
update takes the exact new m and v, and only then are these rounded, stochastically by the word of
element e under moment_key: w = 2^4 * its high half for m, and its low half for v.

Launches on a GPU: one, where the length is a multiple of 16 and the caller keeps the counters.

Bytes moved, float32 state: parameter, moments and each EMA read and written once (8 bytes each),
the gradient read once, the copy written once: 38 bytes a parameter with float32 gradients, one EMA
and a bfloat16 copy; 26 (24 with bfloat16 gradients) with 8-bit moments, and 1/16 for their scales.
Stochastic rounding adds none: its noise is made in registers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.ops._arguments import check_floating
from fastdistill.ops._moments import MOMENT_BLOCK, dequantise_moment, quantise_moment
from fastdistill.ops._op import Op
from fastdistill.ops.noise import check_key, philox_4x32

CLIP_FLOOR = 1e-6
MOST_GROUPS = 64


def _per_element(
    values: Sequence[float], starts: Sequence[int], groups: Sequence[int], like: Tensor
) -> Tensor:
    """The value of each element's group, or one scalar where there is one range."""
    exact = torch.tensor([values[g] for g in groups], dtype=torch.float64, device=like.device)
    if len(starts) == 1:
        return exact[0]
    ends = [*starts[1:], like.numel()]
    sizes = torch.tensor([end - start for start, end in zip(starts, ends, strict=True)])
    return exact.repeat_interleave(sizes.to(like.device))


def _random_words(key: Tensor, like: Tensor) -> Tensor:
    """A random number below 2^32 for each element of a flat range, int64 of its shape."""
    mask = 0xFFFFFFFF
    seed, stream, step = key.unbind()
    block = torch.arange(-(-like.numel() // 4), device=like.device)
    counter = (block & mask, block >> 32, step & mask, stream & mask)
    words = philox_4x32(counter, (seed & mask, (seed >> 32) & mask))
    return torch.stack(words, dim=-1).flatten()[: like.numel()].view(like.shape)


def _stochastic_bfloat16(value: Tensor, key: Tensor) -> Tensor:
    """float32 rounded to bfloat16, up with the probability of what is cut off."""
    noise = (_random_words(key, value) >> 16).to(torch.int32)
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
    exp_avg_scale: Tensor | None,
    exp_avg_sq_scale: Tensor | None,
    counters: Tensor | None,
    squared_norm: Tensor | None,
    grad_scale: Tensor | None,
    lr_factor: Tensor | None,
    key: Tensor | None,
    moment_key: Tensor | None,
    starts: Sequence[int],
    groups: Sequence[int],
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
    rate = _per_element(lr, starts, groups, parameter)
    rate = rate if lr_factor is None else rate * lr_factor.double()
    decay = 1 - rate * _per_element(weight_decay, starts, groups, parameter)

    m, v = exp_avg, exp_avg_sq
    if exp_avg_scale is not None and exp_avg_sq_scale is not None:
        m = dequantise_moment(exp_avg, exp_avg_scale, signed=True).to(compute)
        v = dequantise_moment(exp_avg_sq, exp_avg_sq_scale, signed=False).to(compute)
    g = gradient.to(compute) * factor
    m = m.lerp(g, 1 - beta1)
    v = beta2 * v + (1 - beta2) * g * g
    denominator = v.sqrt() / correction2.sqrt().to(compute) + eps
    p = parameter * decay.to(compute) - (rate / correction1).to(compute) * m / denominator
    early = (1 + done) / (10 + done)
    updates = [(parameter, p)]
    if exp_avg_scale is None or exp_avg_sq_scale is None or moment_key is None:
        updates += [(exp_avg, m), (exp_avg_sq, v)]
    else:
        word = _random_words(moment_key, parameter)
        high, low = (word >> 16 << 4).int(), ((word & 0xFFFF) << 4).int()
        first = quantise_moment(m, signed=True, noise=high)
        second = quantise_moment(v, signed=False, noise=low)
        updates += zip((exp_avg, exp_avg_scale), first, strict=True)
        updates += zip((exp_avg_sq, exp_avg_sq_scale), second, strict=True)
    for ema, wanted in zip(emas, ema_decays, strict=True):
        kept = early.clamp(max=wanted) if ema_warmup else torch.full_like(early, wanted)
        updates.append((ema, ema.lerp(p, (1 - kept).to(compute))))
    if copy is not None:
        rounded = p.to(copy.dtype) if key is None else _stochastic_bfloat16(p, key)
        updates.append((copy, rounded))
    for old, new in updates:
        old.copy_(torch.where(finite, new, old))
    step.add_(finite.to(step.dtype))
    if counters is not None:
        counters[0].add_((~finite).to(counters.dtype))


_adamw_ema_ = Op(
    "adamw_ema_",
    "(Tensor(a!) parameter, Tensor gradient, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
    "Tensor(d!) step, Tensor(e!)[] emas, Tensor(f!)? copy, Tensor(g!)? exp_avg_scale, "
    "Tensor(h!)? exp_avg_sq_scale, Tensor(i!)? counters, Tensor? squared_norm, "
    "Tensor? grad_scale, Tensor? lr_factor, Tensor? key, Tensor? moment_key, int[] starts, "
    "int[] groups, float[] lr, float[] weight_decay, float beta1, float beta2, float eps, "
    "float? max_norm, float[] ema_decays, bool ema_warmup) -> ()",
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
        if value.shape != like.shape or value.device != like.device:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} on {value.device}; expected "
                f"{tuple(like.shape)} on {like.device}, as parameter has"
            )
        if not value.is_contiguous():
            raise ValueError(f"{name} has strides {value.stride()}; expected a contiguous range")


def _check_moments(
    parameter: Tensor,
    moments: dict[str, Tensor],
    scales: dict[str, Tensor | None],
    moment_key: Tensor | None,
) -> None:
    given = [value for value in (*scales.values(), moment_key) if value is not None]
    if len(given) not in (0, 3):
        raise ValueError(
            "8-bit moments need exp_avg_scale, exp_avg_sq_scale and moment_key; some are missing"
        )
    wanted = torch.uint8 if given else parameter.dtype
    for name, value in moments.items():
        if value.dtype != wanted:
            why = "with exp_avg_scale" if given else "as parameter is, or uint8 with exp_avg_scale"
            raise ValueError(f"{name} is {value.dtype}; expected {wanted} {why}")
    blocks = -(-parameter.numel() // MOMENT_BLOCK)
    form = torch.float32, (blocks,), parameter.device
    for name, scale in scales.items():
        if scale is not None and (scale.dtype, scale.shape, scale.device) != form:
            raise ValueError(
                f"{name} is {scale.dtype} of shape {tuple(scale.shape)} on {scale.device}; "
                f"expected float32 ({blocks},) on {parameter.device}, one for each {MOMENT_BLOCK} "
                "elements"
            )
    _check_flat(parameter, **moments)
    if moment_key is not None:
        check_key(moment_key, moment_key)


def _check_scalar(parameter: Tensor, **tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if value is not None and (value.numel() != 1 or value.device != parameter.device):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} on {value.device}; expected a scalar on "
                f"{parameter.device}, where parameter is"
            )


def _check_counters(parameter: Tensor, counters: Tensor) -> None:
    form = counters.dtype, counters.shape, counters.device
    if form != (torch.int32, (2,), parameter.device) or not counters.is_contiguous():
        raise ValueError(
            f"counters is {counters.dtype} of shape {tuple(counters.shape)} on {counters.device}; "
            f"expected torch.zeros(2, dtype=torch.int32) on {parameter.device}"
        )


def _groups_of(
    parameter: Tensor,
    starts: Sequence[int],
    groups: Sequence[int] | None,
    *values: float | Sequence[float],
) -> tuple[list[int], list[list[float]]]:
    """The group of each range, and lists of the values of all groups."""
    ascending = all(a < b for a, b in itertools.pairwise((*starts, max(parameter.numel(), 1))))
    if not starts or starts[0] != 0 or not ascending:
        raise ValueError(
            f"starts is {list(starts)}; expected the first elements of the ranges, ascending from "
            f"0 and below {parameter.numel()}"
        )
    found = list(range(len(starts)) if groups is None else groups)
    if len(found) != len(starts) or min(found) < 0:
        raise ValueError(
            f"groups is {found} for {len(starts)} ranges; expected a group, counted from 0, of each"
        )
    sizes = [len(value) for value in values if isinstance(value, Sequence)]
    used = max(found) + 1
    count = max(sizes, default=used)
    if min(sizes, default=used) != count or count < used or (groups is None and count != used):
        raise ValueError(
            f"{used} groups have {' and '.join(map(str, sizes))} values of lr and weight_decay; "
            "expected one number, or one for each group"
        )
    if count > MOST_GROUPS:
        raise ValueError(
            f"there are {count} groups; expected at most {MOST_GROUPS}: give ranges that share lr "
            "and weight_decay the same number in groups"
        )
    return found, [list(v) if isinstance(v, Sequence) else [v] * count for v in values]


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
    groups: Sequence[int] | None = None,
    squared_norm: Tensor | None = None,
    max_norm: float | None = None,
    grad_scale: Tensor | None = None,
    lr_factor: Tensor | None = None,
    emas: Sequence[Tensor] = (),
    ema_decays: Sequence[float] = (),
    ema_warmup: bool = False,
    copy: Tensor | None = None,
    key: Tensor | None = None,
    exp_avg_scale: Tensor | None = None,
    exp_avg_sq_scale: Tensor | None = None,
    moment_key: Tensor | None = None,
    counters: Tensor | None = None,
) -> None:
    """One AdamW update of a flat range, in place, with all that belongs to it.

    Nothing waits for the host: whether the update happens is decided on the device.

    Args:
        parameter: master weights, float32 (float64 off the GPU), contiguous, any shape.
        gradient: gradients in any floating dtype; they are only read.
        exp_avg: first moments, in the parameters' dtype, or uint8 codes.
        exp_avg_sq: second moments, in the parameters' dtype, or uint8 codes.
        step: number of updates done, a float32 scalar on the device; counted up.
        lr: learning rate, or one for each group.
        betas: decays of the moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay, or one for each group.
        starts: first element of each range, ascending from 0. A GPU reads a table of the ranges,
            which the first call for each division copies there: warm up before capturing a graph.
        groups: group of each range, counted from 0, at most 64 of them; without it range i is
            group i.
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
        exp_avg_scale: float32 [ceil(n / 256)] for n parameters, makes ``exp_avg`` 8-bit codes;
            goes with ``exp_avg_sq_scale`` and ``moment_key``. State begins with zeros everywhere.
        exp_avg_sq_scale: the same of ``exp_avg_sq``.
        moment_key: noise key that rounds 8-bit moments, another one than ``key`` and than that of
            the update before.
        counters: int32 [2] on the device, zero at first. Element 0 counts the updates that were
            skipped; with element 1, which is left zero, the programs of a GPU find who comes last.
            Without it each call makes its own, a second launch. One for calls that follow each
            other.

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
    averages = {f"emas[{k}]": ema for k, ema in enumerate(emas)}
    for name, value in averages.items():
        if value.dtype != parameter.dtype:
            raise ValueError(f"{name} is {value.dtype}; expected {parameter.dtype}")
    moments = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    scales = {"exp_avg_scale": exp_avg_scale, "exp_avg_sq_scale": exp_avg_sq_scale}
    _check_moments(parameter, moments, scales, moment_key)
    check_floating("gradient", gradient)
    if copy is not None:
        check_floating("copy", copy)
    _check_flat(parameter, parameter=parameter, gradient=gradient, copy=copy, **averages)
    scalars = {"squared_norm": squared_norm, "grad_scale": grad_scale, "lr_factor": lr_factor}
    _check_scalar(parameter, step=step, **scalars)
    if counters is not None:
        _check_counters(parameter, counters)
    ranges, (rates, decays) = _groups_of(parameter, starts, groups, lr, weight_decay)
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
            *(exp_avg_scale, exp_avg_sq_scale, counters),
            *(squared_norm, grad_scale, lr_factor, key, moment_key),
            *(list(starts), ranges, rates, decays),
            *(*betas, eps, max_norm, list(ema_decays), ema_warmup),
        )
