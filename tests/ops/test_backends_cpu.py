"""The C++ backend computes what the references define, from any mixture of storage types.

An op's error against the float64 reference is at most twice that of plain torch in the same dtype.
Results are the same bits for any number of threads and for every instruction set.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cpu_backend
import pytest
import torch
from cpu_backend import (
    BF16,
    F16,
    F32,
    F64,
    assert_same_bits,
    by_shape,
    by_storage,
    check,
    cpu,
    denoising_args,
    density_ratio_args,
    every_op,
    key,
    matching_args,
    random,
    renoise_args,
    threads,
)
from torch import Tensor

from fastdistill.ops import _backend
from fastdistill.ops.denoising import _denoising_cotangent
from fastdistill.ops.density_ratio import _density_ratio_weight
from fastdistill.ops.matching import _matching_cotangent
from fastdistill.ops.noise import _normal, _uniform
from fastdistill.ops.renoise import _renoise

pytestmark = cpu_backend.needs_extension


class TestMatching:
    @by_shape
    @by_storage
    @pytest.mark.parametrize("options", ["all", "guided", "none", "plain"])
    def test_agrees_with_the_reference(self, shape, storage, options):
        check(_matching_cotangent, *matching_args(shape, storage, options))

    @pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
    def test_cotangent_in_any_dtype(self, dtype):
        check(_matching_cotangent, *matching_args((3, 1023), "bfloat16", dtype=dtype))

    def test_nothing_remains_where_teacher_and_critic_agree(self):
        args = list(matching_args((2, 1023), options="guided"))
        args[8], args[9] = None, 1.0
        args[5:8] = args[2:5]
        cotangent, statistics = cpu(_matching_cotangent)(*args)
        assert not cotangent.any()
        assert not statistics[:, [0, 2, 3]].any()

    @pytest.mark.parametrize("position", [0, 1, 2, 5])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("options", ["all", "plain"])
    def test_elements_that_are_not_finite_become_zero(self, position, value, options):
        args = matching_args((3, 1030), "float32", options)
        args[position][1, [0, 17, 1029]] = value
        cotangent, statistics = cpu(_matching_cotangent)(*args)
        expected = _matching_cotangent.reference(*args)
        assert cotangent.isfinite().all()
        torch.testing.assert_close(cotangent, expected[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(statistics, expected[1], equal_nan=True, atol=1e-6, rtol=1e-5)
        assert torch.equal(statistics[:, 3], expected[1][:, 3])


class TestDenoising:
    @by_shape
    @by_storage
    @pytest.mark.parametrize("weighted", [True, False])
    def test_agrees_with_the_reference(self, shape, storage, weighted):
        check(_denoising_cotangent, *denoising_args(shape, storage, weighted))

    def test_nan_is_not_hidden(self):
        args = denoising_args((3, 100))
        args[0][1, 3] = float("nan")
        cotangent, loss = cpu(_denoising_cotangent)(*args)
        assert loss.isnan().tolist() == [False, True, False]
        assert cotangent.isnan().sum() == 1


class TestNoise:
    def test_philox_is_that_of_the_paper(self):
        words = torch.tensor([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8])
        expected = ((words >> 9).double() + 0.5) / 2**23
        zeros = torch.zeros(3, dtype=torch.int64)
        drawn = cpu(_uniform)(zeros, zeros[:1], [4], F64)
        assert torch.equal(drawn[0], expected)

    @by_shape
    @pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
    def test_uniform_has_the_bits_of_the_reference(self, shape, dtype):
        args = key(-5, 2**31, 2**33 + 1), torch.arange(shape[0]) * 2**30, list(shape[1:]), dtype
        assert_same_bits([cpu(_uniform)(*args)], [_uniform.reference(*args)])

    @by_shape
    @pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 1e-6), (F64, 1e-14)])
    def test_normal_equals_the_reference(self, shape, dtype, tolerance):
        args = key(2**40, 7, 1), torch.arange(shape[0]) + 2**31, list(shape[1:])
        drawn = cpu(_normal)(*args, dtype)
        assert (drawn.double() - _normal.reference(*args, F64)).abs().max() < tolerance

    @pytest.mark.parametrize("dtype", [BF16, F16])
    def test_normal_in_half_precision_is_rounded_from_float(self, dtype):
        args = key(), torch.arange(3), [1023]
        assert torch.equal(cpu(_normal)(*args, dtype), cpu(_normal)(*args, F32).to(dtype))

    def test_normal_is_exact_in_the_tails_and_near_zero(self):
        args = key(), torch.arange(4), [2**18]
        drawn, truth = cpu(_normal)(*args, F32), _normal.reference(*args, F64)
        assert truth.abs().max() > 4.7
        assert (drawn.double() - truth).abs().max() < 1e-6
        small = truth.abs() < 1e-2
        assert ((drawn.double() - truth).abs()[small] < 1e-8).all()

    def test_depends_on_the_global_index_alone(self):
        whole = cpu(_normal)(key(), torch.arange(6), [37], F32)
        part = cpu(_normal)(key(), torch.arange(6)[1::2], [37], F32)
        assert torch.equal(whole[1::2], part)

    def test_scalars_and_empty_shapes(self):
        assert cpu(_uniform)(key(), torch.arange(5), [], F32).shape == (5,)
        assert cpu(_normal)(key(), torch.arange(5), [0, 3], F32).shape == (5, 0, 3)


class TestRenoise:
    @by_shape
    @by_storage
    @pytest.mark.parametrize(
        ("scaled", "input_dtype"), [(True, BF16), (True, F32), (False, F16), (False, None)]
    )
    def test_agrees_with_the_reference(self, shape, storage, scaled, input_dtype):
        args = renoise_args(shape, storage, scaled, input_dtype)
        factor = max(args[2].abs().max().item(), 1.0) * (
            args[5].abs().max().item() if scaled else 1
        )
        check(_renoise, *args, slack=0.0 if args[0].dtype == F64 else 1e-6 * max(factor, 1.0))

    def test_adds_the_noise_of_normal(self):
        x0, alpha, sigma, *rest = renoise_args((3, 1023), input_dtype=None)
        x_t, _ = cpu(_renoise)(x0, alpha * 0, torch.ones_like(sigma), *rest)
        assert torch.equal(x_t, cpu(_normal)(rest[0], rest[1], [1023], F32))

    @pytest.mark.parametrize("dtype", [BF16, F16, F64])
    def test_conversion_is_that_of_torch_for_every_number(self, dtype):
        numbers = [
            torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(kind).float()
            for kind in (BF16, F16)
        ]
        bits = torch.arange(2**20, dtype=torch.int64) * 0xFFF + 0x7FF  # halves, ties, subnormals
        numbers.append((bits & 0xFFFFFFFF).to(torch.uint32).view(F32))
        x0 = torch.cat(numbers)[None]
        x0 = torch.where(x0 == 0, 0, x0)
        one, zero = torch.ones(1), torch.zeros(1)
        args = (one, zero, key(), torch.arange(1), None)
        _, converted = cpu(_renoise)(x0, *args, dtype)
        torch.testing.assert_close(converted, x0.to(dtype), rtol=0, atol=0, equal_nan=True)
        stored = x0.to(dtype)
        _, back = cpu(_renoise)(stored, *args, F32)
        torch.testing.assert_close(back, stored.float(), rtol=0, atol=0, equal_nan=True)


class TestDensityRatio:
    @pytest.mark.parametrize("logits", [F32, BF16, F16, F64])
    @pytest.mark.parametrize("history", [F32, F64])
    @pytest.mark.parametrize(("samples", "heads"), [(1, 1), (37, 3), (256, 1)])
    def test_agrees_with_the_reference(self, logits, history, samples, heads):
        check(_density_ratio_weight, *density_ratio_args(logits, history, samples, heads))

    def test_nan_is_not_hidden(self):
        args = density_ratio_args()
        args[0][4, 1] = float("nan")
        assert cpu(_density_ratio_weight)(*args)[1][4].isnan()

    def test_history_is_not_changed_in_place(self):
        args = density_ratio_args()
        before = args[2].clone()
        cpu(_density_ratio_weight)(*args)
        assert torch.equal(args[2], before)


class TestEveryOp:
    @by_storage
    def test_empty_batch(self, storage):
        check(_matching_cotangent, *matching_args((0, 3, 4), storage))
        check(_denoising_cotangent, *denoising_args((0, 3, 4), storage))
        check(_renoise, *renoise_args((0, 3, 4), storage))

    def test_empty_batch_of_noise_and_ratios(self):
        assert cpu(_normal)(key(), torch.arange(0), [3, 4], F32).shape == (0, 3, 4)
        check(_density_ratio_weight, *density_ratio_args(samples=0))

    def test_coefficients_may_be_expanded_or_strided(self):
        args = matching_args((4, 130))
        wide = random(4, 3, seed=20)
        views = [torch.tensor(0.7).expand(4), wide[:, 1], torch.tensor(0.2).expand(4), wide[:, 2]]
        for position, view in zip((3, 4, 6, 12), views, strict=True):
            args = (*args[:position], view, *args[position + 1 :])
        dense = [value.contiguous() if isinstance(value, Tensor) else value for value in args]
        assert_same_bits(cpu(_matching_cotangent)(*args), cpu(_matching_cotangent)(*dense))
        x0, alpha, sigma, noise, sample, *rest = renoise_args((4, 130))
        sample = torch.arange(8)[::2]
        strided = cpu(_renoise)(x0, alpha[:1].expand(4), sigma, noise, sample, *rest)
        dense = cpu(_renoise)(x0, alpha[:1].repeat(4), sigma, noise, sample.contiguous(), *rest)
        assert_same_bits(strided, dense)

    @pytest.mark.parametrize("shape", [(1, 3 * 16384 + 5), (3, 20000), (40, 700)], ids=str)
    def test_same_bits_for_any_number_of_threads(self, shape):
        one = every_op(shape)
        with threads(2):
            assert_same_bits(one, every_op(shape))

    def test_a_sample_does_not_depend_on_its_batch(self):
        args = matching_args((6, 17000))
        together = cpu(_matching_cotangent)(*args)
        for i in range(6):
            row = [v[i : i + 1] if isinstance(v, Tensor) else v for v in args]
            alone = cpu(_matching_cotangent)(*row)
            assert_same_bits(alone, [value[i : i + 1] for value in together])

    @pytest.mark.parametrize("level", ["default", "avx2"])
    def test_same_bits_from_every_instruction_set(self, level, tmp_path):
        path = tmp_path / "results.pt"
        subprocess.run(
            [sys.executable, cpu_backend.__file__, path],
            env={**os.environ, "FASTDISTILL_CPU_CAPABILITY": level},
            cwd=Path(_backend.__file__).parents[2],
            check=True,
        )
        assert_same_bits(torch.load(path), every_op((3, 5003)))

    def test_refuses_what_would_be_read_wrongly(self):
        args = list(matching_args((4, 6)))
        for position, wrong, message in [
            (2, args[2].t().contiguous().t(), "teacher is not contiguous"),
            (5, args[5][:, :5].contiguous(), "critic has 20 elements; expected 4 samples of 6"),
            (1, args[1].int(), "x_t is Int; expected float32"),
            (4, args[4][:3], "teacher_b is not one number a sample"),
        ]:
            bad = [*args[:position], wrong, *args[position + 1 :]]
            with pytest.raises(RuntimeError, match=message):
                cpu(_matching_cotangent)(*bad)
        ratio = list(density_ratio_args())
        ratio[1] = ratio[1] + 8
        with pytest.raises(RuntimeError, match="bin_index holds"):
            cpu(_density_ratio_weight)(*ratio)
        with pytest.raises(RuntimeError, match="key is not an int64 vector of 3"):
            cpu(_normal)(torch.zeros(2, dtype=torch.int64), torch.arange(2), [3], F32)
