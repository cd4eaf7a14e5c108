"""ScoreAug: what each transformation does, its optimum in closed form, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from test_distribution_matching import GaussianNetwork, Shift
from torch import Tensor, nn

from fastdistill.config import RecipeError, load_recipe
from fastdistill.diffusion import EDM, VP, X0, EDMPreconditioning, FixedList, Noise, RectifiedFlow
from fastdistill.models import Denoiser
from fastdistill.models.digits import DigitsNetwork
from fastdistill.objectives import (
    AugmentationSettings,
    Batch,
    Denoising,
    DistributionMatching,
    MatchingSettings,
)
from fastdistill.objectives.augmentation import Transformation, draw_transformation
from fastdistill.objectives.denoising import denoising_pair, denoising_update

ALL = AugmentationSettings(
    probability=0.8,
    flip=True,
    rotation=True,
    translation=0.4,
    cutout=0.5,
    brightness=0.3,
    conditioned=True,
)


def drawn(settings: AugmentationSettings, shape=(2, 6, 6), count=4000, step=0) -> Transformation:
    noise = Noise(3).at(step)
    return draw_transformation(settings, noise, "t", torch.arange(count), shape)


def settings_of(kind: str, **options) -> AugmentationSettings:
    value = True if kind in ("flip", "rotation") else 0.5
    return AugmentationSettings(**{kind: value}, conditioned=True, **options)


def expected(picture: Tensor, omega: Tensor, cutout: float) -> Tensor:
    """The same by torch's own operations, from what omega says was drawn."""
    height, width = picture.shape[1:]
    if omega[0]:
        return picture.flip(2)
    if omega[1:4].any():
        return torch.rot90(picture, int(omega[1:4].argmax()) + 1, (1, 2))
    if omega[6]:
        y, x = round(float(omega[7]) * height) - 1, round(float(omega[8]) * width) - 1
        reach_y, reach_x = int(cutout / 2 * height), int(cutout / 2 * width)
        made = picture.clone()
        rows = slice(max(y - reach_y, 0), y + reach_y + 1)
        made[:, rows, max(x - reach_x, 0) : x + reach_x + 1] = 0
        return made
    down, right = round(float(omega[4]) * height), round(float(omega[5]) * width)
    made = torch.zeros_like(picture)
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                made[:, y, x] = picture[:, y - down, x - right]
    return made * omega[9].exp()


@pytest.mark.parametrize("shape", [(2, 6, 6), (1, 8, 8)])
def test_every_transformation_is_torchs_own(shape):
    transform = drawn(ALL, shape, 300)
    pictures = torch.randn(300, *shape, generator=torch.Generator().manual_seed(0))
    made = transform(pictures)
    for picture, found, omega in zip(pictures, made, transform.omega, strict=True):
        assert torch.equal(found, expected(picture, omega, ALL.cutout)), omega


def test_pictures_need_not_be_square_but_to_be_turned():
    settings = ALL.model_copy(update={"rotation": False})
    transform, shape = drawn(settings, (1, 4, 7), 200), (1, 4, 7)
    pictures = torch.randn(200, *shape, generator=torch.Generator().manual_seed(0))
    for picture, found, omega in zip(pictures, transform(pictures), transform.omega, strict=True):
        assert torch.equal(found, expected(picture, omega, settings.cutout)), omega
    with pytest.raises(ValueError, match="rotation is for square pictures"):
        drawn(ALL, (1, 4, 7))


def test_one_is_drawn_a_sample_and_all_alike_often():
    omega = drawn(ALL).omega
    turned = omega[:, 1:4].sum(1)
    kinds = torch.stack([omega[:, 0], turned, omega[:, 6], (omega[:, 9] != 0).float()], dim=1)
    assert kinds.sum(1).max() == 1
    assert kinds.mean(0).tolist() == pytest.approx([0.16] * 4, abs=0.02)
    assert omega[:, 1:4].mean(0).tolist() == pytest.approx([0.16 / 3] * 3, abs=0.015)
    moved = (omega[:, 4:6] != 0).any(1).float()
    assert float(moved.mean()) == pytest.approx(0.16 * 24 / 25, abs=0.02)
    assert float((kinds.sum(1) + moved).max()) == 1


def test_what_is_drawn_depends_on_the_samples_index_and_the_step_alone():
    whole = drawn(ALL)
    rows = torch.arange(4000)[1::3]
    part = draw_transformation(ALL, Noise(3).at(0), "t", rows, (2, 6, 6))
    assert torch.equal(part.omega, whole.omega[1::3])
    assert torch.equal(part.source, whole.source[1::3])
    assert not torch.equal(drawn(ALL, step=1).omega, whole.omega)


# The optimum, in closed form. The data are N(mean, C) over pictures of 2 x 2 or vectors; a set of
# points with exactly their first and second moments makes every expectation of a square exact.


def matrices(settings: AugmentationSettings, shape=(1, 2, 2), count=60) -> list[np.ndarray]:
    """The matrix of each transformation that is drawn, float64."""
    size = int(np.prod(shape))
    transform = drawn(settings, shape, count)
    chosen = transform.omega.abs().sum(1) > 0
    columns = [
        transform(unit.reshape(1, *shape).double().expand(count, *shape))
        for unit in torch.eye(size)
    ]
    found = torch.stack([column.flatten(1) for column in columns], dim=2)[chosen]
    return list(found.numpy())


@dataclasses.dataclass
class Gaussian:
    """Data N(mean, C) at one (alpha, sigma), and points with the moments of (x_0, x_t)."""

    mean: np.ndarray
    covariance: np.ndarray
    alpha: float
    sigma: float

    @classmethod
    def random(cls, process, time: float, size: int = 4) -> Gaussian:
        generator = np.random.default_rng()
        root = generator.normal(size=(size, size))
        alpha, sigma = (float(v) for v in process.alpha_sigma(torch.tensor(time).double()))
        return cls(
            generator.uniform(0.3, 0.9, size), root @ root.T + 0.2 * np.eye(size), alpha, sigma
        )

    def points(self) -> tuple[Tensor, Tensor]:
        size = len(self.mean)
        units = np.sqrt(2 * size) * np.concatenate([np.eye(2 * size), -np.eye(2 * size)])
        x_0 = self.mean + units[:, :size] @ np.linalg.cholesky(self.covariance).T
        return torch.from_numpy(x_0), torch.from_numpy(
            self.alpha * x_0 + self.sigma * units[:, size:]
        )

    def denoiser(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gain and shift of E[A x_0 | A x_t]: alpha A C A' (A (alpha^2 C + sigma^2 I) A')^+."""
        noisy = self.alpha**2 * self.covariance + self.sigma**2 * np.eye(len(self.mean))
        inverse = np.linalg.pinv(matrix @ noisy @ matrix.T)
        gain = self.alpha * matrix @ self.covariance @ matrix.T @ inverse
        return gain, matrix @ self.mean - gain @ (self.alpha * matrix @ self.mean)

    def gradient(self, matrix: np.ndarray, gain: np.ndarray, shift: np.ndarray) -> float:
        """Largest entry of the gradient to gain and shift, by the op, on transformed points."""
        x_0, x_t = (value @ torch.from_numpy(matrix).T for value in self.points())
        level = Denoiser(nn.Identity(), EDM(), X0()).level(torch.ones(len(x_0)).double())
        raw = x_t @ torch.from_numpy(gain).T + torch.from_numpy(shift)
        (_, cotangent), _ = denoising_pair(raw, x_0, x_t, level, X0(), 1 / len(x_0))
        return float(torch.cat((cotangent.T @ x_t, cotangent.sum(0)[:, None]), dim=1).abs().max())


PROCESSES = [(EDM(), 0.7), (VP.dit(), 300.0), (RectifiedFlow(), 0.45)]


@pytest.mark.parametrize(("process", "time"), PROCESSES)
@pytest.mark.parametrize("kind", ["flip", "rotation", "translation", "cutout", "brightness"])
def test_the_optimum_is_the_closed_form(kind, process, time, reference_backend):
    case = Gaussian.random(process, time)
    found = matrices(settings_of(kind))
    assert len(found) > 5
    for matrix in found:
        assert case.gradient(matrix, *case.denoiser(matrix)) < 1e-12
        plain = case.denoiser(np.eye(4))
        if kind in ("flip", "rotation", "brightness"):  # invertible: D~(A x) = A D(x)
            inverse = np.linalg.inv(matrix)
            assert case.gradient(matrix, matrix @ plain[0] @ inverse, matrix @ plain[1]) < 1e-12
        elif abs(matrix).sum() > 0 and not np.array_equal(matrix, np.eye(4)):
            wrong = case.gradient(matrix, matrix @ plain[0], matrix @ plain[1])
            assert wrong > 1e-4, "P D(x) is no optimum of an input with holes"


def test_turned_noise_is_noise_of_the_same_strength_and_scaled_noise_is_not():
    for kind in ("flip", "rotation"):
        for matrix in matrices(settings_of(kind)):
            assert np.array_equal(matrix @ matrix.T, np.eye(4))
    settings = settings_of("brightness")
    transform = drawn(settings, (1, 8, 8))
    eps = torch.randn(4000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    strength = (0.5 * transform(eps)).flatten(1).std(1)
    told = 0.5 * transform.omega[:, 9].exp()
    assert float((strength / told).mean()) == pytest.approx(1.0, abs=0.01), "b sigma, not sigma"
    assert float(told.max()) > 0.7


@pytest.mark.parametrize("invariant", [True, False])
def test_without_omega_a_flip_keeps_the_plain_answer_only_for_data_that_it_leaves_alone(invariant):
    """Best linear answer to a mixture of plain and flipped points, which look alike."""
    case = Gaussian.random(EDM(), 0.7)
    [flip, *_] = matrices(settings_of("flip"))
    if invariant:
        case.mean = (case.mean + flip @ case.mean) / 2
        case.covariance = (case.covariance + flip @ case.covariance @ flip.T) / 2
    x_0, x_t = (value.numpy() for value in case.points())
    both = [np.concatenate((value, value @ flip.T)) for value in (x_0, x_t)]
    inputs = np.concatenate((both[1], np.ones((len(both[1]), 1))), axis=1)
    found = np.linalg.lstsq(inputs, both[0], rcond=None)[0].T
    gain, shift = case.denoiser(np.eye(4))
    same = np.allclose(found, np.concatenate((gain, shift[:, None]), axis=1), atol=1e-9)
    assert same == invariant


# The loss, and the networks that see it.


class Spy(nn.Module):
    """Remembers what it was asked, and answers half of it."""

    takes_omega = True

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, model_input, noise_condition, condition, **told):
        self.asked, self.told = model_input, told
        return self.factor * model_input


@pytest.mark.parametrize("conditioned", [True, False])
def test_the_loss_asks_about_transformed_inputs_for_transformed_samples(conditioned):
    count, shape = 64, (1, 8, 8)
    settings = AugmentationSettings(translation=0.3, cutout=0.4, conditioned=conditioned)
    denoiser = Denoiser(Spy(), EDM(), EDMPreconditioning())
    real = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    batch = Batch(torch.arange(count), Noise(0), 1 / count, shape, real)
    method = Denoising(denoiser, FixedList((0.7,)), augmentation=settings)
    update = method.student_update(batch, method.generate(batch))
    update.backward()
    transform = draw_transformation(
        settings, batch.noise, "denoising-augmentation", batch.index, shape
    )
    x_t = transform(real + 0.7 * batch.noise.normal("denoising-noise", batch.index, shape))
    level = denoiser.level(torch.full((count,), 0.7))
    scale = float(level.input_scale[0])
    torch.testing.assert_close(denoiser.network.asked, scale * x_t, rtol=1e-5, atol=1e-6)
    assert set(denoiser.network.told) == ({"omega"} if conditioned else set())
    if conditioned:
        assert torch.equal(denoiser.network.told["omega"], transform.omega)
    a, b = (float(value[0]) for value in level.coefficients)
    factor = torch.tensor(0.5, requires_grad=True)
    squared = (a * x_t + b * factor * scale * x_t - transform(real)).square().flatten(1).mean(1)
    (squared / b**2).mean().backward()
    assert float(update.metrics["loss"].mean()) == pytest.approx(
        float((squared / b**2).mean().detach()), rel=1e-4
    )
    assert float(denoiser.network.factor.grad) == pytest.approx(float(factor.grad), rel=1e-4)


def test_the_critic_alone_sees_transformed_samples():
    """Teacher and critic are asked about plain x_t in the student's update, as without."""

    class Watched(GaussianNetwork):
        takes_omega = True

        def forward(self, x, sigma, condition, omega=None):
            self.omega, self.asked = omega, x.detach()
            return super().forward(x, sigma, condition)

    settings = AugmentationSettings(brightness=1.0, conditioned=True)
    networks = [Watched(0.0, 1.0), Watched(0.8, 0.6)]
    method = DistributionMatching(
        Denoiser(Shift(0.8, 0.6), EDM(), X0()),
        *(Denoiser(network, EDM(), X0()) for network in networks),
        (1.0,),
        FixedList((0.5,)),
        FixedList((0.5,)),
        settings=MatchingSettings(critic_augmentation=settings),
    )
    batch = Batch(torch.arange(256), Noise(0), 1 / 256, (1,))
    sample = method.generate(batch)
    method.student_update(batch, sample)
    plain = sample.detach() + 0.5 * batch.noise.normal("matching-noise", batch.index, (1,))
    for network in networks:
        torch.testing.assert_close(network.asked, plain)
        assert network.omega is None
    method.critic_update(batch, sample.detach())
    torch.testing.assert_close(networks[0].asked, plain, msg="the teacher is not asked again")
    plain = sample.detach() + 0.5 * batch.noise.normal("critic-noise", batch.index, (1,))
    ratio = (networks[1].asked / plain).flatten()
    torch.testing.assert_close(ratio, networks[1].omega[:, 9].exp(), rtol=1e-4, atol=1e-4)
    assert float((ratio != 1).float().mean()) > 0.2


def test_a_digits_network_that_can_be_told_begins_as_one_that_cannot():
    torch.manual_seed(0)
    plain = DigitsNetwork(width=32, blocks=1)
    told = DigitsNetwork(width=32, blocks=1, omega=True)
    told.load_state_dict(plain.state_dict() | {"omega.weight": told.omega.weight.detach()})
    assert (plain.takes_omega, told.takes_omega) == (False, True)
    nn.init.normal_(told.leave[1].weight)
    plain.load_state_dict({k: v for k, v in told.state_dict().items() if k != "omega.weight"})
    given = torch.randn(7, 1, 8, 8), torch.randn(7), torch.arange(7)
    omega = drawn(ALL, (1, 8, 8), 7).omega
    assert torch.equal(told(*given, omega=omega), plain(*given))
    nn.init.normal_(told.omega.weight)
    assert torch.equal(told(*given), plain(*given)), "no omega is a plain sample"
    differs = (told(*given, omega=omega) != plain(*given)).flatten(1).any(1)
    assert torch.equal(differs, omega.abs().sum(1) > 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to do"),
        ({"flip": True}, "flip cannot be told from noise"),
        ({"rotation": True, "invariant": ("flip",)}, "rotation cannot be told from noise"),
        ({"cutout": 0.5, "probability": 1.0}, "less than 1"),
    ],
)
def test_conditions_that_are_not_met_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AugmentationSettings(**options)


def test_invariant_data_need_no_omega():
    assert AugmentationSettings(flip=True, invariant=("flip",)).kinds == ("flip",)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"cutout": 0.5}, (16,), "cutout is for pictures"),
        ({"brightness": 0.5}, (2,), "cannot be read off 2 numbers"),
        ({"brightness": 0.5}, (1, 4, 4), "cannot be read off 16 numbers"),
    ],
)
def test_shapes_that_cannot_be_transformed_so_are_refused(options, shape, message):
    settings = AugmentationSettings(**options)
    with pytest.raises(ValueError, match=message):
        settings.check_shape(shape)
    network = Spy()
    batch = Batch(torch.arange(2), Noise(0), 0.5, shape, torch.zeros(2, *shape))
    denoiser = Denoiser(network, EDM(), X0())
    with pytest.raises(ValueError, match=message):
        denoising_update(denoiser, batch, batch.real, FixedList((1.0,)), X0(), "s", settings)


def test_networks_that_are_frozen_or_cannot_be_told_are_refused():
    told, untold = (AugmentationSettings(cutout=0.5, conditioned=c) for c in (True, False))
    network = GaussianNetwork(0.0, 1.0)
    with pytest.raises(ValueError, match="GaussianNetwork cannot be told what was drawn"):
        Denoising(Denoiser(network, EDM(), X0()), FixedList((1.0,)), augmentation=told)
    network.requires_grad_(False)
    with pytest.raises(ValueError, match="the student is frozen"):
        Denoising(Denoiser(network, EDM(), X0()), FixedList((1.0,)), augmentation=untold)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.critic_augmentation={rotation: true}"], "rotation cannot be told from noise"),
        (
            ["objective.critic_augmentation={rotation: true, conditioned: true}"],
            "objective.critic_augmentation.conditioned is set, but model digits cannot be told",
        ),
        (
            ["objective.critic_augmentation={cutout: 0.3}", "objective.share_critic_forward=true"],
            "its pass cannot be shared",
        ),
        (["teacher=FOLDER", "teacher.augmentation={cutout: 0.3}"], "is not trained here"),
        (["teacher.augmentation={cut_out: 0.3}"], "did you mean 'cutout'"),
    ],
)
def test_a_recipe_with_a_wrong_combination_is_refused_before_it_starts(overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("digits", overrides)
