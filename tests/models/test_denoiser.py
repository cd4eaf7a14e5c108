"""`Denoiser` and the digits network."""

from __future__ import annotations

import torch

from fastdistill.diffusion import EDM, EDMPreconditioning, Epsilon, RectifiedFlow
from fastdistill.models import Denoiser
from fastdistill.models.digits import DigitsNetwork


def network(**options) -> DigitsNetwork:
    torch.manual_seed(0)
    made = DigitsNetwork(width=16, blocks=2, **options)
    torch.nn.init.normal_(made.leave[1].weight)
    return made


def test_denoised_is_a_x_plus_b_times_the_raw_output():
    denoiser = Denoiser(network(), RectifiedFlow(), Epsilon(time_scale=1000.0))
    x_t, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.2, 0.5, 0.9]), torch.tensor([1, 0, 9])
    raw = denoiser.network(x_t, 1000 * t, labels)
    wide = t.view(-1, 1, 1, 1)
    expected = (x_t - wide * raw) / (1 - wide)
    torch.testing.assert_close(denoiser(x_t, t, labels), expected, rtol=1e-4, atol=1e-5)


def test_edm_preconditioning_scales_the_networks_input():
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, model_input, noise_condition, condition):
            seen.append((model_input, noise_condition))
            return torch.zeros_like(model_input)

    sigma = torch.tensor([0.5, 2.0])
    x_t = torch.ones(2, 1)
    denoised = Denoiser(Spy(), EDM(), EDMPreconditioning(0.5))(x_t, sigma)
    scale = (sigma**2 + 0.25).rsqrt().view(-1, 1)
    torch.testing.assert_close(seen[0][0], scale)
    torch.testing.assert_close(seen[0][1], sigma.log() / 4)
    torch.testing.assert_close(denoised, 0.25 * scale**2)


def test_one_pass_gives_output_and_features_and_keeps_the_graph_to_the_features():
    made = network()
    x, level, labels = torch.randn(3, 1, 8, 8), torch.randn(3), torch.tensor([1, 2, 3])
    x.requires_grad_()
    raw, features = made.forward_with_features(x, level, labels)
    assert torch.equal(raw, made(x, level, labels))
    assert not raw.requires_grad
    assert [value.shape[1:] for value in features] == [(16,), (16,)]
    for mine, alone in zip(features, made.features(x, level, labels), strict=True):
        assert torch.equal(mine, alone)
        assert mine.requires_grad


def test_classes_and_noise_levels_are_told_apart():
    made = network()
    x, level = torch.randn(1, 1, 8, 8).expand(3, -1, -1, -1), torch.zeros(3)
    by_class = made(x, level, torch.tensor([0, 1, 10]))
    assert len(by_class.flatten(1).unique(dim=0)) == 3
    by_level = made(x, torch.tensor([-1.0, 0.0, 1.0]), torch.zeros(3, dtype=torch.int64))
    assert len(by_level.flatten(1).unique(dim=0)) == 3
    plain = network(classes=0)
    assert plain(x, level, None).shape == x.shape


def test_octaves_let_the_digits_network_read_waves_of_a_vector():
    """The first layer sees x, sin x, cos x, sin 2x, cos 2x; without octaves x alone."""
    torch.manual_seed(0)
    plain, waves = (DigitsNetwork((2,), 0, 8, 1, octaves=octaves) for octaves in (0, 2))
    assert (plain.enter.in_features, waves.enter.in_features) == (2, 10)
    seen: list[torch.Tensor] = []
    waves.enter.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.tensor([[0.3, -1.2]])
    assert waves(x, torch.zeros(1), None).shape == (1, 2)
    expected = torch.cat((x, x.sin(), x.cos(), (2 * x).sin(), (2 * x).cos()), dim=1)
    torch.testing.assert_close(seen[0], expected)
