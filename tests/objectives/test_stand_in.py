"""A Gaussian in the teacher's place at high noise: rows, times and gradients in closed form."""

from __future__ import annotations

import pytest
import torch
from test_distribution_matching import GaussianNetwork, Shift, batch, student_gradient

from fastdistill.diffusion import (
    EDM,
    VP,
    X0,
    EDMPreconditioning,
    FixedList,
    KarrasIndex,
    LogitNormal,
    LogNormalSigma,
    LogUniformSigma,
    Noise,
    RectifiedFlow,
    Uniform,
)
from fastdistill.gaussian import Gaussian, GaussianMixture
from fastdistill.models import Denoiser
from fastdistill.objectives import Batch, Discriminator, DistributionMatching, MatchingSettings
from fastdistill.objectives.stand_in import StandIn, probability_above

LAW = FixedList((0.3, 0.5, 2.0, 5.0))


def point(mean, variance):
    one = torch.ones(1)
    return Gaussian(mean * one, one[:, None], variance * one)


def matching(stand_in=None, settings=None, law=LAW, **changes):
    parts = {
        "student": Denoiser(Shift(0.8, 0.6), EDM(), X0()),
        "teacher": Denoiser(GaussianNetwork(0.1, 0.9), EDM(), X0()),
        "critic": Denoiser(GaussianNetwork(0.8, 0.6), EDM(), X0()),
    } | changes
    settings = settings or MatchingSettings(normalise=False)
    return DistributionMatching(
        *parts.values(), (1.0,), law, law, settings=settings, stand_in=stand_in
    )


def exact_stand_in(above=1.0, law=LAW):
    return StandIn(point(0.1, 0.81), above, law, EDM())


def test_an_exact_stand_in_leaves_both_gradients_as_they_are():
    """Mean and scale: sum over levels of E[(D_psi - D_phi) (1, z)] in closed form."""
    mean = scale = 0.0
    for sigma in LAW.times:
        critic, teacher = 0.36 / (0.36 + sigma**2), 0.81 / (0.81 + sigma**2)
        constant = 0.8 * (1 - critic) - 0.1 * (1 - teacher)
        mean += (constant + (critic - teacher) * 0.8) / 4
        scale += (critic - teacher) * 0.6 / 4
    found = student_gradient(matching(exact_stand_in()), batch())
    assert found == pytest.approx((mean, scale), abs=5e-3)
    assert student_gradient(matching(), batch()) == pytest.approx((mean, scale), abs=5e-3)


def test_a_wrong_stand_in_moves_the_gradient():
    wrong = StandIn(point(1.0, 0.81), 1.0, LAW, EDM())
    found = student_gradient(matching(wrong), batch())[0]
    assert abs(found - student_gradient(matching(), batch())[0]) > 0.1


def test_a_share_that_is_no_whole_number_of_rows_is_weighted():
    """A third of the law over 16 rows takes 5: their weights make the expectation the law's."""
    law = FixedList((0.3, 0.6, 4.0))
    stand_in = StandIn(point(0.0, 1.0), 1.0, law, EDM())
    at = Batch(torch.arange(16), Noise(0), 1 / 16, (1,))
    split = stand_in.split(at)
    assert (len(split.gaussian), len(split.teacher)) == (5, 11)
    assert float(split.weight.sum()) == pytest.approx(16)
    total = 0.0
    for step in range(400):
        t = split.sample(EDM(), at.noise.at(step), "t", at.index)
        assert (t[split.gaussian] == 4.0).all()
        assert (t[split.teacher] < 1.0).all()
        total += float((split.weight * t).sum()) / (16 * 400)
    assert total == pytest.approx(sum(law.times) / 3, rel=0.02)


def test_the_network_sees_only_its_rows():
    law = LogUniformSigma(0.01, 100.0)
    method = matching(StandIn(point(0.1, 0.81), 10.0, law, EDM()), law=law)
    rows = []
    method.teacher.network.register_forward_pre_hook(lambda _, args: rows.append(args[1]))
    at = batch(32)
    update = method.student_update(at, method.generate(at))
    (sigmas,) = rows
    assert len(sigmas) == 24  # a quarter of the law's four decades lies above 10
    assert sigmas.max() <= 10.0
    assert float(update.metrics["teacher_share"]) == 0.75


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("parametrisation", [X0(), EDMPreconditioning(0.5)], ids=["x0", "edm"])
def test_rows_of_the_stand_in_are_as_the_teacher_would_answer(guidance, parametrisation):
    """Guided or not: classes shift the mean of teacher and mixture alike."""
    offsets = torch.tensor([0.0, 0.5, -0.25])  # the last is the null class

    class Classes(GaussianNetwork):
        def forward(self, x, t, labels):
            if isinstance(parametrisation, X0):
                return super().forward(x, t, offsets[labels])
            sigma = (4 * t).exp()
            a, b = parametrisation.coefficients(torch.ones_like(sigma), sigma)
            scale = parametrisation.input_scale(torch.ones_like(sigma), sigma)
            x = x / scale.view(-1, 1)
            denoised = super().forward(x, sigma, offsets[labels])
            return (denoised - a.view(-1, 1) * x) / b.view(-1, 1)

    components = [point(0.1 + float(offset), 0.81) for offset in offsets[:2]]
    mixture = GaussianMixture(components, torch.tensor([0.5, 0.5]), by_class=True)
    teacher = Denoiser(Classes(0.1, 0.9), EDM(), parametrisation)
    settings = MatchingSettings(normalise=False, guidance_scale=guidance)
    stand_in = StandIn(mixture, 1.0, LAW, EDM())
    critic = Denoiser(Classes(0.8, 0.6), EDM(), parametrisation)
    method = matching(stand_in, settings, teacher=teacher, critic=critic)
    labels = torch.arange(8) % 2
    at = batch(8, condition=labels, uncondition=labels)  # the mixture has no null Gaussian
    split, x_t = stand_in.split(at), 3 * torch.randn(8, 1)
    level = teacher.level(split.sample(EDM(), at.noise, "t", at.index))
    model_input = x_t if level.input_scale is None else level.input_scale.view(-1, 1) * x_t
    raw, uncond = method._with_stand_in(split, x_t, level, model_input, at)
    expected = teacher.network(model_input, level.noise_condition, labels)
    torch.testing.assert_close(raw, expected, rtol=2e-5, atol=2e-5)
    assert (uncond is None) == (guidance == 1)
    if uncond is not None:
        torch.testing.assert_close(uncond, expected, rtol=2e-5, atol=2e-5)


def test_ranks_split_as_one_process_does():
    law = LogUniformSigma()
    whole = StandIn(point(0.1, 0.81), 10.0, law, EDM()).split(batch(16))
    seen = []
    for rank in range(2):
        share = slice(8 * rank, 8 * rank + 8)
        at = batch(
            8, index=torch.arange(16)[share], gather=lambda v: torch.cat((v, v)), share=share
        )
        split = StandIn(point(0.1, 0.81), 10.0, law, EDM()).split(at)
        seen += (split.gaussian + 8 * rank).tolist()
        torch.testing.assert_close(split.weight, whole.weight[share])
        torch.testing.assert_close(split.low, whole.low[share])
    assert seen == whole.gaussian.tolist()


LAWS = [
    LogNormalSigma(),
    LogUniformSigma(),
    KarrasIndex(),
    Uniform(0.02, 0.98),
    LogitNormal(),
    FixedList((5.0, 0.4, 1.0)),
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
@pytest.mark.parametrize("process", [EDM(), VP.dit(), RectifiedFlow()], ids=["edm", "vp", "flow"])
def test_the_quantiles_and_the_probability_are_those_of_the_samples(law, process):
    if isinstance(law, FixedList) and not isinstance(process, EDM):
        law = FixedList((0.9, 0.2, 0.5)) if process == RectifiedFlow() else FixedList((900.0, 20.0))
    index = torch.arange(40_000)
    drawn = law.sample(process, Noise(0), "t", index).sort().values
    u = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000
    quantiles = law.quantile(process, u)
    assert (quantiles.diff() >= 0).all()
    below = torch.searchsorted(drawn, quantiles.float()) / 40_000
    at_most = torch.searchsorted(drawn, quantiles.float(), right=True) / 40_000
    assert (below <= u + 0.01).all()
    assert (at_most >= u - 0.01).all()
    alpha, sigma = process.alpha_sigma(drawn)
    ratio = float((sigma / alpha).quantile(0.7)) * 1.001
    share = float((sigma / alpha > ratio).float().mean())
    assert probability_above(law, process, ratio) == pytest.approx(share, abs=0.01)


def test_what_cannot_stand_in_is_said():
    with pytest.raises(ValueError, match=r"times of FixedList.* lie never"):
        exact_stand_in(above=6.0)
    with pytest.raises(ValueError, match="lie always"):
        exact_stand_in(above=0.1)
    with pytest.raises(ValueError, match="leaves a process without a sample"):
        exact_stand_in().split(batch(1))
    settings = MatchingSettings(gan_weight=0.1)
    with pytest.raises(ValueError, match="reads the teacher's features"):
        DistributionMatching(
            Denoiser(Shift(0.8, 0.6), EDM(), X0()),
            Denoiser(GaussianNetwork(0.0, 1.0), EDM(), X0()),
            Denoiser(GaussianNetwork(0.8, 0.6), EDM(), X0()),
            (1.0,),
            LAW,
            LAW,
            discriminator=Discriminator(((2,),)),
            settings=settings,
            stand_in=exact_stand_in(),
        )
