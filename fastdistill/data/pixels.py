"""Records decoded: images cut to a square and resized, arrays as they are."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, NamedTuple

import numpy
import torch
from torch import Tensor

from fastdistill.data.sources import Record

if TYPE_CHECKING:
    from PIL import Image


class Decoded(NamedTuple):
    """A record's content as tensors."""

    record: Record
    """What it was decoded from."""
    pixels: Tensor | None = None
    """An image, uint8 [3, size, size]."""
    sample: Tensor | None = None
    """An array as the denoiser sees it, float32 [C, H, W]."""
    original_size: tuple[int, int] | None = None
    """Height and width before resizing; None without an image."""
    crop: tuple[int, int] = (0, 0)
    """Top and left of the square in the resized image."""

    def as_float(self) -> Tensor:
        """The sample, or the pixels in [-1, 1]  # [C, H, W]"""
        if self.sample is not None:
            return self.sample
        assert self.pixels is not None
        return to_unit_range(self.pixels.float())


def to_unit_range(pixels: Tensor) -> Tensor:
    """Values from 0 to 255 in [-1, 1], in place."""
    return pixels.div_(127.5).sub_(1)


def decode(record: Record, size: int) -> Decoded:
    """Make tensors of a record.

    An image, and an uint8 array [3, H, W], is cut to its central square and resized to ``size``
    (bicubic, antialiased). A float array is taken as it is.

    Raises:
        ValueError: naming the record, for an image that is broken or of more than 8 bits, and an
            array that has another shape or values that are not finite.
    """
    content = record.content
    if content is None:
        return Decoded(record)
    try:
        if isinstance(content, bytes):
            return _decode_image(record, _open_image(content), size)
        if content.dtype != torch.uint8:
            return Decoded(record, sample=_check_array(content))
        if content.dim() != 3 or len(content) != 3:
            raise ValueError(f"it has shape {list(content.shape)}, expected [3, height, width]")
        from PIL import Image

        image = Image.fromarray(content.permute(1, 2, 0).contiguous().numpy())
        return _decode_image(record, image, size)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises SyntaxError for some PNGs
        raise ValueError(f"{record.name} cannot be used: {error}") from error


def _open_image(content: bytes) -> Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError as error:
        raise ValueError("it is no image that Pillow knows") from error
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError(f"it has mode {image.mode}, expected 8 bits a channel")
    upright = ImageOps.exif_transpose(image)
    assert upright is not None
    return upright.convert("RGB")


def _decode_image(record: Record, image: Image.Image, size: int) -> Decoded:
    from PIL import Image

    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    if (width, height) != (size, size):
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box)
    pixels = torch.from_numpy(numpy.array(image)).permute(2, 0, 1).contiguous()
    scale = size / side
    crop = (round(top * scale), round(left * scale))
    return Decoded(record, pixels, original_size=(height, width), crop=crop)


def _check_array(array: Tensor) -> Tensor:
    if not array.dtype.is_floating_point:
        raise ValueError(f"it is an array of {array.dtype}, expected uint8 pixels or floats")
    array = array.float()
    if not torch.isfinite(array).all():
        raise ValueError("it has nan or infinite values")
    return array
