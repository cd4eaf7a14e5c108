"""`gaussian_transport` and `gaussian_denoise` against full covariances and the ODE itself."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastdistill.diffusion import EDM, VP, RectifiedFlow
from fastdistill.ops import gaussian_denoise, gaussian_transport, use_backend

BACKENDS = ["reference", "cpu", "triton"]


def gaussian(d=24, r=5, seed=0, dtype=torch.float64):
    """mean [d], orthonormal basis [d, r] and spectrum [r]."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(d, r, generator=generator, dtype=torch.float64))
    mean = torch.randn(d, generator=generator, dtype=torch.float64)
    spectrum = torch.rand(r, generator=generator, dtype=torch.float64).sort().values * 3 + 0.1
    return mean.to(dtype), basis.to(dtype), spectrum.to(dtype)


def covariance(basis, spectrum, floor):
    rest = torch.eye(len(basis), dtype=basis.dtype) - basis @ basis.T
    return basis * spectrum @ basis.T + floor * rest


def levels(batch=3, dtype=torch.float64):
    """(alpha, sigma, alpha', sigma'), another pair for each sample."""
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(4, batch, generator=generator, dtype=torch.float64) + 0.2).to(dtype)


def test_published_value_of_the_teleport(reference_backend):
    """EDM, one dimension: mu = 0.5, variance 0.25, x = 40 from sigma 80 to 10."""
    one = torch.ones(1, dtype=torch.float64)
    moved = gaussian_transport(
        *(40 * one[:, None], 0.5 * one, one[:, None], 0.25 * one), one, 80 * one, one, 10 * one
    )
    assert float(moved.x) == pytest.approx(5.4435714692, abs=1e-10)


@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_low_rank_with_a_floor_is_the_full_covariance(floor, reference_backend):
    mean, basis, spectrum = gaussian()
    alpha, sigma, to_alpha, to_sigma = levels()
    x = torch.randn(3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    result = gaussian_transport(
        *(x, mean, basis, spectrum, alpha, sigma, to_alpha, to_sigma), floor=floor, denoise=True
    )
    full = covariance(basis, spectrum, floor)
    values, vectors = torch.linalg.eigh(full)
    for i in range(3):
        centred = vectors.T @ (x[i] - alpha[i] * mean)
        gain = (to_alpha[i] ** 2 * values + to_sigma[i] ** 2).clamp(min=0)
        gain = (gain / (alpha[i] ** 2 * values + sigma[i] ** 2)).sqrt()
        expected = to_alpha[i] * mean + vectors @ (gain * centred)
        torch.testing.assert_close(result.x[i], expected, rtol=1e-9, atol=1e-9)
        total = alpha[i] ** 2 * full + sigma[i] ** 2 * torch.eye(24, dtype=torch.float64)
        shrunk = full @ torch.linalg.solve(total, x[i] - alpha[i] * mean)
        torch.testing.assert_close(result.denoised[i], mean + alpha[i] * shrunk)


@pytest.mark.parametrize("process", [EDM(), VP.dit(), RectifiedFlow()], ids=["edm", "vp", "flow"])
def test_transport_solves_the_ode_of_the_denoiser(process, reference_backend):
    """dx/dt = (alpha' / alpha) x + (sigma' - alpha' sigma / alpha) eps, by Runge-Kutta."""
    mean, basis, spectrum = gaussian(6, 2)
    start, end = {"EDM": (5.0, 1.0), "VP": (800.0, 300.0)}.get(type(process).__name__, (0.9, 0.4))
    times = torch.linspace(start, end, 401, dtype=torch.float64)

    def level(t):
        return process.alpha_sigma(torch.as_tensor(t, dtype=torch.float64).reshape(1))

    def slope_over_log_snr(x, a, s):
        """dx = x / a da + (a ds - s da) / a eps, along the straight segment of a step."""
        denoised = gaussian_denoise(x, mean, basis, spectrum, a, s, 0.2)
        return denoised, (x - a[:, None] * denoised) / s[:, None]

    x0 = torch.randn(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    a, s = level(times[0])
    x = a[:, None] * x0 + s[:, None] * torch.randn_like(x0)
    expected = gaussian_transport(x, mean, basis, spectrum, a, s, *level(times[-1]), floor=0.2).x
    for before, after in itertools.pairwise(times):
        (a0, s0), (a1, s1) = level(before), level(after)
        a_m, s_m = (a0 + a1) / 2, (s0 + s1) / 2  # any path from one pair to the next is the ODE's

        def field(x, a, s, da=a1 - a0, ds=s1 - s0):
            denoised, eps = slope_over_log_snr(x, a, s)
            return da[:, None] * denoised + ds[:, None] * eps

        k1 = field(x, a0, s0)
        k2 = field(x + k1 / 2, a_m, s_m)
        k3 = field(x + k2 / 2, a_m, s_m)
        k4 = field(x + k3, a1, s1)
        x = x + (k1 + 2 * k2 + 2 * k3 + k4) / 6
    torch.testing.assert_close(x, expected, rtol=1e-8, atol=1e-8)


def test_there_and_back_is_the_identity(reference_backend):
    mean, basis, spectrum = gaussian()
    alpha, sigma, to_alpha, to_sigma = levels()
    x = torch.randn(3, 24, dtype=torch.float64)
    there = gaussian_transport(
        x, mean, basis, spectrum, alpha, sigma, to_alpha, to_sigma, floor=0.1
    ).x
    back = gaussian_transport(
        there, mean, basis, spectrum, to_alpha, to_sigma, alpha, sigma, floor=0.1
    ).x
    torch.testing.assert_close(back, x)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(("d", "r", "batch"), [(24, 5, 3), (1, 1, 1), (77, 33, 5), (192, 64, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("basis_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backends_are_as_exact_as_torch(d, r, batch, dtype, basis_dtype, backend):
    """Error against float64 at most twice that of torch's products in the same dtypes."""
    mean, basis, spectrum = gaussian(d, r, dtype=torch.float32)
    basis = basis.to(basis_dtype)
    generator = torch.Generator().manual_seed(5)
    x = (3 * torch.randn(batch, d, generator=generator)).to(dtype)
    alpha, sigma, to_alpha, to_sigma = levels(batch, torch.float32)
    numbers = (alpha, sigma, to_alpha, to_sigma)

    def run(x, mean, basis, spectrum, *numbers):
        result = gaussian_transport(x, mean, basis, spectrum, *numbers, floor=0.2, denoise=True)
        return result.x.double(), result.denoised.double()

    with use_backend("reference"):
        exact = run(*(value.double() for value in (x, mean, basis, spectrum, *numbers)))
    with use_backend(backend):
        found = run(x, mean, basis, spectrum, *numbers)
    plain = torch_products(x, mean, basis, spectrum, *numbers)
    for mine, torchs, truth in zip(found, plain, exact, strict=True):
        place = torch.finfo(dtype).eps * truth.abs().max()
        if backend == "triton" and torch.bfloat16 in (dtype, basis_dtype):
            place += 2.0**-8 * truth.abs().max()  # the interpreter truncates
        assert (mine - truth).abs().max() <= 2 * (torchs - truth).abs().max() + place


def torch_products(x, mean, basis, spectrum, alpha, sigma, to_alpha, to_sigma):
    """The same two maps as a script would write them, products in the basis's dtype."""
    variance = torch.cat((spectrum, torch.tensor([0.2])))
    a, s, to_a, to_s = (value[:, None] for value in (alpha, sigma, to_alpha, to_sigma))
    gains = ((to_a**2 * variance + to_s**2) / (a**2 * variance + s**2)).sqrt()
    shrink = a * variance / (a**2 * variance + s**2)
    centred = x.float() - a * mean
    c = (centred.to(basis.dtype) @ basis).float()
    results = []
    for scale, gain in ((to_a, gains), (torch.ones_like(a), shrink)):
        rest = gain[:, -1:]
        kept = ((gain[:, :-1] - rest) * c).to(basis.dtype) @ basis.T
        results.append((scale * mean + rest * centred + kept.float()).to(x.dtype).double())
    return results


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_pass_through_both_maps(backend):
    mean, basis, spectrum = gaussian(dtype=torch.float32)
    numbers = levels(dtype=torch.float32)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(4), requires_grad=True)
    u, v = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(5))

    def value(live):
        moved, denoised = gaussian_transport(live, mean, basis, spectrum, *numbers, denoise=True)
        return (u * moved).sum() + (v * denoised).sum()

    with use_backend(backend):
        (found,) = torch.autograd.grad(value(x), x)
    with use_backend("reference"):
        step = torch.randn(3, 24, generator=torch.Generator().manual_seed(6))
        expected = value(x.detach() + step) - value(x.detach())  # affine: exact at any distance
    torch.testing.assert_close((found * step).sum(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_of_any_shape_and_an_empty_batch(backend):
    mean, basis, spectrum = gaussian(dtype=torch.float32)
    alpha, sigma, to_alpha, to_sigma = levels(dtype=torch.float32)
    x = torch.randn(3, 2, 3, 4)
    numbers = (alpha, sigma, to_alpha, to_sigma)
    with use_backend(backend):
        image = gaussian_transport(x, mean.view(2, 3, 4), basis, spectrum, *numbers)
        flat = gaussian_transport(x.flatten(1), mean, basis, spectrum, *numbers)
        none = gaussian_transport(
            x[:0], mean, basis, spectrum, *(value[:0] for value in numbers), denoise=True
        )
    assert torch.equal(image.x.flatten(1), flat.x)
    assert image.denoised is None
    assert none.x.shape == none.denoised.shape == (0, 2, 3, 4)


def test_wrong_input_is_refused():
    mean, basis, spectrum = gaussian(dtype=torch.float32)
    numbers = levels(dtype=torch.float32)
    x = torch.randn(3, 24)
    with pytest.raises(ValueError, match="do not fit samples of 24 elements"):
        gaussian_transport(x, mean[:-1], basis, spectrum, *numbers)
    with pytest.raises(ValueError, match="do not fit samples of 24 elements"):
        gaussian_denoise(x, mean, basis[:, :3], spectrum, *numbers[:2])
    with pytest.raises(ValueError, match="floor is -1"):
        gaussian_denoise(x, mean, basis, spectrum, *numbers[:2], floor=-1.0)
    with pytest.raises(ValueError, match="to_sigma has shape"):
        gaussian_transport(x, mean, basis, spectrum, *numbers[:3], numbers[3][:1])
