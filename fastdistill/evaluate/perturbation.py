"""Expected perturbation score, and the MMD between two sets of them (EPS-MMD).

Zhang et al. 2023, "Detecting Adversarial Data by Probing Multiple Perturbations Using Expected
Perturbation Score" (arXiv 2305.16035), equation 4: the score of a sample's noised versions,
averaged over the noise levels,

    EPS(x) = mean_t E[ grad log p_t(x_t) | x_0 = x ],    grad log p_t = (alpha D - x_t) / sigma^2

For Gaussian data N(mu, v) it is -mean_t[alpha / (alpha^2 v + sigma^2)] (x - mu). A teacher alone
tells so how far samples drifted from its data, without a feature network. The MMD here has a plain
Gaussian kernel; the paper trains a deep one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.diffusion import Noise
from fastdistill.evaluate._arguments import check_features, check_finite, check_same_width
from fastdistill.evaluate.kernel_distance import unbiased_mmd
from fastdistill.models import Condition, Denoiser


@torch.no_grad()
def expected_perturbation_score(
    denoiser: Denoiser,
    samples: Tensor,
    times: Sequence[float],
    noise: Noise,
    condition: Condition = None,
) -> Tensor:
    """EPS of samples, with one pair (eps, -eps) a level: what is odd in the noise cancels.

    Args:
        denoiser: the teacher.
        samples: clean samples [n, ...].
        times: levels that are averaged over, in the process' clock, with sigma > 0.
        noise: source of randomness, at a step of its own.
        condition: what each sample is conditioned on.

    Returns:
        Scores [n, ...], in the samples' dtype.

    Raises:
        ValueError: no times, a time without noise, or samples that are not finite.
    """
    if not times:
        raise ValueError("times is empty; expected at least one noise level")
    check_finite("samples", samples)
    index = torch.arange(len(samples), device=samples.device)
    total = torch.zeros_like(samples)
    for k, time in enumerate(times):
        t = torch.full((len(samples),), time, dtype=samples.dtype, device=samples.device)
        alpha, sigma = (
            value.reshape(-1, *[1] * (samples.ndim - 1))
            for value in denoiser.process.alpha_sigma(t)
        )
        if not float(sigma.min()) > 0:
            raise ValueError(f"time {time} has no noise, so that no score is known; leave it out")
        eps = noise.normal("perturbation", index + k * len(samples), samples.shape[1:])
        for sign in (1.0, -1.0):
            x_t = alpha * samples + (sign * sigma) * eps.to(samples.dtype)
            total += (alpha * denoiser(x_t, t, condition) - x_t) / sigma.square()
    return total / (2 * len(times))


def eps_mmd(real: Tensor, generated: Tensor) -> float:
    """Unbiased squared MMD between two sets of scores, with a Gaussian kernel.

    Its squared width is the median squared distance between the real ones, so that the number does
    not depend on the scores' units. In (-0.1, 2); about 0 where both are of one law.

    Args:
        real: expected perturbation scores of real samples [n, ...].
        generated: those of generated samples [m, ...].

    Raises:
        ValueError: fewer than two of either, different shapes, or scores that are not finite.
    """
    x, y = real.flatten(1).double(), generated.flatten(1).double()
    check_features("real", x, rows=2)
    check_features("generated", y, rows=2)
    check_same_width(x, y)
    within = torch.cdist(x, x).square()
    upper = within[torch.ones_like(within, dtype=torch.bool).triu(1)]
    width = upper.median().clamp(min=torch.finfo(torch.float64).tiny)

    def kernel(squared: Tensor) -> Tensor:
        return (squared / (-2 * width)).exp()

    squared = (torch.cdist(y, y).square(), torch.cdist(x, y).square())
    return float(unbiased_mmd(kernel(within), *map(kernel, squared)))
