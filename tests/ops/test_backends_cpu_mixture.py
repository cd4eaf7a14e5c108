"""The C++ mixture, and what the C++ backends of the newer ops refuse to read."""

from __future__ import annotations

import cpu_backend
import pytest
import torch
from cpu_backend import (
    adamw_args,
    by_shape,
    by_storage,
    check,
    cpu,
    mixture_args,
    mixture_backward_args,
    random,
)

from fastdistill.ops.adamw import _adamw_ema_
from fastdistill.ops.gaussian import _gaussian_transport
from fastdistill.ops.mixture import _mixture_denoise, _mixture_denoise_backward
from fastdistill.ops.norm import _sum_of_squares

pytestmark = cpu_backend.needs_extension

isotropic_or_not = pytest.mark.parametrize("isotropic", [False, True])


class TestMixture:
    @by_shape
    @by_storage
    @isotropic_or_not
    def test_agrees_with_the_reference(self, shape, storage, isotropic):
        check(_mixture_denoise, *mixture_args(shape, storage, isotropic), places=16)

    @by_shape
    @by_storage
    @isotropic_or_not
    def test_gradient_agrees_with_the_reference(self, shape, storage, isotropic):
        args = mixture_backward_args(shape, storage, isotropic)
        ours, plain = cpu(_mixture_denoise_backward)(*args), _mixture_denoise_backward.reference
        near, exact = plain(*args), plain(*map(cpu_backend.in_float64, args))
        place = 64 * torch.finfo(torch.promote_types(args[0].dtype, torch.float32)).eps
        bound = 2 * (near - exact).abs().max() + place * exact.abs().max()
        assert (ours - exact).abs().max() <= bound

    def test_thousands_of_points_of_which_few_matter(self):
        args = mixture_args((3, 64), isotropic=True, components=5000)
        args = (*args[:2], args[2] * 0.02, 30 * args[3], 0 * args[4], args[5])
        assert (cpu(_mixture_denoise)(*args)[2] == 0).float().mean() > 0.9
        check(_mixture_denoise, *args, places=64)


def refused(op, args, changes) -> None:
    """Each change of one argument is refused with its message."""
    for position, wrong, message in changes:
        with pytest.raises(RuntimeError, match=message):
            cpu(op)(*args[:position], wrong, *args[position + 1 :])


def test_a_mixture_that_would_be_read_wrongly_is_refused():
    args = mixture_args((4, 6))
    changes = [
        (1, args[1][:3], "alpha is not one number a sample"),
        (3, args[3][:, :5].contiguous(), "means has 30 elements"),
        (3, args[3].t().contiguous().t(), "means is not contiguous"),
        (4, args[4][:4], "variances has 24 elements"),
        (5, args[5][:3], "log_weights is not one number a sample"),
    ]
    refused(_mixture_denoise, args, changes)
    args = mixture_backward_args((4, 6))
    changes = [
        (5, args[5].double(), "posterior is not in the dtype"),
        (6, args[6][:3], "grad_denoised has 18 elements"),
    ]
    refused(_mixture_denoise_backward, args, changes)


def test_a_transport_that_would_be_read_wrongly_is_refused():
    x, mean, basis, number = random(4, 6), random(6), random(6, 2), random(4)
    args = (x, mean, basis, number, number, number, random(4, 2), None, None, None)
    changes = [
        (1, mean[:5], "mean has 5 elements"),
        (2, basis[:5], "basis is not a matrix of 6 rows"),
        (3, number[:2], "shift is not one number a sample"),
        (6, random(4, 3), "gains has 12 elements"),
        (7, number, "belong together"),
    ]
    refused(_gaussian_transport, args, changes)


def test_an_update_that_would_be_read_wrongly_is_refused():
    args = adamw_args(20)
    changes = [
        (0, args[0].bfloat16(), "parameter is BFloat16"),
        (1, args[1][:19], "gradient has 19 elements"),
        (2, args[2].double(), "exp_avg is Double"),
        (4, args[4].long(), "step is Long"),
        (5, [args[5][0][:3], args[5][1]], "ema has 3 elements"),
        (6, args[6].half(), "rounds a bfloat16 copy"),
        (7, torch.ones(1), "8-bit moments need"),
        (9, torch.zeros(2), "counters is not int32"),
        (15, [0, 0], "not ascending"),
        (16, [0], "one group for each"),
        (16, [0, 2], "one lr and one weight_decay"),
        (17, [0.1], "one lr and one weight_decay"),
    ]
    refused(_adamw_ema_, args, changes)
    with pytest.raises(RuntimeError, match="is not contiguous"):
        cpu(_sum_of_squares)(random(6, 4).t())
