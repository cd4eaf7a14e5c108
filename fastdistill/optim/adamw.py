"""`ArenaAdamW`: torch's AdamW as one pass over an arena, in anybody's training loop."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastdistill.ops import adamw_ema_, sum_of_squares
from fastdistill.ops.adamw import MOST_GROUPS
from fastdistill.optim.arena import Arena, Moments

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ArenaAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` in two launches an update, whatever the number of parameters.

    One launch reads the gradients' norm, one does the rest: unscaling for a
    `torch.amp.GradScaler`, clipping, AdamW, moving averages and the cast of low-precision weights.
    Nothing waits for the host. In float32 the weights are bitwise those of
    ``torch.optim.AdamW(..., fused=True)`` on a CPU, but for what torch's vectors leave over at the
    end of a parameter (its elements modulo 16): these, and those of torch's foreach AdamW, are
    within an ulp an update of the numbers that are added.

    The parameters are moved into an `Arena` when the optimizer is made, so make it after
    ``module.to(...)`` and before a graph or a CUDA graph holds their addresses. bfloat16 and
    float16 parameters get float32 master weights, which follow weights that are loaded into the
    network later (`Arena.collect_weights`). What differs from torch: an update whose gradient, or
    the square of its norm, is not finite is skipped (and counted, without a GradScaler too); a
    parameter that got no gradient counts as having a zero one; `zero_grad` clears the gradients in
    place unless told to drop them.

    Args:
        params: parameters, parameter groups, (name, parameter) pairs, or an `Arena`, each of whose
            groups becomes a parameter group.
        lr: learning rate; a tensor on the parameters' device is read there, without a sync.
        betas: decays of the moments, alike in all groups.
        eps: added to the denominator, alike in all groups.
        weight_decay: decoupled weight decay.
        amsgrad: not supported.
        maximize: not supported.
        foreach: accepted for torch's sake, without effect, as are capturable and fused.
        capturable: see foreach.
        differentiable: not supported.
        fused: see foreach.
        max_norm: bound of the global gradient norm; None does not clip.
        ema_decays: a moving average of the weights for each decay.
        ema_warmup: let averages forget at least as fast as (1 + n) / (10 + n) after n updates.
        moments: float32, or 8bit, stochastically rounded.
        stochastic_rounding: round the weights that a bfloat16 network computes with
            stochastically.
        gradient_dtype: dtype of the gradients; the parameters' own by default, float32 accumulates
            a bfloat16 network's gradients exactly.
        seed: seed of the stochastic rounding.

    Raises:
        ValueError: for an option that is not supported, and what `Arena` raises.
    """

    _step_supports_amp_scaling = True
    grad_scale: Tensor | None
    found_inf: Tensor

    def __init__(
        self,
        params: ParamsT | Arena,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        ema_decays: Sequence[float] = (),
        ema_warmup: bool = False,
        moments: Moments = "float32",
        stochastic_rounding: bool = False,
        gradient_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "differentiable": differentiable,
            "foreach": foreach,
            "capturable": capturable,
            "fused": fused,
        }
        self._arena: Arena | None = None
        super().__init__(_groups_of(params) if isinstance(params, Arena) else params, defaults)
        _check_numbers(self.param_groups)
        _check_options(self.param_groups)
        if not isinstance(params, Arena):
            self._arena = _make_arena(self.param_groups, gradient_dtype, len(ema_decays), moments)
        elif gradient_dtype is None and moments == "float32":
            self._arena = params
        else:
            raise ValueError("gradient_dtype and moments are the arena's; pass them to Arena")
        if len(ema_decays) != len(self.arena.averages):
            raise ValueError(
                f"there are {len(ema_decays)} ema_decays, but the arena has "
                f"{len(self.arena.averages)} averages"
            )
        self.max_norm, self.ema_warmup = max_norm, ema_warmup
        self.stochastic_rounding = stochastic_rounding
        self.ema_decays = tuple(ema_decays)
        self.squared_norm: Tensor | None = None
        """Squared norm of the last update's gradients, as they were stored, on the device."""
        self._scale: Tensor | None = None
        self._starts, self._groups = self.arena.layout.ranges()
        self._make_state(seed, stochastic_rounding)

    def __getstate__(self) -> dict[str, Any]:
        raise ValueError(
            "an ArenaAdamW cannot be copied or pickled, since its state is a network's memory; "
            "load its state_dict into one that is made for the other network"
        )

    @property
    def arena(self) -> Arena:
        """Where everything parameter-sized lies."""
        assert self._arena is not None
        return self._arena

    @property
    def skipped(self) -> Tensor:
        """Number of updates skipped since their gradient was not finite, on the device."""
        return self._counters[0]

    @property
    def grad_norm(self) -> Tensor:
        """Global norm of the last update's gradients before clipping, unscaled, on the device."""
        if self.squared_norm is None:
            raise ValueError("no update was done yet")
        norm = self.squared_norm.sqrt()
        return norm if self._scale is None else norm / self._scale

    @property
    def counts(self) -> dict[str, Tensor]:
        """Device scalars that belong to the state: updates done, and updates skipped."""
        return {"step": self._step, "skipped": self._counters[0]}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group while the optimizer is made; later there is no place for it.

        Raises:
            ValueError: once the arena is laid out.
        """
        if getattr(self, "_arena", None) is not None:
            raise ValueError(
                "the arena was laid out when the optimizer was made; make a new ArenaAdamW with "
                "all parameter groups, and load this one's state_dict into it"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters from their gradients.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            ValueError: where a parameter that was frozen when the optimizer was made has a
                gradient, a weight became another dtype, device or shape, or the groups were given
                options that are not supported.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_strangers()
        arena, ranges = self.arena, self.arena.ranges
        hyper_parameters = self._hyper_parameters()
        arena.collect_gradients()
        arena.collect_weights()
        self._measure_gradients()
        for key in (self._copy_key, self._moment_key):
            if key is not None:
                key[2].copy_(self._step)
        adamw_ema_(
            ranges["parameter"],
            ranges["gradient"],
            ranges["exp_avg"],
            ranges["exp_avg_sq"],
            self._step,
            starts=self._starts,
            groups=self._groups,
            **hyper_parameters,
            squared_norm=self.squared_norm,
            max_norm=self.max_norm,
            grad_scale=self._scale,
            emas=[ranges[role] for role in arena.averages],
            ema_decays=self.ema_decays,
            ema_warmup=self.ema_warmup,
            copy=ranges.get("copy"),
            key=self._copy_key,
            exp_avg_scale=arena.scales.get("exp_avg"),
            exp_avg_sq_scale=arena.scales.get("exp_avg_sq"),
            moment_key=self._moment_key,
            counters=self._counters,
        )
        arena.mark_written()
        return loss

    def _measure_gradients(self) -> None:
        """Squared norm of the gradients, infinite where a GradScaler found what is not finite."""
        self.squared_norm = sum_of_squares(self.arena.ranges["gradient"], ticket=self._ticket)
        self._scale = getattr(self, "grad_scale", None)
        found = getattr(self, "found_inf", None)
        if isinstance(found, Tensor):
            self.squared_norm.masked_fill_(found.bool(), torch.inf)
        self.arena.sum_over_shards_(self.squared_norm)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear all gradients.

        Args:
            set_to_none: False clears the arena's range in one launch, to which autograd then adds:
                with float32 gradients 16 bytes a parameter are moved. True drops the gradients;
                autograd makes new ones, which the update copies into the arena: 8 bytes, but some
                launches more, and all gradients are there twice until the next call.
        """
        if set_to_none:
            self.arena.drop_gradients()
        else:
            self.arena.zero_gradients()

    @contextlib.contextmanager
    def averaged(self, index: int = 0) -> Iterator[None]:
        """Let the network compute with a moving average of its weights, as for sampling."""
        with self.arena.showing(f"ema_{index}"):
            yield

    def state_dict(self) -> dict[str, Any]:
        """The state as ``torch.optim.AdamW`` has it, in its format, and more where there is more.

        A parameter's state are its ``step``, ``exp_avg`` and ``exp_avg_sq`` (in float32 where they
        are kept in 8 bits), ``ema_0`` ... and, in a low-precision network, the ``master`` weights.
        """
        arena = self.arena
        arena.collect_weights()
        state_dict = super().state_dict()
        places = dict(zip(self._all_parameters(), _numbers(state_dict), strict=True))
        # torch counts each parameter's step up by itself: one tensor for all would count them all.
        steps = self._step.expand(len(places)).clone().unbind()
        moments = {role: arena.named(arena.decoded(role)) for role in _MOMENTS}
        for name, parameter, step in zip(arena.names, arena.parameters, steps, strict=False):
            own = {"step": step} | {role: views[name] for role, views in moments.items()}
            state_dict["state"][places[parameter]] = self.state[parameter] | own
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy in what `state_dict` or ``torch.optim.AdamW.state_dict`` gave.

        Moving averages that it lacks begin at the weights. Master weights that it has become those
        of a low-precision network. Nothing is changed where it raises.

        Raises:
            ValueError: for other parameter groups or shapes, options that are not supported, and
                parameters with different numbers of updates.
        """
        arena, groups = self.arena, state_dict["param_groups"]
        _check_sizes(self.param_groups, groups)
        _check_options(groups)
        saved = dict(zip(self._all_parameters(), _numbers(state_dict), strict=True))
        states = [state_dict["state"].get(saved[value], {}) for value in arena.parameters]
        _check_shapes(arena, states)
        done = _common_step(states)
        arena.collect_weights()
        super().load_state_dict({"state": {}, "param_groups": groups})
        self._expose_state()
        self._step.fill_(done)
        for role in _MOMENTS:
            arena.load(role, [state.get(role) for state in states])
        weights = arena.views("parameter")
        if "copy" in arena.ranges:
            arena.load("parameter", _chosen(states, "master", weights))
            arena.recast()
        for role in arena.averages:
            arena.load(role, _chosen(states, role, weights))

    def _all_parameters(self) -> list[Tensor]:
        return [value for group in self.param_groups for value in group["params"]]

    def _hyper_parameters(self) -> dict[str, Any]:
        """What the groups say now, as schedulers may have changed it."""
        groups = self.param_groups
        _check_options(groups)
        first = groups[0]
        lrs = [group["lr"] for group in groups]
        shared: dict[str, Any] = {"betas": first["betas"], "eps": first["eps"]}
        shared["weight_decay"] = [group["weight_decay"] for group in groups]
        if isinstance(lrs[0], Tensor) and lrs[0].device == self.arena.device:
            if all(lr is lrs[0] for lr in lrs):
                return shared | {"lr": [1.0] * len(lrs), "lr_factor": lrs[0]}
            if lrs[0].device.type != "cpu":
                raise ValueError(
                    "groups have learning rates in several tensors on the device; use one tensor "
                    "for all, or numbers"
                )
        return shared | {"lr": [float(lr) for lr in lrs]}

    def _refuse_strangers(self) -> None:
        for parameter in self._strangers:
            if parameter.grad is not None:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} has a gradient, but was frozen "
                    "when the optimizer was made; make a new ArenaAdamW after unfreezing"
                )

    def _make_state(self, seed: int, stochastic_rounding: bool) -> None:
        """Device scalars, and torch's per-parameter state as views of the arena."""
        arena = self.arena
        device = arena.device
        self._step = torch.zeros((), dtype=torch.float32, device=device)
        self._counters = torch.zeros(2, dtype=torch.int32, device=device)
        self._ticket = torch.zeros(1, dtype=torch.int32, device=device)
        dtype = arena.ranges.get("copy", arena.ranges["parameter"]).dtype
        if stochastic_rounding and dtype != torch.bfloat16:
            raise ValueError(
                f"stochastic_rounding rounds bfloat16 weights, but the network computes in {dtype}"
            )
        arena.stochastic_rounding = stochastic_rounding
        self._copy_key = self._key(seed, "arena-copy") if stochastic_rounding else None
        self._moment_key = self._key(seed, "arena-moments") if arena.scales else None
        held = set(arena.parameters)
        self._strangers = [value for value in self._all_parameters() if value not in held]
        self._expose_state()

    def _expose_state(self) -> None:
        """Show torch's per-parameter state, as views of the arena."""
        arena = self.arena
        roles = {role: role for role in (*_MOMENTS, *arena.averages)}
        if "copy" in arena.ranges:
            roles["master"] = "parameter"
        named = {key: arena.named(arena.ranges[role]) for key, role in roles.items()}
        for name, parameter in zip(arena.names, arena.parameters, strict=True):
            own = {key: views[name] for key, views in named.items()}
            self.state[parameter] = {"step": self._step, **own}

    def _key(self, seed: int, stream: str) -> Tensor:
        """A noise key whose step is written on the device; each shard has its own numbers."""
        number = zlib.crc32(f"{stream}-{self.arena.shard}".encode())
        return torch.tensor([seed, number, 0], dtype=torch.int64, device=self.arena.device)


def _check_numbers(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for hyper-parameters that torch refuses too."""
    for group in groups:
        for name in ("lr", "eps", "weight_decay"):
            if not group[name] >= 0:
                raise ValueError(f"{name} is {group[name]}; expected 0 or more")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas are {group['betas']}; expected numbers from 0 and below 1")


def _check_options(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for what torch's AdamW can do and this one cannot."""
    if len(groups) > MOST_GROUPS:
        raise ValueError(
            f"there are {len(groups)} parameter groups; expected at most {MOST_GROUPS}: put "
            "parameters that share lr and weight_decay into one group"
        )
    for group in groups:
        for name in ("amsgrad", "maximize", "differentiable"):
            if group.get(name):
                raise ValueError(f"{name} is {group[name]}; ArenaAdamW supports only False")
        for name in ("betas", "eps"):
            if group[name] != groups[0][name]:
                raise ValueError(
                    f"groups differ in {name}: {group[name]} and {groups[0][name]}; expected one "
                    "value, or one optimizer each"
                )


def _check_sizes(own: Sequence[Mapping[str, Any]], given: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for the state of an optimizer with other parameter groups."""
    found, expected = ([len(group["params"]) for group in groups] for groups in (given, own))
    if found != expected:
        raise ValueError(
            f"the state's groups have {found} parameters; expected {expected}, as this optimizer's"
        )


def _check_shapes(arena: Arena, states: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for the state of other parameters."""
    roles = (*_MOMENTS, "master", *arena.averages)
    for name, parameter, state in zip(arena.names, arena.parameters, states, strict=True):
        for role in roles:
            if role in state and state[role].shape != parameter.shape:
                raise ValueError(
                    f"{role} of {name} has shape {tuple(state[role].shape)}; expected "
                    f"{tuple(parameter.shape)}"
                )


def _common_step(states: Sequence[Mapping[str, Any]]) -> float:
    """The number of updates that all parameters have done; 0 where no state says one."""
    steps = {float(state["step"]) for state in states if "step" in state}
    if len(steps) > 1:
        raise ValueError(
            f"parameters have done {sorted(steps)} updates; ArenaAdamW has one count for all"
        )
    return steps.pop() if steps else 0.0


def _chosen(states: Sequence[Mapping[str, Any]], key: str, default: Sequence[Tensor]) -> list:
    """What each state has under a key, or else its default."""
    return [state.get(key, own) for state, own in zip(states, default, strict=True)]


def _numbers(state_dict: Mapping[str, Any]) -> list[int]:
    """Under which numbers a state dict keeps the parameters, in the order of the groups."""
    return [number for group in state_dict["param_groups"] for number in group["params"]]


def _groups_of(arena: Arena) -> list[dict[str, Any]]:
    """One parameter group for each group of an arena's layout."""
    groups: dict[int, list[Tensor]] = {}
    for entry, parameter in zip(arena.layout.entries, arena.parameters, strict=True):
        groups.setdefault(entry.group, []).append(parameter)
    if sorted(groups) != list(range(len(groups))):
        raise ValueError(f"the arena has groups {sorted(groups)}; expected 0, 1, 2, ...")
    return [{"params": groups[index]} for index in range(len(groups))]


def _make_arena(
    groups: Sequence[Mapping[str, Any]],
    gradient_dtype: torch.dtype | None,
    averages: int,
    moments: Moments,
) -> Arena:
    """An arena for the parameters of an optimizer's groups."""
    named: list[tuple[str, Tensor]] = []
    index: dict[Tensor, int] = {}
    for number, group in enumerate(groups):
        names = group.get("param_names") or [f"{number}.{i}" for i in range(len(group["params"]))]
        named += zip(names, group["params"], strict=True)
        index |= dict.fromkeys(group["params"], number)
    return Arena(
        named,
        group=lambda name, parameter: index[parameter],
        gradient_dtype=gradient_dtype,
        averages=averages,
        moments=moments,
    )
