"""Packing, unpacking and checksums of flat ranges: bitwise torch's copies, and zlib's CRC-32."""

from __future__ import annotations

import itertools
import zlib

import pytest
import torch
from torch import Tensor

from fastdistill.optim import transfer
from fastdistill.optim.transfer import checksum, pack_, unpack_

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

needs_arena = pytest.mark.skipif(transfer._arena is None, reason="the extension is not built")


@pytest.fixture(params=[pytest.param("cpp", marks=needs_arena), "torch"], autouse=True)
def implementation(request, monkeypatch):
    """Run every test with the extension and without."""
    if request.param == "torch":
        monkeypatch.setattr(transfer, "_arena", None)
    return request.param


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def bits(value: Tensor) -> Tensor:
    return value.contiguous().view(BITS[value.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Bitwise equal; a NaN may have any payload."""
    assert torch.equal(actual.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(bits(actual)[numbers], bits(expected)[numbers])


def hard_numbers(dtype: torch.dtype) -> Tensor:
    """Every 16-bit pattern in both formats, their midpoints and the neighbours of these."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    exact = [patterns.view(kind).double() for kind in (torch.bfloat16, torch.float16)]
    halves = [(a[1:] + a[:-1]) / 2 for a in exact]
    infinity = torch.tensor(torch.inf, dtype=torch.float64)
    beside = [
        half.float().nextafter(sign * infinity.float()) for half in halves for sign in (1, -1)
    ]
    tiny = torch.tensor([2.0**-149, -(2.0**-149), 2.0**-127, 5e-324, 1e300, -0.0, 65519.9, 65520])
    numbers = torch.cat([*exact, *halves, *(value.double() for value in beside), tiny.double()])
    return numbers.to(dtype)


@pytest.mark.parametrize(("there", "here"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_conversions_are_those_of_torch(there, here):
    numbers = hard_numbers(here)
    packed = torch.zeros(numbers.numel() + 7, dtype=there)
    pack_(packed, [numbers], [5])
    assert_same_bits(packed[5:-2], numbers.to(there))
    assert packed[:5].eq(0).all()
    assert packed[-2:].eq(0).all()
    unpacked = torch.zeros_like(numbers)
    unpack_(numbers.to(there), [unpacked], [0])
    assert_same_bits(unpacked, numbers.to(there).to(here))


@pytest.mark.parametrize(("there", "here"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_what_is_not_finite_stays_what_it_is(there, here):
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32)
    nans = nans.view(torch.float32)
    values = torch.cat([nans, torch.tensor([torch.inf, -torch.inf])]).to(here)
    packed = torch.zeros(6, dtype=there)
    pack_(packed, [values], [0])
    assert packed[:4].isnan().all()
    assert packed[4:].tolist() == [torch.inf, -torch.inf]


@pytest.mark.parametrize("implementation", [pytest.param("cpp", marks=needs_arena)], indirect=True)
def test_subnormals_survive_flushing():
    """What torch.set_flush_denormal switches does not reach numbers that are only moved."""
    half = torch.arange(1, 2**10, dtype=torch.int16).view(torch.float16)
    expected = half.float()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormals")
    try:
        widened, back = torch.zeros(half.numel()), torch.zeros_like(half)
        pack_(widened, [half], [0])
        pack_(back, [expected], [0])
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(widened, expected)
    assert torch.equal(bits(back), bits(half))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_tensors_of_unlike_sizes_go_to_their_places_and_back(dtype, threads):
    generator = torch.Generator().manual_seed(0)
    sizes = [200_000, 0, 1, 65536, 65537, 17, *[33] * 500]
    values = [torch.randn(size, generator=generator) for size in sizes]
    offsets = [0, *itertools.accumulate(size + 3 for size in sizes)][:-1]
    packed = torch.full((sum(sizes) + 3 * len(sizes),), 7.0, dtype=dtype)
    pack_(packed, values, offsets)
    expected = torch.cat([torch.cat([v.to(dtype), torch.full((3,), 7.0)]) for v in values])
    assert torch.equal(packed, expected.to(dtype))
    back = [torch.zeros_like(value) for value in values]
    unpack_(packed, back, offsets)
    for value, result in zip(values, back, strict=True):
        assert torch.equal(result, value.to(dtype).float())


def test_sources_of_several_dtypes_go_into_one_range():
    values = [torch.arange(3).to(dtype) for dtype in DTYPES]
    packed = torch.zeros(12)
    pack_(packed, values, [0, 3, 6, 9])
    assert packed.tolist() == [0, 1, 2] * 4


def test_elements_go_in_the_order_of_memory():
    weight = torch.randn(4, 3, 2, 5).to(memory_format=torch.channels_last)
    packed = torch.zeros(weight.numel())
    pack_(packed, [weight], [0])
    assert torch.equal(packed.view(4, 2, 5, 3).permute(0, 3, 1, 2), weight)
    back = torch.zeros_like(weight)
    assert back.is_contiguous(memory_format=torch.channels_last)
    unpack_(packed, [back], [0])
    assert torch.equal(back, weight)


def test_transposed_and_offset_tensors_are_dense():
    values = [torch.randn(3, 5).t(), torch.randn(9)[4:], torch.randn(2, 1, 3).transpose(0, 1)]
    packed = torch.zeros(26)
    pack_(packed, values, [0, 15, 20])
    expected = [values[0].t().flatten(), values[1], values[2].flatten()]
    assert torch.equal(packed, torch.cat(expected))


def test_parameters_are_filled_without_autograd_and_their_version_counts_up():
    parameter = torch.nn.Parameter(torch.zeros(4))
    saved = parameter.square().sum()  # keeps the parameter for its backward pass
    unpack_(torch.arange(4.0), [parameter], [0])
    assert parameter.tolist() == [0, 1, 2, 3]
    assert parameter.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()
    packed = torch.zeros(4)
    pack_(packed, [parameter], [0])
    assert not packed.requires_grad


def test_nothing_is_packed_from_no_tensors():
    packed = torch.ones(4)
    pack_(packed, [], [])
    pack_(packed, [torch.zeros(0)], [4])
    unpack_(packed, [], [])
    assert packed.tolist() == [1] * 4


@pytest.mark.parametrize(
    ("values", "offsets", "message"),
    [
        ([torch.ones(3)], [0, 3], "there are 1 {name} and 2 offsets"),
        ([torch.ones(3)], [6], r"{name}\[0\] has 3 elements at offset 6; {range} has only 8"),
        ([torch.ones(3)], [-1], r"at offset -1"),
        ([torch.ones(3), torch.ones(9)], [0, 0], r"{name}\[1\] has 9 elements"),
        ([torch.ones(3).int()], [0], r"{name}\[0\] is torch.int32; expected one of float32"),
        ([torch.ones(3, device="meta")], [0], r"{name}\[0\] is on meta; expected cpu"),
        ([torch.ones(6)[::2]], [0], r"strides \(2,\), which leave gaps or repeat elements"),
        ([torch.ones(1).expand(3)], [0], r"pass {name}\[0\].contiguous\(\)"),
        ([torch.ones(3).to_sparse()], [0], r"{name}\[0\] is torch.sparse_coo; expected a dense"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(values, offsets, message):
    with pytest.raises(ValueError, match=message.format(name="sources", range="destination")):
        pack_(torch.zeros(8), values, offsets)
    with pytest.raises(ValueError, match=message.format(name="destinations", range="source")):
        unpack_(torch.zeros(8), values, offsets)


def test_a_range_has_one_contiguous_dimension():
    for wrong in (torch.zeros(2, 4), torch.zeros(16)[::2]):
        with pytest.raises(ValueError, match="expected one contiguous dimension"):
            pack_(wrong, [], [])
        with pytest.raises(ValueError, match="expected one contiguous dimension"):
            unpack_(wrong, [], [])


def test_nothing_is_written_twice_or_read_where_it_is_written():
    whole, one = torch.zeros(8), torch.ones(4)
    with pytest.raises(ValueError, match="numbers 0 and 1 are to be written to the same memory"):
        pack_(whole, [one, one], [0, 3])
    with pytest.raises(ValueError, match="numbers 0 and 1 are to be written to the same memory"):
        unpack_(whole, [one, one[2:]], [0, 4])
    with pytest.raises(ValueError, match="number 0 is read from memory that number 0 is written"):
        pack_(whole, [whole[2:4]], [1])
    with pytest.raises(ValueError, match="number 1 is read from memory that number 0 is written"):
        unpack_(whole, [whole[4:6], one], [0, 4])
    pack_(whole, [one, one], [0, 4])
    pack_(whole, [whole[:4]], [4])
    assert whole.tolist() == [1] * 8


@pytest.mark.parametrize(
    "size", [0, 1, 2, 7, 8, 9, 31, 1001, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20 + 12345]
)
def test_a_checksum_is_zlibs_crc32(size, threads):
    data = torch.randint(0, 256, (size,), dtype=torch.uint8)
    assert checksum(data) == zlib.crc32(data.numpy())


def test_a_checksum_changes_with_any_bit(threads):
    data = torch.randint(0, 256, (2**21 + 77,), dtype=torch.uint8)
    before = checksum(data)
    for place, bit in ((0, 1), (2**18, 128), (2**20 + 5, 4), (2**21 + 76, 64)):
        data[place] ^= bit
        assert checksum(data) != before
        data[place] ^= bit
    assert checksum(data) == before


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool], ids=str)
def test_a_checksum_is_of_the_bytes_in_memory(dtype):
    value = torch.randn(3, 5, 2, 4).to(dtype).to(memory_format=torch.channels_last)
    in_memory = value.permute(0, 2, 3, 1).contiguous().view(torch.uint8)
    assert checksum(value) == zlib.crc32(in_memory.numpy())
    assert checksum(torch.ones((), dtype=dtype)) == checksum(torch.ones(1, dtype=dtype))


def test_a_checksum_may_be_computed_by_parts(monkeypatch):
    monkeypatch.setattr(transfer, "_BYTES_AT_A_TIME", 64)
    data = torch.randn(1000)
    assert checksum(data) == zlib.crc32(data.numpy())


def test_a_tensor_with_gaps_has_no_checksum():
    with pytest.raises(ValueError, match=r"pass value.contiguous\(\)"):
        checksum(torch.zeros(4, 4)[:, :2])
