"""Regional compile: blocks of real architectures, eager's numbers, arenas, copies."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastdistill.models.compiling import compile_blocks, repeated_block_classes
from fastdistill.models.digits import DigitsNetwork
from fastdistill.optim import Arena


def tiny_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def tiny_dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=3,
        sample_size=4,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )


def run(network: nn.Module) -> Tensor:
    torch.manual_seed(1)
    if type(network).__name__.startswith("DiT"):
        x, t = torch.randn(2, 4, 4, 4), torch.tensor([3.0, 700.0])
        return network(x, t, class_labels=torch.tensor([1, 4])).sample
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0])
    return network(x, t, encoder_hidden_states=torch.randn(2, 5, 8)).sample


def outcome(network: nn.Module) -> list[Tensor]:
    raw = run(network)
    for value in network.parameters():
        value.grad = None
    raw.square().mean().backward()
    return [raw.detach(), *(value.grad.clone() for value in network.parameters())]


@pytest.mark.parametrize(
    ("make", "classes", "count"),
    [
        (tiny_unet, {"BasicTransformerBlock", "ResnetBlock2D"}, 4 + 8),
        (tiny_dit, {"BasicTransformerBlock"}, 3),
        (DigitsNetwork, {"_Block"}, 3),
    ],
    ids=["unet", "dit", "digits"],
)
def test_the_blocks_are_those_that_repeat(make, classes, count):
    network = make()
    assert repeated_block_classes(network) == classes
    keys = list(network.state_dict())
    assert compile_blocks(network, "eager") == count
    assert list(network.state_dict()) == keys


class Counting:
    """A backend that counts the graphs it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize("make", [tiny_unet, tiny_dit], ids=["unet", "dit"])
def test_compiled_blocks_give_eagers_numbers_and_are_compiled_once_a_shape(make):
    torch._dynamo.reset()
    network, backend = make(), Counting()
    expected = outcome(network)
    blocks = compile_blocks(network, backend)
    found = outcome(network)
    once = backend.graphs
    outcome(network)
    assert backend.graphs == once
    assert 0 < once < blocks  # the first block of a DiT reads other strides than the rest
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_weights_in_an_arena_are_the_compiled_blocks_too():
    network = tiny_dit()
    compile_blocks(network, "eager")
    expected = run(network)
    arena = Arena(network, averages=1)
    torch.testing.assert_close(run(network), expected)
    with torch.no_grad():
        arena.ranges["ema_0"].mul_(0.5)
    with arena.showing("ema_0"):
        shown = run(network)
    assert not torch.allclose(shown, expected)
    torch.testing.assert_close(run(network), expected)


def test_a_copy_computes_with_its_own_weights():
    network = tiny_dit()
    compile_blocks(network, "eager")
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for value in twin.parameters():
            value.mul_(0.5)
    assert not torch.allclose(run(twin), run(network))
    own = {id(block.forward.__self__) for block in twin.transformer_blocks}
    assert own == {id(block) for block in twin.transformer_blocks}


def test_a_network_is_compiled_once():
    network = tiny_dit()
    compile_blocks(network, "eager")
    first = [block.forward for block in network.transformer_blocks]
    compile_blocks(network, "eager")
    assert [block.forward for block in network.transformer_blocks] == first


def test_a_network_without_repeated_blocks_is_refused():
    with pytest.raises(ValueError, match="Linear has no repeated blocks to compile; name their"):
        compile_blocks(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has no repeated blocks to compile"):
        compile_blocks(type("Named", (nn.Module,), {"_repeated_blocks": ("Lost",)})())


@pytest.mark.slow
def test_inductor_gives_eagers_numbers():
    """Output and every gradient, up to float32's rounding."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = DigitsNetwork(width=16, blocks=2)
    nn.init.normal_(network.leave[1].weight)
    x, t, labels = torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4)

    def outcome() -> list[Tensor]:
        network.zero_grad()
        raw = network(x, t, labels)
        raw.square().mean().backward()
        return [raw.detach(), *(value.grad.clone() for value in network.parameters())]

    expected = outcome()
    compile_blocks(network)
    for mine, theirs in zip(outcome(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
