"""`Arena`: all parameter-sized state of one network, in one flat range for each role.

    parameter   master weights, float32 (float64 for a float64 network)
    gradient    what autograd accumulates into
    exp_avg     AdamW's first moments: in the masters' dtype, or 8 bits and a scale for a block
    exp_avg_sq  AdamW's second moments, likewise
    ema_0 ...   moving averages of the masters, in their dtype
    copy        what a low-precision network computes with; absent where it computes in the masters

An element has the same offset in every role, so that one pass over the ranges is the whole update
(`fastdistill.ops.adamw_ema_`), whatever the number of tensors. The network sees views.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fastdistill.ops import MOMENT_BLOCK, dequantise_moment, quantise_moment
from fastdistill.optim.layout import Entry, Layout
from fastdistill.optim.transfer import pack_, unpack_

Moments = Literal["float32", "8bit"]
Group = Callable[[str, Tensor], int]
"""Index of the parameter group that a parameter belongs to, from its name and itself."""


class Arena:
    """Moves a network's trainable parameters into flat ranges, of which they become views.

    Frozen parameters and buffers stay where they are. Parameters keep their identity, shape,
    dtype and, where they are dense, their strides, as channels-last ones do; gradients become views
    too, into which autograd accumulates.

    Args:
        module: the network, already on its device, or (name, parameter) pairs.
        group: parameter group of each parameter; one for all if None.
        compute_dtype: dtype that the parameters get, as bfloat16 for a float32 network that shall
            compute in it; their own if None.
        gradient_dtype: dtype of the gradients; the parameters' where they share one, else float32.
        averages: number of moving averages.
        moments: float32, or 8bit for a quarter of their memory.

    Raises:
        ValueError: for a network without trainable parameters, on several devices or on the meta
            device, of dtypes that have no master weights, or sharded already.
    """

    stochastic_rounding = False
    """Whether the copy is rounded stochastically, and may be either neighbour of its master."""

    def __init__(
        self,
        module: nn.Module | Sequence[tuple[str, Tensor]],
        *,
        group: Group | None = None,
        compute_dtype: torch.dtype | None = None,
        gradient_dtype: torch.dtype | None = None,
        averages: int = 0,
        moments: Moments = "float32",
    ) -> None:
        named = trainable_parameters(module)
        _check(named)
        parameters = [parameter for _, parameter in named]
        self._dtypes = [compute_dtype or parameter.dtype for parameter in parameters]
        roles = arena_roles(self._dtypes, gradient_dtype, averages, moments)
        self._allocate(plan_arena(module, group=group), parameters, roles)
        with torch.no_grad():
            dense = [value if _is_dense(value) else value.contiguous() for value in parameters]
            offsets = [self.layout.offset(name) for name in self.names]
            pack_(self.ranges["parameter"], dense, offsets)
            self.restart_averages()
            self.recast()
        self._gradients = self.views("gradient")
        self._show("parameter")
        self.attach_gradients()

    def _allocate(
        self, layout: Layout, parameters: Sequence[Tensor], roles: Mapping[str, torch.dtype]
    ) -> None:
        """Make the ranges, all zero, for these parameters in the order of the layout's entries."""
        self.layout, self.parameters = layout, list(parameters)
        self._entries = {entry.names[0]: entry for entry in layout.entries}
        self.names = list(self._entries)
        self.device = parameters[0].device
        self.ranges: dict[str, Tensor] = {
            role: torch.zeros(layout.size, dtype=dtype, device=self.device)
            for role, dtype in roles.items()
        }
        """The flat range of each role, [layout.size]."""
        self.scales: dict[str, Tensor] = {
            role: torch.ones(layout.size // MOMENT_BLOCK, device=self.device)
            for role, dtype in roles.items()
            if dtype == torch.uint8
        }
        """Scale of each block of 256 8-bit moments, float32; empty where moments are float32."""

    @property
    def averages(self) -> list[str]:
        """Roles of the moving averages: ema_0, ema_1, ..."""
        return [role for role in self.ranges if role.startswith("ema_")]

    @property
    def shard(self) -> int:
        """Which of the layout's shards this is."""
        return 0

    def bytes(self) -> dict[str, int]:
        """Bytes that each role takes on this rank, scales included."""
        held = {role: value.nbytes for role, value in self.ranges.items()}
        for role, scale in self.scales.items():
            held[role] += scale.nbytes
        return held

    def view(self, name: str, flat: Tensor) -> Tensor:
        """The part of a flat tensor, as ``ranges["ema_0"]``, that is this parameter's, shaped."""
        entry, piece = self._entries[name], self.layout.shard(name, self.shard)
        shape = entry.shape if self.layout.shards == 1 else (piece.rows, *entry.shape[1:])
        part = flat[piece.offset : piece.offset + piece.numel]
        if entry.order is None:
            return part.view(shape)
        part = part.view([shape[dim] for dim in entry.order])
        return part.permute([entry.order.index(dim) for dim in range(len(shape))])

    def views(self, role: str) -> list[Tensor]:
        """The view of every parameter in a role, in the order of ``names``."""
        return [self.view(name, self.ranges[role]) for name in self.names]

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Every parameter's part of a flat tensor by name, to save and to load into.

        Shards of a sharded network are DTensors, which torch.distributed.checkpoint understands.
        """
        return {name: self.view(name, flat) for name in self.names}

    @torch.no_grad()
    def whole(self, role: str) -> dict[str, Tensor]:
        """Copies of every parameter's part of a role, whole on every rank, on the CPU."""
        copies = {name: torch.empty_like(self.view(name, self.ranges[role])) for name in self.names}
        offsets = [self.layout.offset(name) for name in self.names]
        unpack_(self.ranges[role], list(copies.values()), offsets)
        return {name: value.cpu() for name, value in copies.items()}

    @torch.no_grad()
    def load(self, role: str, tensors: Sequence[Tensor | None]) -> None:
        """Copy a tensor for each parameter, in the order of ``names``, into a role; None is zero.

        Raises:
            ValueError: for another shape.
        """
        wide = self.decoded(role)
        for name, tensor in zip(self.names, tensors, strict=True):
            view = self.view(name, wide)
            if tensor is None:
                view.zero_()
                continue
            if tensor.shape != view.shape:
                raise ValueError(
                    f"{role} of {name} has shape {tuple(tensor.shape)}; expected "
                    f"{tuple(view.shape)}"
                )
            view.copy_(tensor)
        self.encode(role, wide)

    def decoded(self, role: str) -> Tensor:
        """A role's flat range as numbers: itself, or a float32 copy of 8-bit moments."""
        if role not in self.scales:
            return self.ranges[role]
        return dequantise_moment(self.ranges[role], self.scales[role], signed=role == "exp_avg")

    def encode(self, role: str, numbers: Tensor) -> None:
        """Take back what `decoded` gave, after it was changed; exact where it was not."""
        if role in self.scales:
            codes, scale = quantise_moment(numbers, signed=role == "exp_avg")
            self.ranges[role].copy_(codes)
            self.scales[role].copy_(scale)

    @torch.no_grad()
    def restart_averages(self) -> None:
        """Let the moving averages begin at the master weights."""
        for role in self.averages:
            self.ranges[role].copy_(self.ranges["parameter"])

    @torch.no_grad()
    def recast(self) -> None:
        """Let a low-precision network compute with the master weights, after those were set.

        A stochastically rounded weight stays where it may be the master's.
        """
        if "copy" not in self.ranges:
            return
        copy, master = self.ranges["copy"], self.ranges["parameter"]
        if self.stochastic_rounding:
            copy.copy_(torch.where(self._is_rounding(copy, master), copy, master))
        else:
            copy.copy_(master)

    def _is_rounding(self, low: Tensor, master: Tensor) -> Tensor:
        """Where low-precision weights are what their masters are, or may have been, rounded to."""
        if not self.stochastic_rounding:
            return low == master.to(low.dtype)
        bits, exact = (value.view(torch.int32).long() for value in (low.float(), master))
        return (bits - exact).abs() < 2**16

    @contextlib.contextmanager
    def showing(self, role: str) -> Iterator[None]:
        """Let the network compute with another role's weights, as ema_0's for sampling.

        Nothing is copied where it computes in the masters' dtype; a low-precision network gets a
        cast of the role for the time being.
        """
        self.collect_weights()
        self._show(role)
        try:
            yield
        finally:
            self._show("parameter")

    @torch.no_grad()
    def _show(self, role: str) -> None:
        """Point the network's parameters at a role; at their own place for parameter."""
        flat = self.ranges[role]
        low = flat
        if "copy" in self.ranges:
            copy = self.ranges["copy"]
            low = copy if role == "parameter" else flat.to(copy.dtype)
        for name, parameter, dtype in zip(self.names, self.parameters, self._dtypes, strict=True):
            parameter.data = self.view(name, flat if dtype == flat.dtype else low)
        self._seen = self._look()

    def _look(self) -> tuple[list[int], list[int]]:
        """Where the weights lie and, if some are low-precision, how often each was written."""
        places = [parameter.data_ptr() for parameter in self.parameters]
        low = "copy" in self.ranges
        return places, [parameter._version for parameter in self.parameters] if low else []

    @torch.no_grad()
    def collect_weights(self) -> None:
        """Bring weights that were written from outside into the masters.

        These are weights that lie elsewhere, as after ``parameter.data = value``, and low-precision
        weights that were written in place, as by ``module.load_state_dict``; a master stays where
        the weight is a rounding of it. Where nothing was written this only looks. In low precision
        it does not see what is written in place through ``parameter.data``.

        Raises:
            ValueError: for a weight that got another shape, dtype or device.
        """
        if self._look() == self._seen:
            return
        for name, parameter, dtype in zip(self.names, self.parameters, self._dtypes, strict=True):
            master = self.view(name, self.ranges["parameter"])
            _check_taken(name, parameter, master, dtype)
            if dtype == master.dtype:
                master.copy_(parameter)
            else:
                kept = self._is_rounding(parameter, master)
                master.copy_(torch.where(kept, master, parameter))
                self.view(name, self.ranges["copy"]).copy_(parameter)
        self._show("parameter")

    def mark_written(self) -> None:
        """Count an update as a write in place, so that autograd refuses graphs from before it.

        It follows `collect_weights`, since when nothing else was written.
        """
        torch.autograd.graph.increment_version(self.parameters)
        places, versions = self._seen
        self._seen = places, [version + 1 for version in versions]

    def attach_gradients(self) -> None:
        """Make the gradients views of the arena, where they are not."""
        dtype = self.ranges["gradient"].dtype
        for parameter, view in zip(self.parameters, self._gradients, strict=True):
            if parameter.grad is not view:
                if parameter.dtype != dtype:
                    parameter.grad_dtype = dtype
                parameter.grad = view

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Bring gradients that lie elsewhere, as after ``module.zero_grad()``, into the arena.

        A gradient that is None counts as zero. Where all lie here, as they do when
        `zero_gradients` clears them, this only looks.
        """
        pairs = zip(self.parameters, self._gradients, strict=True)
        stray = [(value.grad, view) for value, view in pairs if value.grad is not view]
        if not stray:
            return
        given = [(gradient, view) for gradient, view in stray if gradient is not None]
        missing = [view for gradient, view in stray if gradient is None]
        if given:
            torch._foreach_copy_([view for _, view in given], [gradient for gradient, _ in given])
        if missing:
            torch._foreach_zero_(missing)
        self.attach_gradients()

    def zero_gradients(self) -> None:
        """Clear all gradients, in one launch."""
        self.ranges["gradient"].zero_()
        self.attach_gradients()

    def drop_gradients(self) -> None:
        """Forget all gradients; `collect_gradients` takes in what autograd makes then."""
        for parameter in self.parameters:
            parameter.grad = None

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Leave the parameters out of graphs that are built in this context."""
        self._require_gradients(False)
        try:
            yield
        finally:
            self._require_gradients(True)

    def _require_gradients(self, wanted: bool) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(wanted)

    def sum_over_shards_(self, value: Tensor) -> None:
        """Complete a sum over the range by those of the other shards; here there is one."""

    def reduce_gradients(self, wanted: bool) -> None:
        """Whether backward passes exchange gradients between ranks; here there is one."""

    def publish(self) -> None:
        """Let the network see the weights of an update; here it sees them already."""

    def side_streams(self) -> list[torch.cuda.Stream]:
        """CUDA streams that passes and updates use beside the current one; here there are none."""
        return []


def plan_arena(
    module: nn.Module | Sequence[tuple[str, Tensor]],
    *,
    group: Group | None = None,
    shards: int = 1,
    units: Mapping[str, int] | None = None,
) -> Layout:
    """The layout of a network's arena, on any device, meta too: nothing is allocated.

    Args:
        module: the network, or (name, parameter) pairs.
        group: parameter group of each parameter; one for all if None.
        shards: ranks that hold it together.
        units: gathering unit of each parameter by its first name, for a network that FSDP2 shards.
    """
    return Layout(
        [
            Entry(
                names,
                tuple(parameter.shape),
                unit=units[names[0]] if units else 0,
                group=group(names[0], parameter) if group else 0,
                order=None if units else _memory_order(parameter),
            )
            for names, parameter in trainable_parameters(module)
        ],
        shards=shards,
        packed=units is not None,
    )


def arena_roles(
    compute_dtypes: Sequence[torch.dtype],
    gradient_dtype: torch.dtype | None = None,
    averages: int = 0,
    moments: Moments = "float32",
) -> dict[str, torch.dtype]:
    """The roles of an arena and their dtypes, from those that the parameters compute in."""
    dtypes = set(compute_dtypes)
    master = torch.float64 if torch.float64 in dtypes else torch.float32
    moment = torch.uint8 if moments == "8bit" else master
    common = next(iter(dtypes)) if len(dtypes) == 1 else torch.float32
    roles = {"parameter": master, "gradient": gradient_dtype or common}
    roles |= {"exp_avg": moment, "exp_avg_sq": moment}
    roles |= {f"ema_{k}": master for k in range(averages)}
    low = dtypes - {master}
    return roles | ({"copy": low.pop()} if low else {})


def arena_bytes(layout: Layout, roles: Mapping[str, torch.dtype]) -> dict[str, int]:
    """Bytes that each role takes on one rank, scales of 8-bit moments included."""
    scales = layout.size // MOMENT_BLOCK * torch.float32.itemsize
    return {
        role: count + (scales if roles[role] == torch.uint8 else 0)
        for role, count in layout.bytes_per_rank(roles).items()
    }


def trainable_parameters(
    module: nn.Module | Sequence[tuple[str, Tensor]],
) -> list[tuple[tuple[str, ...], Tensor]]:
    """All names of each trainable parameter, tied ones together, in order of registration."""
    if isinstance(module, nn.Module):
        module = list(module.named_parameters(remove_duplicate=False))
    names: dict[Tensor, list[str]] = {}
    for name, parameter in module:
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)
    return [(tuple(several), parameter) for parameter, several in names.items()]


def _check(named: Sequence[tuple[tuple[str, ...], Tensor]]) -> None:
    if not named:
        raise ValueError("there is no trainable parameter; expected some with requires_grad")
    first = named[0][1]
    for names, parameter in named:
        if hasattr(parameter, "to_local"):
            raise ValueError(
                f"{names[0]} is a DTensor; the arena of a sharded network is made by "
                "fastdistill.parallel"
            )
        if parameter.device != first.device or parameter.is_meta:
            raise ValueError(
                f"{names[0]} is on {parameter.device} and {named[0][0][0]} on {first.device}; "
                "expected all parameters on one real device"
            )
    dtypes = {parameter.dtype for _, parameter in named}
    known = {torch.float32, torch.bfloat16, torch.float16}
    if (dtypes - known and dtypes != {torch.float64}) or len(dtypes - {torch.float32}) > 1:
        raise ValueError(
            f"parameters are {', '.join(sorted(map(str, dtypes)))}; expected float32, bfloat16 or "
            "float16, of which float32 and one other may be mixed, or float64 alone"
        )


def _check_taken(name: str, parameter: Tensor, master: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless a weight that lies elsewhere may be copied into the arena."""
    found = tuple(parameter.shape), parameter.dtype, parameter.device
    expected = tuple(master.shape), dtype, master.device
    if found != expected:
        raise ValueError(
            f"{name} became {found[1]} of shape {found[0]} on {found[2]}; expected {expected[1]} "
            f"of shape {expected[0]} on {expected[2]} as in the arena: make a new one after "
            "changing a network"
        )


def _memory_order(value: Tensor) -> tuple[int, ...] | None:
    """Dimensions from the slowest to the fastest, where the tensor is dense but not row-major."""
    return None if value.is_contiguous() or not _is_dense(value) else _by_stride(value)


def _is_dense(value: Tensor) -> bool:
    return value.permute(_by_stride(value)).is_contiguous()


def _by_stride(value: Tensor) -> tuple[int, ...]:
    strides = value.stride()
    return tuple(sorted(range(value.ndim), key=lambda dim: -strides[dim]))
