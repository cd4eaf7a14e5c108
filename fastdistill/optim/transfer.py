"""Packing of tensors into a flat range, unpacking, and checksums, on all threads of the CPU.

Tensors may be dense in any order of their dims, such as channels-last: their elements are copied in
the order in which they lie in memory, whatever their strides. A caller who packs a weight into a
place where it is to be channels-last passes it in channels-last memory.

Copies convert among float32, float64, bfloat16 and float16 as `Tensor.to` does. Autograd does not
record them, and parameters may be given as they are.
"""

from __future__ import annotations

import bisect
import itertools
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

try:
    from fastdistill import _arena
except ImportError:
    _arena = None

_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
_BYTES_AT_A_TIME = 2**26  # what zlib sees at once of a range that is copied from a device


@torch.no_grad()
def pack_(destination: Tensor, sources: Sequence[Tensor], offsets: Sequence[int]) -> None:
    """Write each source's elements into a range, as they lie in memory.

    Args:
        destination: the range, contiguous  # [size]
        sources: dense tensors on the range's device.
        offsets: where each begins in the range, in elements.

    Raises:
        ValueError: for other devices or dtypes, tensors with gaps or repeated elements, sources
            beyond the range's end, and places that overlap each other or a source.
    """
    places, values = _pair("destination", destination, "sources", sources, offsets)
    _copy(values, places)


@torch.no_grad()
def unpack_(source: Tensor, destinations: Sequence[Tensor], offsets: Sequence[int]) -> None:
    """Fill each destination, as it lies in memory, with its part of a range.

    Args:
        source: the range, contiguous  # [size]
        destinations: dense tensors on the range's device.
        offsets: where each begins in the range, in elements.

    Raises:
        ValueError: for other devices or dtypes, tensors with gaps or repeated elements,
            destinations beyond the range's end, or that overlap each other or what they read.
    """
    places, values = _pair("source", source, "destinations", destinations, offsets)
    _copy(places, values)


@torch.no_grad()
def checksum(value: Tensor) -> int:
    """CRC-32 (zlib's) of a dense tensor's bytes as they lie in memory; any dtype and device.

    Raises:
        ValueError: for a tensor with gaps or repeated elements.
    """
    data = _flat("value", value).view(torch.uint8)
    if _arena is not None and data.device.type == "cpu":
        return _arena.checksum(data.data_ptr(), data.numel(), torch.get_num_threads())
    crc = 0
    for part in data.split(_BYTES_AT_A_TIME):
        crc = zlib.crc32(part.cpu().numpy(), crc)
    return crc


def checksums(module: nn.Module) -> dict[str, int]:
    """`checksum` of every parameter and buffer that a module saves, by name."""
    return {name: checksum(value.contiguous()) for name, value in module.state_dict().items()}


def _pair(
    range_name: str, whole: Tensor, name: str, values: Sequence[Tensor], offsets: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """The place of each tensor in the range, and the tensor's elements, both one-dimensional."""
    if whole.ndim != 1 or not whole.is_contiguous():
        raise ValueError(
            f"{range_name} has shape {tuple(whole.shape)} and strides {whole.stride()}; expected "
            "one contiguous dimension"
        )
    if len(values) != len(offsets):
        raise ValueError(f"there are {len(values)} {name} and {len(offsets)} offsets")
    whole = _checked(range_name, whole, whole.device)
    places, flats = [], []
    for index, (value, offset) in enumerate(zip(values, offsets, strict=True)):
        flat = _checked(f"{name}[{index}]", value, whole.device)
        if not 0 <= offset <= whole.numel() - flat.numel():
            raise ValueError(
                f"{name}[{index}] has {flat.numel()} elements at offset {offset}; {range_name} has "
                f"only {whole.numel()}"
            )
        places.append(whole.narrow(0, offset, flat.numel()))
        flats.append(flat)
    return places, flats


def _checked(name: str, value: Tensor, device: torch.device) -> Tensor:
    """`_flat` of a tensor that can be copied from or to the device."""
    if value.dtype not in _DTYPES:
        raise ValueError(f"{name} is {value.dtype}; expected one of {', '.join(_DTYPES.values())}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; expected {device}, where the range is")
    return _flat(name, value)


def _flat(name: str, value: Tensor) -> Tensor:
    """A view of the elements as they lie in memory  # [numel]"""
    if hasattr(value, "to_local"):
        raise ValueError(f"{name} is a DTensor; pass its to_local(), which is this rank's part")
    if value.layout != torch.strided:
        raise ValueError(f"{name} is {value.layout}; expected a dense tensor")
    if not value.is_contiguous():
        dims = zip(value.stride(), value.shape, strict=True)
        expected = 1
        for stride, size in sorted(dim for dim in dims if dim[1] > 1):
            if stride != expected:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)} and strides {value.stride()}, which "
                    f"leave gaps or repeat elements; pass {name}.contiguous()"
                )
            expected *= size
    return value.as_strided((value.numel(),), (1,))


def _copy(sources: list[Tensor], destinations: list[Tensor]) -> None:
    _check_apart(sources, destinations)
    if not sources:
        return
    if _arena is None or sources[0].device.type != "cpu":
        torch._foreach_copy_(destinations, sources)
        return
    code = {dtype: getattr(_arena.Dtype, name) for dtype, name in _DTYPES.items()}
    pieces = [
        (source.data_ptr(), code[source.dtype], to.data_ptr(), code[to.dtype], to.numel())
        for source, to in zip(sources, destinations, strict=True)
    ]
    _arena.transfer(pieces, torch.get_num_threads())
    torch.autograd.graph.increment_version(destinations)


def _check_apart(sources: list[Tensor], destinations: list[Tensor]) -> None:
    """Raise ValueError where what is written is also read, or written twice."""
    written = sorted(_span(index, value) for index, value in enumerate(destinations))
    written = [span for span in written if span[0] < span[1]]
    for (_, end, first), (start, _, second) in itertools.pairwise(written):
        if start < end:
            raise ValueError(
                f"numbers {first} and {second} are to be written to the same memory; expected "
                "places that do not overlap"
            )
    for index, value in enumerate(sources):
        start, end, _ = _span(index, value)
        before = bisect.bisect_left(written, (end,))
        if before and start < end and written[before - 1][1] > start:
            raise ValueError(
                f"number {index} is read from memory that number {written[before - 1][2]} is "
                "written to; expected tensors apart from the range"
            )


def _span(index: int, value: Tensor) -> tuple[int, int, int]:
    """First address, end, index; empty for what has no memory, as meta tensors."""
    start = value.data_ptr()
    return start, start + value.nbytes if start else start, index
