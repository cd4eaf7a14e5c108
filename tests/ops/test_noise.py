"""Counter-based noise: the published vectors, the distribution, and independence of everything."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from fastdistill.diffusion import Noise
from fastdistill.ops import normal, uniform, use_backend
from fastdistill.ops.noise import philox_4x32

BACKENDS = ["reference", "cpu", "triton"]

# Random123's known-answer file, philox4x32 with ten rounds.
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter, key, words):
    assert philox_4x32(counter, key) == words
    tensors = [torch.tensor(value) for value in (*counter, *key)]
    assert [int(word) for word in philox_4x32(tensors[:4], tensors[4:])] == words


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS[:1] + KNOWN_ANSWERS[2:])
def test_every_backend_draws_uniforms_from_the_published_words(backend, counter, key, words):
    """Block c0 of sample c1, step c2, stream c3 under the 64-bit seed k."""
    block, sample, step, stream = counter
    if block > 4096:
        block = 0  # the element would be out of memory's reach; the key is what this case is for
        words = philox_4x32([block, sample, step, stream], key)
    seed = key[0] | key[1] << 32
    noise_key = torch.tensor([seed - 2**64 if seed >= 2**63 else seed, stream, step])
    with use_backend(backend):
        drawn = uniform(noise_key, torch.tensor([sample]), (4 * block + 4,))[0, -4:]
    assert drawn.double().tolist() == [((word >> 9) + 0.5) / 2**23 for word in words]


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_backends_agree(backend):
    key, sample = torch.tensor([11, 3, 2**31 + 5]), torch.tensor([0, 7, 2**31 + 1])
    with use_backend("reference"):
        uniforms = uniform(key, sample, (5, 7))
        exact = normal(key, sample, (3, 67), torch.float64)
    with use_backend(backend):
        assert torch.equal(uniform(key, sample, (5, 7)), uniforms)
        found = normal(key, sample, (3, 67))
    assert (found.double() - exact).abs().max() < 1e-6


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_normals_are_normal(backend):
    with use_backend(backend):
        z = Noise(5).normal("test", torch.arange(2000), (500,)).double().flatten()
    n = z.numel()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert scipy.stats.kstest(z[:100_000].numpy(), "norm").pvalue > 1e-4
    for bound in (3.0, 4.0):
        expected = 2 * scipy.stats.norm.sf(bound)
        share = float((z.abs() > bound).double().mean())
        assert abs(share - expected) < 5 * math.sqrt(expected / n)
    assert float(z.abs().max()) < math.sqrt(2 * math.log(2**33))


def test_streams_steps_seeds_samples_and_elements_are_independent():
    index = torch.arange(400)
    base = Noise(0).normal("a", index, (250,))
    others = {
        "stream": Noise(0).normal("b", index, (250,)),
        "step": Noise(0).at(1).normal("a", index, (250,)),
        "seed": Noise(1).normal("a", index, (250,)),
        "sample": Noise(0).normal("a", index + 1, (250,)),
        "high seed bits": Noise(1 << 40).normal("a", index, (250,)),
    }
    for name, other in others.items():
        correlation = float((base * other).mean())
        assert abs(correlation) < 5 / math.sqrt(base.numel()), name
    neighbours = float((base[:, 1:] * base[:, :-1]).mean())
    assert abs(neighbours) < 5 / math.sqrt(base.numel())


def test_noise_depends_on_the_global_index_and_not_on_the_batch():
    """Two ranks with half the batch each draw what one rank draws; a longer sample extends it."""
    noise = Noise(3).at(9)
    whole = noise.normal("x", torch.arange(8), (3, 5))
    halves = [noise.normal("x", torch.arange(4) + 4 * rank, (3, 5)) for rank in range(2)]
    assert torch.equal(whole, torch.cat(halves))
    assert torch.equal(whole.flatten(1), noise.normal("x", torch.arange(8), (40,))[:, :15])


def test_keys_follow_the_step_in_place():
    noise = Noise(3)
    key = noise.key("x")
    noise.at(17)
    assert key.tolist()[2] == 17


def test_a_choice_is_uniform_and_the_same_for_everybody():
    noise = Noise(0)
    drawn = torch.tensor([noise.at(step).choice("k", 4) for step in range(4000)])
    assert drawn.tolist() == [Noise(0).at(step).choice("k", 4) for step in range(4000)]
    assert (drawn.bincount(minlength=4).float() / 4000 - 0.25).abs().max() < 0.03


def test_a_wrong_key_is_refused():
    with pytest.raises(ValueError, match="int64 triple"):
        normal(torch.zeros(3), torch.arange(2), (4,))
    with pytest.raises(ValueError, match="global indices"):
        normal(torch.zeros(3, dtype=torch.int64), torch.zeros(2), (4,))
    noise = Noise(0)
    for number in range(64):
        noise.key(str(number))
    with pytest.raises(ValueError, match="more than"):
        noise.key("one more")
