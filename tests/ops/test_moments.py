"""8-bit moments: the codec, its roundings and `adamw_ema_` with them."""

from __future__ import annotations

import pytest
import torch
from calls import calls, map_tensors
from test_adamw import BACKENDS, KEY, SIZE, State, random

from fastdistill.ops import adamw_ema_, dequantise_moment, quantise_moment, use_backend
from fastdistill.ops.adamw import _adamw_ema_, _random_words


class Coded(State):
    """The state of an update with moments of 8 bits."""

    def __init__(self, size: int = SIZE, averages: int = 0, copy: torch.dtype | None = None):
        super().__init__(size, averages, copy)
        self.exp_avg, self.exp_avg_sq = torch.zeros(2, size, dtype=torch.uint8).unbind()
        self.scales = torch.zeros(2, -(-size // 256))

    def tensors(self) -> list[torch.Tensor]:
        return [*super().tensors(), *self.scales]

    def update(self, gradient: torch.Tensor, **options) -> None:
        options.setdefault("moment_key", KEY)
        scales = {"exp_avg_scale": self.scales[0], "exp_avg_sq_scale": self.scales[1]}
        super().update(gradient, **scales, **options)

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            dequantise_moment(self.exp_avg, self.scales[0], signed=True),
            dequantise_moment(self.exp_avg_sq, self.scales[1], signed=False),
        )


def halves(like: torch.Tensor, key: torch.Tensor = KEY) -> dict[bool, torch.Tensor]:
    """The noise of signed and of unsigned codes."""
    word = _random_words(key, like)
    return {True: (word >> 16 << 4).int(), False: ((word & 0xFFFF) << 4).int()}


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_decoded_and_encoded_again(signed):
    code = torch.arange(256, dtype=torch.uint8)
    scale = torch.tensor([8.0])  # a power of two, so that quotients are exact
    value = dequantise_moment(code, scale, signed=signed)
    found, same = quantise_moment(value, signed=signed)
    assert torch.equal(same, scale)
    assert torch.equal(found, torch.where(code == 128, 0, code) if signed else code)
    largest = 127 if signed else 255
    assert value[largest] == 8.0
    assert value[0] == 0
    positive = value[1 : largest + 1]
    steps = positive[1:] / positive[:-1]
    assert (steps > 1.06).all()
    assert (steps < 1.13).all()
    assert torch.equal(positive[8:], 2 * positive[:-8])  # eight codes an octave
    if signed:
        assert torch.equal(value[129:], -value[1:128])


@pytest.mark.parametrize("signed", [True, False])
def test_blocks_have_their_own_scale_and_zeros_stay_zeros(signed):
    value = random(3, 300).square()
    value[1, :212] = 0  # with the end of the row before, the second block
    value[0, 256:] = 0
    value[2, -1] = 1e30
    code, scale = quantise_moment(value, signed=signed)
    assert (code.shape, scale.shape) == ((3, 300), (4,))
    assert scale[1] == 1
    assert scale[3] == float(torch.tensor(1e30))
    found = dequantise_moment(code, scale, signed=signed)
    assert torch.equal(found == 0, code == 0)
    if not signed:  # never a zero that an update would divide by
        assert torch.equal(found == 0, value == 0)
    near = value > value.flatten()[:256].max() / 2**15
    near[2, 168:] = False
    torch.testing.assert_close(found[near], value[near], rtol=0.0626, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_rounding_is_unbiased(signed):
    """The mean of 4,000 roundings of each of 256 values, over 14 octaves."""
    count = 4000
    value = torch.exp2(-14 * torch.rand(256, generator=torch.Generator().manual_seed(0)))
    value[0] = 1
    value = value * random(256, seed=1).sign() if signed else value
    many = value.repeat(count)
    code, scale = quantise_moment(many, signed=signed, noise=halves(many)[signed])
    found = dequantise_moment(code, scale, signed=signed).double().view(count, 256)
    error = found.mean(0) / value.double() - 1
    assert error[0] == 0
    assert error.abs().max() < 5 * 0.0625 / count**0.5
    assert error.mean().abs() < 4 * 0.04 / (256 * count) ** 0.5
    assert (found.std(0)[1:] > 0).all()


def test_the_two_moments_are_rounded_independently():
    value = torch.full((100_000,), 0.53)
    value[::256] = 1.0
    noise = halves(value)
    up = [quantise_moment(value, signed=s, noise=noise[s])[0].double() for s in (True, False)]
    correlation = torch.corrcoef(torch.stack([u.view(-1) for u in up]).view(2, -1)[:, 1:256])[0, 1]
    assert up[0].unique().numel() == 3
    assert correlation.abs() < 0.3


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("size", [1, 255, 256, 1000, 4096, 5008])
@pytest.mark.parametrize("key", [KEY, torch.tensor([-5, 2**31, 2**33 + 1])], ids=["small", "large"])
def test_codes_have_the_bits_of_the_reference(size, key, backend):
    """Without memory m = g and v = g^2 exactly, so that every code must be the reference's."""
    gradient = random(size) * torch.exp2(15 * random(size, seed=1))
    gradient[size // 3 :][:300] = 0
    state = Coded(size)
    with use_backend(backend):
        state.update(gradient, betas=(0.0, 0.0), moment_key=key)
    noise = halves(gradient, key)
    for signed, value, codes, scale in (
        (True, gradient, state.exp_avg, state.scales[0]),
        (False, gradient.square(), state.exp_avg_sq, state.scales[1]),
    ):
        expected = quantise_moment(value, signed=signed, noise=noise[signed])
        assert torch.equal(codes, expected[0])
        assert torch.equal(scale, expected[1])


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("size", [1, 300, 4096, 5000])
def test_updates_are_those_of_the_reference(size, backend):
    """From the same codes: parameters to an ulp or two, codes but where a last place decides."""
    theirs = Coded(size, averages=1, copy=torch.bfloat16)
    for step in range(4):
        gradient = random(size, seed=step).bfloat16()
        options = {"max_norm": 0.5, "squared_norm": gradient.float().square().sum()}
        options |= {"moment_key": torch.tensor([1, 2, step]), "key": KEY}
        ours = Coded(size, averages=1, copy=torch.bfloat16)
        for mine, other in zip(ours.tensors(), theirs.tensors(), strict=True):
            mine.copy_(other)
        for state, name in ((theirs, "reference"), (ours, backend)):
            with use_backend(name):
                state.update(gradient, **options)
        for mine, other in zip(ours.tensors(), theirs.tensors(), strict=True):
            if mine.dtype == torch.uint8:
                assert (mine != other).double().mean() < 1e-3
                assert (mine.int() - other.int()).abs().max() <= 1
            else:
                place = 2.0**-7 if mine.dtype == torch.bfloat16 else 2e-6
                torch.testing.assert_close(mine, other, rtol=place, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_update_takes_the_moments_before_they_are_rounded(backend):
    """The first update moves every parameter by lr, whatever its moments are stored as."""
    state, exact = Coded(), State(averages=0)
    gradient = random(SIZE) * torch.exp2(10 * random(SIZE, seed=1))
    with use_backend(backend):
        state.update(gradient)
        exact.update(gradient)
    torch.testing.assert_close(state.parameter, exact.parameter, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_skipped_update_changes_no_code(backend):
    state = Coded(averages=1)
    with use_backend(backend):
        state.update(random(SIZE))
        before = [tensor.clone() for tensor in state.tensors()]
        state.update(random(SIZE, seed=1), squared_norm=torch.tensor(float("nan")))
    for tensor, old in zip(state.tensors(), before, strict=True):
        assert torch.equal(tensor, old)


BETA2 = 0.999


def test_second_moments_follow_the_gradients_variance():
    """Their rounding errors, which last for 1,000 updates, spread by a fifth and cancel."""
    size = 4096
    state, exact = Coded(size), torch.zeros(size)
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp2(1.5 * torch.randn(size, generator=generator))
    for step in range(3000):
        gradient = spread * torch.randn(size, generator=generator)
        exact.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        state.update(gradient, lr=0.0, moment_key=torch.tensor([7, 8, step]))
    ratio = state.moments()[1] / exact
    assert ratio.mean() == pytest.approx(1.0, abs=0.02)
    assert ratio.std() < 0.25


@pytest.mark.parametrize("nearest", [False, True])
def test_second_moments_learn_a_new_variance_unless_rounding_is_to_the_nearest(nearest):
    """Gradients grow from 1/2 to 1 beside one of 2: an update moves v by 0.3 percent, a code 9."""
    gradient = torch.full((4096,), 0.5)
    gradient[::256] = 2.0
    codes, scale = quantise_moment(gradient.square(), signed=False)
    gradient = gradient.clamp(min=1.0)
    for step in range(3000):
        v = BETA2 * dequantise_moment(codes, scale, signed=False) + (1 - BETA2) * gradient.square()
        noise = None if nearest else halves(v, torch.tensor([1, 2, step]))[False]
        codes, scale = quantise_moment(v, signed=False, noise=noise)
    found = dequantise_moment(codes, scale, signed=False).view(16, 256)[:, 1:].mean()
    expected = 1 - 0.75 * BETA2**3000
    assert found == pytest.approx(0.25 if nearest else expected, rel=0.03)


@pytest.mark.parametrize("backend", ["cpu"])
def test_a_regression_ends_at_the_loss_of_float32_moments(backend):
    """A network of one hidden layer on noisy targets; 5 percent is the margin."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 32, generator=generator)
    y = torch.sin(x @ torch.randn(32, generator=generator) / 2)
    y = y + 0.1 * torch.randn(2048, generator=generator)
    losses = []
    for state in (State(34 * 64, averages=0), Coded(34 * 64)):
        weights = state.parameter.mul_(0.1)
        for step in range(600):
            flat = weights.detach().requires_grad_()
            hidden, bias, out = flat.split((32 * 64, 64, 64))
            found = torch.tanh(x @ hidden.view(32, 64) + bias) @ out
            loss = (found - y).square().mean()
            (gradient,) = torch.autograd.grad(loss, flat)
            key = {"moment_key": torch.tensor([1, 2, step])} if isinstance(state, Coded) else {}
            with use_backend(backend):
                state.update(gradient, lr=3e-3, weight_decay=0.0, **key)
        losses.append(loss.item())
    assert losses[0] < 0.1 * y.square().mean()
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def coded_call() -> tuple:
    """Arguments of the op with everything that it takes."""
    args = list(calls()[_adamw_ema_])
    blocks = -(-args[0].numel() // 256)
    args[2:4] = [torch.full_like(args[0], 200, dtype=torch.uint8) for _ in range(2)]
    args[7:9] = [torch.ones(blocks), torch.ones(blocks)]
    args[14] = torch.tensor([4, 5, 6])
    return tuple(args)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend):
    with use_backend(backend):
        torch.library.opcheck(_adamw_ema_.overload, coded_call())


def test_compiles_without_a_graph_break():
    def run(p, g, m, v, step, scale_m, scale_v, counters, key):
        adamw_ema_(
            *(p, g, m, v, step),
            lr=[0.1, 0.2],
            starts=[0, 9, 300],
            groups=[1, 0, 1],
            exp_avg_scale=scale_m,
            exp_avg_sq_scale=scale_v,
            moment_key=key,
            counters=counters,
        )

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        state = Coded()
        counters = torch.zeros(2, dtype=torch.int32)
        given = (state.exp_avg, state.exp_avg_sq, state.step, *state.scales, counters, KEY)
        function(state.parameter, random(SIZE), *given)
        results.append(state.tensors())
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)
    assert results[1][3] == 1


def test_meta_tensors_are_taken():
    args = map_tensors(lambda value: value.to("meta"), coded_call())
    assert _adamw_ema_(*args) is None


def test_wrong_input_is_refused():
    state = Coded(300)

    def refused(match, **options):
        options = {"exp_avg_scale": state.scales[0], "exp_avg_sq_scale": state.scales[1]} | options
        with pytest.raises(ValueError, match=match):
            State.update(state, random(300), **options)

    refused("some are missing")
    refused("some are missing", exp_avg_scale=None, moment_key=KEY)
    refused("exp_avg_sq_scale is", exp_avg_sq_scale=torch.zeros(3), moment_key=KEY)
    refused("exp_avg_scale is", exp_avg_scale=torch.zeros(2).double(), moment_key=KEY)
    refused("key is", moment_key=torch.zeros(2))
    refused("or uint8 with", exp_avg_scale=None, exp_avg_sq_scale=None)
    state.exp_avg = torch.zeros(300)
    refused("exp_avg is", moment_key=KEY)
    state.exp_avg = torch.zeros(299, dtype=torch.uint8)
    refused("exp_avg has shape", moment_key=KEY)
    with pytest.raises(ValueError, match="noise has shape"):
        quantise_moment(torch.zeros(3), signed=True, noise=torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="one for each 256"):
        dequantise_moment(torch.zeros(257, dtype=torch.uint8), torch.ones(1), signed=True)
