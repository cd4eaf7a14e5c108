"""`OptimizerStep`: one role's schedule, clip, finite check, AdamW and averages, without a sync."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.optim.adamw import ArenaAdamW
from fastdistill.optim.arena import Arena
from fastdistill.optim.schedule import Schedule, learning_rate_factor


class OptimizerStep:
    """`ArenaAdamW` over one network's arena, with a schedule that is a function of the update.

    An update whose gradient norm is not finite is skipped on the device: weights, moments, averages
    and the count of updates stay.

    Args:
        arena: the network's parameters.
        lr: peak learning rate.
        updates: number of updates of the whole run, for the schedule.
        betas: AdamW's betas.
        eps: AdamW's epsilon.
        weight_decay: decoupled weight decay.
        schedule: how the learning rate falls.
        warmup: updates of linear warm-up.
        final: learning-rate factor at the end.
        clip_norm: bound of the gradient's global norm; None leaves it alone.
        half_lives: updates after which an old weight counts half, for each average of the arena;
            early averages forget faster, at (1 + n) / (10 + n) after n updates.
        stochastic_rounding: round bfloat16 weights stochastically.
        seed: seed of stochastic rounding.
        rate_on_device: keep the learning rate in a device scalar, as a CUDA graph needs it.
        drop_gradients: forget gradients after an update instead of clearing them
            (`ArenaAdamW.zero_grad`).
    """

    def __init__(
        self,
        arena: Arena,
        lr: float,
        updates: int,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        schedule: Schedule = "constant",
        warmup: int = 0,
        final: float = 0.0,
        clip_norm: float | None = None,
        half_lives: Sequence[float] = (),
        stochastic_rounding: bool = False,
        seed: int = 0,
        rate_on_device: bool = False,
        drop_gradients: bool = False,
    ) -> None:
        for half_life in half_lives:
            if half_life <= 0:
                raise ValueError(f"half_life is {half_life}; expected a positive number of updates")
        self.arena = arena
        self.optimizer = ArenaAdamW(
            arena,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            max_norm=clip_norm,
            ema_decays=[0.5 ** (1 / half_life) for half_life in half_lives],
            ema_warmup=True,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
        )
        self.lr, self.updates = lr, updates
        self.schedule, self.warmup, self.final = schedule, warmup, final
        self.drop_gradients = drop_gradients
        self._rate = torch.full((), lr, device=arena.device) if rate_on_device else None

    def step(self, update: int) -> dict[str, Tensor]:
        """`set_rate` and `apply`."""
        self.set_rate(update)
        return self.apply()

    def set_rate(self, update: int) -> None:
        """Set the learning rate of update number ``update``."""
        factor = learning_rate_factor(update, self.updates, self.schedule, self.warmup, self.final)
        rate: float | Tensor = self.lr * factor
        if self._rate is not None:
            rate = self._rate.fill_(rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def apply(self) -> dict[str, Tensor]:
        """Update the weights from the accumulated gradients, and clear these.

        Returns:
            Device scalars: ``grad_norm`` before clipping, ``skipped`` (1 if not finite, else 0).
        """
        self.optimizer.step()
        self.optimizer.zero_grad(self.drop_gradients)
        self.arena.publish()
        norm = self.optimizer.grad_norm
        return {"grad_norm": norm, "skipped": (~torch.isfinite(norm)).to(torch.float32)}

    def state(self) -> OptimizerState:
        """What a checkpoint holds of the optimizer."""
        return OptimizerState(self)


class OptimizerState:
    """An optimizer's moments and counts as named tensors, to save, or to load into and `commit`.

    Attributes:
        tensors: ``<parameter>.exp_avg`` and ``.exp_avg_sq`` in float32, ``step``, ``skipped``,
            and ``<parameter>.copy`` where low-precision weights are rounded stochastically.
    """

    def __init__(self, step: OptimizerStep) -> None:
        arena, optimizer = step.arena, step.optimizer
        self._arena = arena
        self._recast = not optimizer.stochastic_rounding
        self._decoded = {role: arena.decoded(role) for role in ("exp_avg", "exp_avg_sq")}
        roles = dict(self._decoded)
        if optimizer.stochastic_rounding:
            roles["copy"] = arena.ranges["copy"]
        self.tensors: dict[str, Tensor] = {
            f"{name}.{role}": part
            for role, flat in roles.items()
            for name, part in arena.named(flat).items()
        }
        self.tensors |= optimizer.counts

    def commit(self) -> None:
        """Take over what was loaded into the tensors, and into the arena's master weights."""
        for role, flat in self._decoded.items():
            self._arena.encode(role, flat)
        if self._recast:
            self._arena.recast()
        self._arena.publish()
