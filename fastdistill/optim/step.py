"""`OptimizerStep`: one role's clip, finite check, AdamW and learning rate, without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdistill.optim.schedule import Schedule, learning_rate_factor


class OptimizerStep:
    """AdamW over a module's trainable parameters, clipped by their global norm.

    A step whose gradient norm is not finite is skipped on the device: torch's fused AdamW reads
    ``found_inf``, so that neither weights nor moments nor step counts move.

    Args:
        module: the network to train.
        lr: peak learning rate.
        updates: number of updates of the whole run, for the schedule.
        betas: AdamW's betas.
        eps: AdamW's epsilon.
        weight_decay: decoupled weight decay.
        schedule: how the learning rate falls.
        warmup: updates of linear warm-up.
        final: learning-rate factor at the end.
        clip_norm: bound of the gradient's global norm; None leaves it alone.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float,
        updates: int,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        schedule: Schedule = "constant",
        warmup: int = 0,
        final: float = 0.0,
        clip_norm: float | None = None,
    ) -> None:
        named = [(name, value) for name, value in module.named_parameters() if value.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters: list[Tensor] = [value for _, value in named]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
        )
        self.lr, self.updates, self.clip_norm = lr, updates, clip_norm
        self.schedule, self.warmup, self.final = schedule, warmup, final
        self._materialise_state()

    def step(self, update: int) -> dict[str, Tensor]:
        """Apply the accumulated gradients as update number ``update``, and clear them.

        Returns:
            Device scalars: ``grad_norm`` before clipping, ``skipped`` (1 if not finite, else 0).
        """
        factor = learning_rate_factor(update, self.updates, self.schedule, self.warmup, self.final)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor
        gradients = [value.grad for value in self.parameters if value.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        skipped = (~torch.isfinite(norm)).to(torch.float32)
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "skipped": skipped}

    def _materialise_state(self) -> None:
        """Create the moments now, so that they can be loaded into before the first step."""
        for value in self.parameters:
            self.optimizer.state[value] = {
                "step": torch.zeros((), dtype=torch.float32, device=value.device),
                "exp_avg": torch.zeros_like(value),
                "exp_avg_sq": torch.zeros_like(value),
            }

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and step counts under ``<parameter>.<moment>`` names, ready for safetensors."""
        return {
            f"{name}.{key}": tensor
            for name, value in zip(self.names, self.parameters, strict=True)
            for key, tensor in self.optimizer.state[value].items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy what `state_dict` gave back in.

        Raises:
            ValueError: where the names differ.
        """
        own = self.state_dict()
        if own.keys() != state.keys():
            difference = sorted(own.keys() ^ state.keys())
            raise ValueError(f"optimizer state does not fit the network: {difference[:5]} differ")
        for name, tensor in own.items():
            tensor.copy_(state[name])
