"""Ops of U-Nets' layers: torch's values and gradients, and nothing kept but what they read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastdistill.ops import geglu, geglu_backward, group_norm_silu


def kept(function, *inputs):
    """Shapes of what autograd keeps of a call beside its inputs, each storage once."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*inputs)
    known = {value.untyped_storage()._cdata for value in inputs if value is not None}
    return [list(value.shape) for key, value in saved.items() if key not in known]


def plain_geglu(x, approximate):
    a, g = x.chunk(2, dim=-1)
    return a * F.gelu(g, approximate=approximate)


def plain_norm(x, weight, bias, shift, silu, groups=4):
    z = x if shift is None else x + shift.reshape(*shift.shape, *[1] * (x.ndim - 2))
    u = F.group_norm(z, groups, weight, bias, 1e-3)
    return F.silu(u) if silu else u


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_geglu_is_torchs_in_float64(approximate):
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(geglu(x, approximate), plain_geglu(x, approximate))
    assert torch.autograd.gradcheck(lambda x: geglu(x, approximate), x)
    grad = torch.randn(2, 3, 5, dtype=torch.float64)
    dx, again = geglu_backward(grad, x.detach(), approximate, value=True)
    (true,) = torch.autograd.grad(plain_geglu(x, approximate), x, grad)
    torch.testing.assert_close(dx, true)
    torch.testing.assert_close(again, plain_geglu(x, approximate).detach())


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_group_norm_silu_is_torchs_in_float64(silu, shifted, last):
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64)
    x = (x.to(memory_format=torch.channels_last) if last else x).requires_grad_()
    weight, bias, shift = (
        torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((8,), (8,), (2, 8))
    )
    inputs = (x, weight, bias, shift) if shifted else (x, weight, bias)

    def ours(x, weight, bias, shift=None):
        return group_norm_silu(x, 4, weight, bias, 1e-3, shift, silu)

    def torchs(x, weight, bias, shift=None):
        return plain_norm(x, weight, bias, shift, silu)

    mine, true = ours(*inputs), torchs(*inputs)
    torch.testing.assert_close(mine, true)
    assert mine.stride() == x.stride()
    cotangent = torch.randn(2, 8, 3, 2, dtype=torch.float64)
    pairs = zip(*(torch.autograd.grad(y, inputs, cotangent) for y in (mine, true)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)
    assert torch.autograd.gradcheck(ours, inputs)


def test_only_inputs_are_kept():
    x = torch.randn(2, 3, 10, requires_grad=True)
    assert kept(geglu, x) == []
    assert kept(lambda x: plain_geglu(x, "none"), x) == [[2, 3, 5]]  # torch: the gate's value
    image = torch.randn(2, 8, 3, 2, requires_grad=True)
    weight, bias, shift = torch.ones(8), torch.ones(8), torch.randn(2, 8)

    def ours(image, weight, bias, shift):
        return group_norm_silu(image, 4, weight, bias, 1e-3, shift)

    assert kept(ours, image, weight, bias, shift) == [[2, 4], [2, 4]]  # mean and rstd
    torchs = kept(lambda *args: plain_norm(*args, True), image, weight, bias, shift)
    assert sorted(map(len, torchs)) == [2, 2, 4, 4]  # and x + shift, and the norm's value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_at_most_twice_torchs_error(dtype):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 8, 16, 16) * 3, torch.randn(8), torch.randn(8)
    shift = torch.randn(2, 8)
    args = [value.to(dtype) for value in (x, weight, bias, shift)]
    exact = plain_norm(*(value.double() for value in args), True)
    mine = group_norm_silu(args[0], 4, args[1], args[2], 1e-3, args[3])
    torchs = plain_norm(*args, True)
    assert (mine - exact).norm() <= 2 * (torchs - exact).norm()
    exact = plain_geglu(args[0].double(), "none")
    assert (geglu(args[0]) - exact).norm() <= 2 * (plain_geglu(args[0], "none") - exact).norm()


def test_wrong_arguments_are_refused_in_one_sentence():
    x = torch.randn(2, 6, 4, 4)
    for arguments, message in (
        ((x, 4, torch.ones(6), torch.ones(6)), "C divisible by 4"),
        ((x, 3, torch.ones(5), torch.ones(6)), r"weight is \(5,\); expected \[6\]"),
        ((x, 3, torch.ones(6), torch.ones(6), 1e-5, torch.ones(2, 5)), r"shift is \(2, 5\)"),
        ((x[:, :, 0, 0], 3, torch.ones(6), torch.ones(6)), r"expected \[B, C, \.\.\.\]"),
    ):
        with pytest.raises(ValueError, match=message):
            group_norm_silu(*arguments)
    with pytest.raises(ValueError, match=r"expected \[\.\.\., 2 D\]"):
        geglu(torch.randn(2, 5))
    with pytest.raises(ValueError, match="approximate is 'sigmoid'"):
        geglu(torch.randn(2, 6), "sigmoid")
