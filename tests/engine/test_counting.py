"""Counts of small graphs against closed forms, and of the published models against known counts."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdistill.engine.counting import (
    Counter,
    Peak,
    Size,
    count_forward,
    count_training,
    saved_activation_bytes,
)
from fastdistill.models.adapters import Adapter, build_network
from fastdistill.models.configs import model_configuration

B, GIB = 61, 2**30
"""A batch size that divides no other size here."""
TOKENS, WIDTH, HEADS = 16, 64, 4


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def linear(rows: int, columns: int) -> nn.Linear:
    return nn.Linear(rows, columns, device="meta")


class TestWork:
    def test_a_linear_layer(self):
        layer = linear(WIDTH, 128)
        work = count_forward(lambda: layer(empty(B, WIDTH)), B)
        assert work.flops == {"linear": Size(0, 2 * WIDTH * 128)}
        assert work.matmul_bytes == Size(4 * 128 * (WIDTH + 1), 4 * (WIDTH + 128))
        assert work.kernels == {"matmul": 1}
        assert work.bytes == {}

    def test_a_convolution_and_its_backward(self):
        layer = nn.Conv2d(3, 8, 3, padding=1, device="meta")
        counted = count_training(lambda: layer(empty(B, 3, 10, 10)), B)
        flops = 2 * 8 * 3 * 9 * 100
        assert counted.forward.flops == {"convolution": Size(0, flops)}
        assert counted.backward.flops == {"convolution": Size(0, flops)}  # weights alone

    def test_kernels_that_memory_bounds_count_every_tensor_once(self):
        x, row = empty(B, TOKENS, WIDTH), empty(WIDTH)
        work = count_forward(lambda: F.gelu(x * row.expand(B, TOKENS, WIDTH) + x), B)
        size = 4 * TOKENS * WIDTH
        assert work.bytes == {
            "mul": Size(4 * WIDTH, 2 * size),  # a broadcast row is read once
            "add": Size(0, 3 * size),
            "GELU": Size(0, 2 * size),
        }
        assert work.kernels == {"memory": 3}

    def test_views_and_allocations_are_free(self):
        x = empty(B, TOKENS, WIDTH)
        work = count_forward(lambda: x.transpose(1, 2)[:, :8].unflatten(1, (2, 4)).chunk(2), B)
        assert work.kernels == {}
        assert count_forward(lambda: torch.empty_like(x), B).kernels == {}

    def test_writing_in_place_reads_and_writes(self):
        x = empty(B, WIDTH)
        assert count_forward(lambda: x.add_(1.0), B).bytes == {"add": Size(0, 8 * WIDTH)}
        assert count_forward(lambda: x.zero_(), B).bytes == {"zero": Size(0, 4 * WIDTH)}

    def test_norms_read_twice_where_torch_does(self):
        x, size = empty(B, 32, 8, 8), 4 * 32 * 64
        norm = nn.GroupNorm(4, 32, device="meta")
        moved = count_forward(lambda: norm(x), B).bytes["GroupNorm"]
        assert moved.per_sample == pytest.approx(3 * size, rel=0.01)

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_attention_is_one_kernel_on_the_meta_device(self, dtype, masked):
        query = empty(B, HEADS, TOKENS, 16, dtype=dtype).requires_grad_()
        key = empty(B, HEADS, 5, 16, dtype=dtype)
        mask = empty(B, 1, 1, 5, dtype=dtype) if masked else None

        def attend() -> Tensor:
            return F.scaled_dot_product_attention(query, key, key, attn_mask=mask)

        counted = count_training(attend, B)
        one = 2 * HEADS * TOKENS * 5 * 16
        assert counted.forward.flops == {"attention": Size(0, 2 * one)}
        assert counted.backward.flops == {"attention": Size(0, 5 * one)}
        assert counted.forward.kernels == {"matmul": 1}
        output = HEADS * TOKENS * 16 * query.itemsize
        assert output < counted.saved.per_sample < output + 4 * HEADS * 64  # and the log-sum-exp

    def test_rms_norm_is_one_kernel_on_the_meta_device(self):
        norm = nn.RMSNorm(WIDTH, eps=1e-6, device="meta")
        assert count_forward(lambda: norm(empty(B, TOKENS, WIDTH)), B).kernels == {"memory": 1}

    def test_the_functions_of_torch_are_back_afterwards(self):
        before = F.scaled_dot_product_attention, F.rms_norm
        with pytest.raises(ZeroDivisionError), Counter():
            1 / 0  # noqa: B018
        assert before == (F.scaled_dot_product_attention, F.rms_norm)

    def test_parts_have_names_and_add_up(self):
        layer = linear(WIDTH, WIDTH)
        with Counter(B) as counter:
            with counter.part("one"):
                h = layer(empty(B, WIDTH))
            with counter.part("two"):
                F.silu(layer(h))
        assert list(counter.parts) == ["one", "two"]
        assert counter.parts["two"].bytes == {"SiLU": Size(0, 8 * WIDTH)}
        assert (
            counter.work.total_flops == counter.parts["one"].plus(counter.parts["two"]).total_flops
        )
        assert counter.work.times(3).kernels == {"matmul": 6, "memory": 3}


class TestMemory:
    def test_saved_are_storages_made_by_the_forward(self):
        """Not parameters, not the input; a storage of which views are saved counts once."""
        layer = linear(WIDTH, 2 * WIDTH)
        x = empty(B, WIDTH)

        def gated() -> Tensor:
            value, gate = layer(x).chunk(2, dim=1)
            return value * F.gelu(gate)

        size = 4 * B * WIDTH
        assert saved_activation_bytes(gated) == 3 * size  # both halves, and GELU's output
        assert count_training(gated, B).saved == Size(0, 3 * 4 * WIDTH)

    def test_a_freed_storage_is_saved_again_where_its_place_is_taken(self):
        x = empty(B, WIDTH).requires_grad_()
        first = saved_activation_bytes(lambda: x.exp())
        assert first == 4 * B * WIDTH
        with Counter() as counter:
            for _ in range(3):
                x.exp()
        assert counter.saved[""].at(1) == 3 * first

    def test_nothing_is_saved_without_a_graph(self):
        x = empty(B, WIDTH)
        assert saved_activation_bytes(lambda: F.gelu(x)) == 0

    def test_live_bytes_fall_when_tensors_die(self):
        with Counter(B) as counter, torch.no_grad():
            x = empty(B, WIDTH)
            y = x * 2
            assert counter.live == Size(0, 8 * WIDTH)
            view = y[:, :3]
            del y
            assert counter.live == Size(0, 8 * WIDTH)  # the view holds its storage
            del view, x
            assert counter.live == Size(0, 0)
        assert counter.peak == Peak((Size(0, 8 * WIDTH),))

    def test_a_peak_knows_every_batch_size(self):
        """Fixed bytes are the most in small batches, samples in large ones."""
        with Counter(B) as counter:
            weights = empty(1000)
            del weights
            samples = empty(B, 25)
            del samples
        assert counter.peak.at(1) == 4000
        assert counter.peak.at(40) == 4000
        assert counter.peak.at(41) == 4100

    def test_the_hull_keeps_what_is_largest_somewhere(self):
        one, other = Peak((Size(10, 0), Size(0, 2))), Peak((Size(4, 1), Size(6, 1)))
        assert one.over(other).candidates == (Size(10, 0), Size(6, 1), Size(0, 2))
        assert Peak((Size(10, 0),)).over(Peak((Size(4, 1), Size(0, 2)))).candidates == (
            Size(10, 0),
            Size(0, 2),
        )
        assert one.above(Size(1, 1)).at(3) == 14

    def test_recomputed_blocks_keep_their_inputs_and_peak_at_one_block(self):
        blocks = [nn.Sequential(linear(64, 256), nn.GELU(), linear(256, 64)) for _ in range(4)]
        x = empty(B, 64)

        def run(recompute: bool) -> Tensor:
            h = x
            for block in blocks:
                h = checkpoint(block, h, use_reentrant=False) if recompute else block(h)
            return h

        kept = count_training(lambda: run(False), B)
        recomputed = count_training(lambda: run(True), B)
        assert kept.kept.per_sample == 4 * (4 * 2 * 256 + 4 * 64)
        assert recomputed.kept.per_sample == 4 * 4 * 64
        assert recomputed.peak.at(1e4) < kept.peak.at(1e4) / 2
        extra = recomputed.backward.total_flops.at(1) - kept.backward.total_flops.at(1)
        assert 0 < extra <= kept.forward.total_flops.at(1)

    def test_real_tensors_count_as_those_of_the_meta_device(self):
        def run(device: str) -> tuple:
            torch.manual_seed(0)
            block = nn.TransformerEncoderLayer(WIDTH, 4, 128, 0.0, device=device)
            with torch.device(device):
                x = torch.zeros(TOKENS, 3, WIDTH)
            return count_training(lambda: F.silu(block.linear2(block.linear1(block.norm1(x)))))

        assert run("cpu") == run("meta")


COUNTS = {
    # TFLOP: forward, backward, to the input alone; GiB saved: in training, to the input alone
    "sdxl": (6.761, 13.86, 7.88, 6.42, 4.97),
    "dit_xl2_512": (1.049, 2.17, 1.25, 1.24, 0.62),
    "dit_xl2_256": (0.237, 0.48, 0.25, 0.31, 0.16),
    "pixart_alpha_1024": (6.510, 14.13, 9.83, 5.72, 2.99),
    "sd3_medium": (8.904, 19.25, 13.23, 6.42, 3.06),
    "sd35_medium": (11.250, 24.61, 17.59, 11.02, 6.44),
    "sd15": (0.803, 1.67, 0.99, 0.87, 0.72),
}
TEXT_TOKENS = {"pixart_alpha_1024": 120, "sd3_medium": 333, "sd35_medium": 333}


def network_of(name: str) -> Adapter:
    with torch.device("meta"):
        return build_network(model_configuration(name)).bfloat16().train()


@pytest.mark.parametrize(
    "name",
    [
        "sdxl",
        "dit_xl2_512",
        *(pytest.param(name, marks=pytest.mark.slow) for name in list(COUNTS)[2:]),
    ],
)
def test_published_models_have_the_counts_of_the_performance_map(name):
    """Counted independently before this project's counter was written; bfloat16, a sample."""
    network = network_of(name)
    model_input = empty(B, *network.sample_shape, dtype=torch.bfloat16)
    condition = network.example_condition(
        B, text_tokens=TEXT_TOKENS.get(name, 77), dtype=torch.bfloat16, device="meta"
    )
    run = functools.partial(network, model_input, empty(B), condition)
    forward = count_forward(run, B)
    training = count_training(run, B)
    network.requires_grad_(False)
    model_input.requires_grad_()
    to_input = count_training(run, B)
    found = (
        forward.total_flops.at(1) / 1e12,
        training.backward.total_flops.at(1) / 1e12,
        to_input.backward.total_flops.at(1) / 1e12,
        training.saved.at(1) / GIB,
        to_input.saved.at(1) / GIB,
    )
    assert found == pytest.approx(COUNTS[name], rel=0.03)
    assert training.forward.total_flops == forward.total_flops
    assert forward.flops["linear"].fixed == 0
    assert training.kept.at(1) == pytest.approx(training.saved.at(1), rel=0.01)


def test_sdxl_moves_the_bytes_of_the_performance_map():
    network = network_of("sdxl")
    condition = network.example_condition(B, dtype=torch.bfloat16, device="meta")
    model_input = empty(B, *network.sample_shape, dtype=torch.bfloat16)
    work = count_forward(functools.partial(network, model_input, empty(B), condition), B)
    assert work.total_bytes.per_sample / 1e9 == pytest.approx(10.90, rel=0.03)
    assert work.kernels["matmul"] == 934
    assert work.kernels["memory"] == pytest.approx(921, rel=0.03)
    families = {"add": 2.58, "mul": 2.52, "GELU": 1.68, "LayerNorm": 1.26, "GroupNorm": 0.93}
    for family, expected in families.items():
        assert work.bytes[family].per_sample / 1e9 == pytest.approx(expected, rel=0.03)
