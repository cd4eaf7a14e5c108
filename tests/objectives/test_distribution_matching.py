"""The pathwise objective: its gradients in closed form, and each of its settings."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from fastdistill.diffusion import (
    EDM,
    X0,
    EDMPreconditioning,
    FixedList,
    LogNormalSigma,
    Noise,
)
from fastdistill.models import Denoiser
from fastdistill.objectives import (
    Batch,
    Discriminator,
    DistributionMatching,
    MatchingSettings,
    get_divergence,
    logistic_cotangent,
)

SIGMA = 0.5
GUIDANCE = 3.0


class GaussianNetwork(nn.Module):
    """Denoiser of N(mean, scale^2) at any sigma, with features; a condition shifts its mean."""

    feature_shapes = ((2,),)

    def __init__(self, mean: float, scale: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.scale = nn.Parameter(torch.tensor(scale))
        self.calls = 0

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor:
        self.calls += 1
        variance = self.scale**2
        mean = self.mean if condition is None else self.mean + condition.view(-1, 1)
        gain = variance / (variance + sigma.view(-1, 1) ** 2)
        return mean + gain * (x - mean)

    def features(self, x: Tensor, sigma: Tensor, condition: Tensor | None) -> list[Tensor]:
        return [torch.cat((x * self.scale, x**2), dim=1)]

    def forward_with_features(self, x: Tensor, sigma: Tensor, condition: Tensor | None):
        with torch.no_grad():
            raw = self(x, sigma, condition)
        return raw, self.features(x, sigma, condition)


class Shift(nn.Module):
    """Generator mean + scale * z at sigma = 1, where the student's input is z."""

    def __init__(self, mean: float, scale: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor:
        return self.mean + self.scale * x


def objective(settings=None, times=(1.0,), discriminator=None, law=None) -> DistributionMatching:
    """Teacher N(0, 1), student and exact critic N(0.8, 0.6^2), everything at sigma = 0.5."""
    return DistributionMatching(
        Denoiser(Shift(0.8, 0.6), EDM(), X0()),
        Denoiser(GaussianNetwork(0.0, 1.0), EDM(), X0()),
        Denoiser(GaussianNetwork(0.8, 0.6), EDM(), X0()),
        times,
        law or FixedList((SIGMA,)),
        law or FixedList((SIGMA,)),
        discriminator=discriminator,
        settings=settings or MatchingSettings(normalise=False),
    )


def batch(count: int = 400_000, **changes) -> Batch:
    made = Batch(torch.arange(count), Noise(0), 1 / count, (1,))
    return dataclasses.replace(made, **changes)


def student_gradient(method: DistributionMatching, at: Batch) -> tuple[float, float]:
    parameters = list(method.student.parameters())
    for value in parameters:
        value.grad = None
    method.student_update(at, method.generate(at)).backward()
    return tuple(float(value.grad) for value in parameters)


def test_diff_instruct_has_the_closed_form_gradient_of_reverse_kl():
    """The closed form in denoiser space: sigma^2 times (0.64, -0.503607) up to sampling error."""
    mean, scale = student_gradient(objective(), batch())
    assert (mean / SIGMA**2, scale / SIGMA**2) == pytest.approx((0.64, -0.503607), abs=5e-3)


def test_f_distill_weights_the_same_gradient_by_h():
    """With an exact discriminator: (E[h] cancels, as weights have mean one)."""

    class Exact(Discriminator):
        def __init__(self) -> None:
            nn.Module.__init__(self)

        def forward(self, features):
            x = features[0][:, :1]  # the teacher's scale is 1
            return 0.165870 - 1.311475 * x + 0.419672 * x**2

    settings = MatchingSettings(
        get_divergence("jensen_shannon"), normalise=False, ratio_min=0.0, ratio_max=1e9
    )
    mean, scale = student_gradient(objective(settings, discriminator=Exact()), batch())
    mean_h = 0.4111  # E_q[h] by quadrature
    found = (mean * mean_h / SIGMA**2, scale * mean_h / SIGMA**2)
    assert found == pytest.approx((0.336127, -0.314718), abs=1e-2)


def test_gradient_vanishes_at_the_fixed_point():
    method = objective(law=LogNormalSigma())
    method.student.network.load_state_dict({"mean": torch.tensor(0.0), "scale": torch.tensor(1.0)})
    method.critic.network.load_state_dict({"mean": torch.tensor(0.0), "scale": torch.tensor(1.0)})
    assert student_gradient(method, batch(1000)) == pytest.approx((0, 0), abs=1e-7)


def test_nothing_but_the_role_that_is_updated_receives_a_gradient():
    method = objective(
        MatchingSettings(gan_weight=0.1, gan_features="critic"),
        discriminator=Discriminator(GaussianNetwork.feature_shapes),
    )
    at = batch(64, real=torch.randn(64, 1))
    sample = method.generate(at)
    critics = [p for module in method.critic_modules().values() for p in module.parameters()]
    for value in critics:
        value.requires_grad_(
            False
        )  # as the trainer freezes them, whose features the GAN term reads
    method.student_update(at, sample).backward()
    assert all(value.grad is not None for value in method.student.parameters())
    assert all(value.grad is None for value in (*critics, *method.teacher.parameters()))
    for value in critics:
        value.requires_grad_()
    for value in method.student.parameters():
        value.grad = None
    method.critic_update(at, sample.detach()).backward()
    assert all(value.grad is not None for value in critics)
    assert all(value.grad is None for value in method.student.parameters())
    assert all(value.grad is None for value in method.teacher.parameters())


def test_the_critics_update_fits_it_to_the_students_samples():
    """At the exact critic the expected gradient is zero; elsewhere it points there."""
    method = objective()
    at = batch(200_000)
    parameters = list(method.critic.parameters())
    method.critic_update(at, method.generate(at).detach()).backward()
    assert [float(value.grad) for value in parameters] == pytest.approx([0, 0], abs=5e-3)
    method.critic.network.load_state_dict({"mean": torch.tensor(1.0), "scale": torch.tensor(0.8)})
    method.critic_update(at, method.generate(at).detach()).backward()
    assert all(float(value.grad) > 0.01 for value in parameters)


@pytest.mark.parametrize("features", ["teacher", "critic"])
def test_gan_term_pushes_samples_towards_what_the_discriminator_calls_real(features):
    """d softplus(-logit) / dx against autograd of the whole chain."""
    torch.manual_seed(0)
    discriminator = Discriminator(GaussianNetwork.feature_shapes)
    discriminator.heads = nn.ModuleList(
        [nn.Sequential(nn.Linear(2, 4), nn.SiLU(), nn.Linear(4, 1))]
    )
    weight, at = 0.7, batch(16)
    settings = MatchingSettings(normalise=False, gan_weight=weight, gan_features=features)
    method = objective(settings, discriminator=discriminator)
    with_gan = student_gradient(method, at)
    without = student_gradient(objective(), at)
    owner = method.teacher if features == "teacher" else method.critic
    x = method.generate(at)
    x_t = x + SIGMA * at.noise.normal("matching-noise", at.index, (1,))
    level = torch.full((16,), SIGMA)
    logits = discriminator(owner.network.features(x_t, level, None))
    loss = weight * nn.functional.softplus(-logits).mean()
    expected = torch.autograd.grad(loss, list(method.student.parameters()))
    found = [mine - theirs for mine, theirs in zip(with_gan, without, strict=True)]
    assert found == pytest.approx([float(value) for value in expected], rel=1e-3)


def test_guidance_runs_the_teacher_once_on_both_conditions():
    """D = D_none + scale (D_cond - D_none), so a guided mean moves by scale times the shift."""
    settings = MatchingSettings(normalise=False, guidance_scale=GUIDANCE)
    condition, none = torch.full((64,), 0.2), torch.zeros(64)
    at = batch(64, condition=condition, uncondition=none)
    guided = objective(settings)
    calls = guided.teacher.network.calls
    found = student_gradient(guided, at)
    assert guided.teacher.network.calls == calls + 1
    shifted = dataclasses.replace(at, condition=GUIDANCE * condition)
    reference = objective()
    critic_at = dataclasses.replace(shifted, condition=condition)
    reference.critic.network.forward = lambda x, s, _: GaussianNetwork.forward(
        reference.critic.network, x, s, critic_at.condition
    )
    assert found == pytest.approx(student_gradient(reference, shifted), rel=1e-4)


def test_a_critic_of_another_parametrisation_sees_its_own_input():
    """The same critic, told as an EDM-preconditioned network, gives the same gradient."""
    kind = EDMPreconditioning()

    class Preconditioned(GaussianNetwork):
        def forward(self, model_input, noise_condition, condition):
            sigma = (4 * noise_condition).exp()
            a, b = (value.view(-1, 1) for value in kind.coefficients(torch.ones_like(sigma), sigma))
            x = model_input / kind.input_scale(torch.ones_like(sigma), sigma).view(-1, 1)
            return (super().forward(x, sigma, condition) - a * x) / b

    plain, other = objective(), objective()
    other.critic = Denoiser(Preconditioned(0.8, 0.6), EDM(), kind)
    expected = student_gradient(plain, batch(500))
    assert student_gradient(other, batch(500)) == pytest.approx(expected, rel=1e-4)


def test_backward_simulation_trains_the_inputs_of_inference():
    """The graded call sees what the few-step sampler would feed it."""
    from fastdistill.diffusion import few_step

    method = objective(times=(1.0, 0.7, 0.4))
    at = batch(8)
    chosen = set()
    for step in range(12):
        at.noise.at(step)
        last = at.noise.choice("backward-simulation", 3)
        chosen.add(last)
        expected = few_step(
            method.student, EDM(), (1.0, 0.7, 0.4)[: last + 1], at.noise, at.index, (1,)
        )
        torch.testing.assert_close(method.generate(at), expected)
    assert chosen == {0, 1, 2}


def test_logistic_cotangent_is_the_gradient_of_the_losses():
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    for real, sign in ((True, -1), (False, 1)):
        loss = nn.functional.softplus(sign * logits).mean(1)
        (expected,) = torch.autograd.grad(0.3 * loss.sum(), logits)
        found = logistic_cotangent(logits, real=real, scale=0.3)
        torch.testing.assert_close(found.cotangent, expected)
        torch.testing.assert_close(found.loss, loss.detach())


@pytest.mark.parametrize("features", ["teacher", "critic"])
def test_the_discriminator_learns_to_call_data_real_and_samples_fake(features):
    """Its gradient is that of softplus(fake) + softplus(-real) at one noise level."""
    torch.manual_seed(0)
    discriminator = Discriminator(GaussianNetwork.feature_shapes, width=8)
    settings = MatchingSettings(gan_weight=0.1, gan_features=features, gan_critic_weight=0.3)
    method = objective(settings, discriminator=discriminator)
    at = batch(64, real=torch.randn(64, 1) - 2)
    sample = method.generate(at).detach()
    parameters = list(discriminator.parameters())
    method.critic_update(at, sample).backward()
    owner = method.teacher if features == "teacher" else method.critic
    noise = SIGMA * at.noise.normal("discriminator-noise", at.index, (1,))
    level = torch.full((64,), SIGMA)
    fake, real = (
        discriminator(owner.network.features(x + noise, level, None)) for x in (sample, at.real)
    )
    loss = nn.functional.softplus(fake).mean() + nn.functional.softplus(-real).mean()
    for mine, expected in zip(
        (value.grad for value in parameters),
        torch.autograd.grad(0.3 * loss, parameters),
        strict=True,
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


def test_the_history_of_ratios_is_kept():
    settings = MatchingSettings(get_divergence("forward_kl"), ratio_decay=0.5)
    method = objective(settings, discriminator=Discriminator(GaussianNetwork.feature_shapes))
    at = batch(32)
    method.student_update(at, method.generate(at))
    assert float(method.ratio_history[:, 1].sum()) == 32
    method.student_update(at, method.generate(at))
    assert float(method.ratio_history[:, 1].sum()) == 0.5 * 32 + 32
    assert "ratio_history" in method.state_dict()


@pytest.mark.parametrize("shape", [(24,), (8, 16, 16), (8, 4, 4)])
def test_discriminator_reads_vectors_and_maps(shape):
    discriminator = Discriminator([shape, shape])
    assert discriminator([torch.randn(3, *shape)] * 2).shape == (3, 2)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="needs a discriminator"):
        objective(MatchingSettings(get_divergence("forward_kl")))
    with pytest.raises(ValueError, match="uses none"):
        objective(discriminator=Discriminator([(2,)]))
    with pytest.raises(ValueError, match="student_times is empty"):
        objective(times=())
