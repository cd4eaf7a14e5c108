"""`CallableAdapter`: any function or module of (model_input, noise_condition, condition)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastdistill.models.denoiser import Condition


class CallableAdapter(nn.Module):
    """A callable that returns raw outputs, as a network without features.

    Args:
        model: called with (model_input [B, ...], noise_condition [B], condition); a module's
            parameters are under ``model.``.
        sample_shape: shape of one sample.
        classes: number of classes; 0 if not class-conditional.
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor, Condition], Tensor],
        sample_shape: tuple[int, ...] | None = None,
        classes: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.sample_shape, self.classes = sample_shape, classes

    @property
    def feature_shapes(self) -> list[tuple[int, ...]]:
        """None: a discriminator needs a network whose blocks are known."""
        raise ValueError(
            f"{type(self.model).__name__} is a plain callable, which has no features; use an "
            "objective without a discriminator, or write a network with features()"
        )

    def forward(self, model_input: Tensor, noise_condition: Tensor, condition: Condition) -> Tensor:
        """What the callable returns."""
        return self.model(model_input, noise_condition, condition)
