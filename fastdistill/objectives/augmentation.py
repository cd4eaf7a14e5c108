"""ScoreAug: a denoiser is trained on T(x_t) with target T(x_0), T drawn for each sample.

    loss = w(t) || D(T x_t, t, [omega]) - T x_0 ||^2            arXiv 2508.07926

Every T here is linear: pixels that are moved, set to zero or scaled. What the optimum then is:

    invertible A        D~(A x) = A D(x), so that nothing is lost; for A = b I the noise in A x_t
                        has standard deviation b sigma, while the network is told sigma
    cutout, translation P throws pixels away: D~(P x) = E[P D(X_t) | P X_t], which is not P D(x).
                        Such an answer is right for inputs with holes alone

A trained denoiser is asked about plain x_t afterwards, and there it must be what it would be
without augmentation. So it must be able to tell T(x_t) from x_t, by omega or from the input:

    flip, rotation      noise looks the same turned round: omega is needed, or data whose law is
                        the same turned round too
    translation, cutout their holes hold exact zeros where noise would be: seen without omega
    brightness          the noise has another strength: seen in a picture, not in a few numbers

The frozen teacher has never seen T(x_t) and is not asked: T stands in the losses of the networks
that are trained, and nowhere else.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastdistill.choices import Settings
from fastdistill.diffusion import Noise
from fastdistill.models.digits import OMEGA

_FEW = 64
"""Elements of a sample from which its noise's strength can be read off it."""


class AugmentationSettings(Settings):
    """ScoreAug: what is drawn for each sample of a denoising loss; one transformation at a time."""

    probability: float = Field(default=0.3, gt=0, lt=1)
    """Share of the samples that are transformed; the others stay plain, as later inputs are."""
    flip: bool = False
    """Mirror left and right."""
    rotation: bool = False
    """Turn by 90, 180 or 270 degrees."""
    translation: float = Field(default=0.0, ge=0, lt=1)
    """Largest shift, as a share of the side; what comes in from outside is zero. 0 is off."""
    cutout: float = Field(default=0.0, ge=0, lt=1)
    """Side of a square that is set to zero, as a share of the sample's side. 0 is off."""
    brightness: float = Field(default=0.0, ge=0, le=2)
    """Bound of |log b| of a factor b. 0 is off."""
    conditioned: bool = False
    """Tell the network what was drawn; it must be one that can be told (``model.omega``)."""
    invariant: tuple[Literal["flip", "rotation"], ...] = ()
    """What the law of the data (for a critic: of the student's samples too) does not change under;
    such needs no conditioning."""

    @model_validator(mode="after")
    def _has_its_conditions(self) -> AugmentationSettings:
        if not self.kinds:
            raise ValueError(
                "augmentation has nothing to do: set one of flip, rotation, translation, cutout, "
                "brightness"
            )
        for kind in ("flip", "rotation"):
            if getattr(self, kind) and not (self.conditioned or kind in self.invariant):
                raise ValueError(
                    f"{kind} cannot be told from noise, so that the network would learn the law of "
                    f"transformed data: set conditioned (with model.omega), or name {kind} under "
                    "invariant where the data's law is the same under it"
                )
        return self

    @property
    def kinds(self) -> tuple[str, ...]:
        """The transformations that are on."""
        names = ("flip", "rotation", "translation", "cutout", "brightness")
        return tuple(name for name in names if getattr(self, name))

    def check(self, network: Any, whose: str) -> None:
        """Make sure that a network may be trained on transformed inputs.

        Raises:
            ValueError: for a frozen one, and one that cannot be told what was drawn.
        """
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise ValueError(
                f"augmentation is for losses of networks that are trained, but the {whose} is "
                "frozen: it never saw transformed inputs"
            )
        if self.conditioned and not getattr(network, "takes_omega", False):
            raise ValueError(
                f"augmentation.conditioned is set, but the {whose}'s {type(network).__name__} "
                "cannot be told what was drawn; take a network that can (model.omega=true of "
                "model digits), or transformations that need no telling"
            )

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Make sure that samples of a shape can be transformed.

        Raises:
            ValueError: for vectors with anything but brightness, pictures that are not square with
                rotation, and brightness that could not be seen.
        """
        moved = [kind for kind in self.kinds if kind != "brightness"]
        if moved and len(shape) != 3:
            raise ValueError(
                f"{moved[0]} is for pictures [C, H, W], but a sample is {list(shape)}; leave "
                "brightness alone on"
            )
        if self.rotation and shape[1] != shape[2]:
            raise ValueError(
                f"rotation is for square pictures, but a sample is {list(shape)}; turn it off"
            )
        if self.brightness and not self.conditioned and math.prod(shape) < _FEW:
            raise ValueError(
                f"brightness changes the noise's strength, which cannot be read off "
                f"{math.prod(shape)} numbers: set conditioned (with model.omega), or turn it off"
            )


class Transformation(NamedTuple):
    """One linear transformation for each sample of a batch."""

    source: Tensor | None
    """Pixel that each pixel is taken from, int64 [B, H W]; None moves nothing."""
    gain: Tensor
    """Factor of each pixel, 0 in holes  # [B, H W], or [B, 1]"""
    omega: Tensor
    """What was drawn, zero for plain samples: flip; rotation by 90, 180, 270; translation y, x;
    cutout, its y, x; log b  # [B, OMEGA]"""

    def __call__(self, value: Tensor) -> Tensor:
        """Transformed samples [B, C, H, W] (or [B, ...] for brightness alone) in their dtype."""
        if self.source is None:
            return self.gain.to(value.dtype).reshape(-1, *[1] * (value.ndim - 1)) * value
        flat = value.flatten(2)
        moved = flat.gather(2, self.source[:, None].expand(-1, flat.shape[1], -1))
        return (self.gain[:, None].to(value.dtype) * moved).reshape(value.shape)


def draw_transformation(
    settings: AugmentationSettings,
    noise: Noise,
    stream: str,
    index: Tensor,
    shape: tuple[int, ...],
) -> Transformation:
    """Draw a transformation for each sample, by its global index.

    Args:
        settings: what may be drawn.
        noise: source of randomness, at the update's step.
        stream: name of the stream.
        index: global index of each sample, int64 [B].
        shape: shape of one sample.

    Raises:
        ValueError: for a shape that cannot be transformed so.
    """
    settings.check_shape(shape)
    u = noise.uniform(stream, index, (5,))  # applied, kind, three numbers of it
    kinds = settings.kinds
    drawn = (u[:, 1] * len(kinds)).long().clamp(max=len(kinds) - 1)
    drawn = torch.where(u[:, 0] < settings.probability, drawn, -1)  # [B]
    on = {kind: drawn == number for number, kind in enumerate(kinds)}
    zero = torch.zeros_like(drawn, dtype=torch.bool)
    flip, rotation, translation, cutout, brightness = (
        on.get(kind, zero) for kind in ("flip", "rotation", "translation", "cutout", "brightness")
    )
    log_gain = brightness * settings.brightness * (2 * u[:, 2] - 1)
    if len(shape) != 3:
        empty = torch.zeros(len(index), OMEGA - 1, device=index.device)
        omega = torch.cat((empty, log_gain[:, None]), dim=1)
        return Transformation(None, log_gain.exp()[:, None], omega)
    height, width = shape[1:]
    quarter = rotation * (1 + (3 * u[:, 2]).long().clamp(max=2))  # [B], 0 is none
    down, right = (
        translation * _shift(u[:, column], settings.translation, size)
        for column, size in ((2, height), (3, width))
    )
    hole_y, hole_x = (
        (u[:, column] * size).long().clamp(max=size - 1)
        for column, size in ((2, height), (3, width))
    )
    source, inside = _sources(flip, quarter, down, right, height, width)
    rows, columns = _grid(height, width, index.device)
    half = settings.cutout / 2
    hole = ((rows - _column(hole_y)).abs() <= half * height) & (
        (columns - _column(hole_x)).abs() <= half * width
    )
    kept = inside & ~(hole & _column(cutout))
    gain = (kept * _column(log_gain.exp())).flatten(1)
    turned = [quarter == count for count in (1, 2, 3)]
    shifts = [down / height, right / width]
    holes = [cutout, cutout * (hole_y + 1) / height, cutout * (hole_x + 1) / width]
    omega = torch.stack([flip, *turned, *shifts, *holes, log_gain], dim=1)
    return Transformation(source.flatten(1), gain, omega)


def _shift(uniform: Tensor, share: float, size: int) -> Tensor:
    """Whole pixels from -share to share of the side, all alike probable  # [B]"""
    most = int(share * size)
    return (uniform * (2 * most + 1)).long().clamp(max=2 * most) - most


def _sources(
    flip: Tensor, quarter: Tensor, down: Tensor, right: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Number of the pixel that each is taken from [B, H, W], and whether there is one."""
    rows, columns = _grid(height, width, flip.device)
    y, x = rows - _column(down), columns - _column(right)
    x = torch.where(_column(flip), width - 1 - x, x)
    for count, (turned_y, turned_x) in enumerate(
        ((x, width - 1 - y), (height - 1 - y, width - 1 - x), (height - 1 - x, y)), start=1
    ):
        chosen = _column(quarter == count)
        y, x = torch.where(chosen, turned_y, y), torch.where(chosen, turned_x, x)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return y.clamp(0, height - 1) * width + x.clamp(0, width - 1), inside


def _grid(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of each pixel  # [1, H, 1], [1, 1, W]"""
    rows = torch.arange(height, device=device)
    return rows[None, :, None], torch.arange(width, device=device)[None, None, :]


def _column(value: Tensor) -> Tensor:
    return value[:, None, None]
