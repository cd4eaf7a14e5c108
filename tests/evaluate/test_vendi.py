"""Vendi score: the published values, the closed forms and the two routes to one spectrum."""

from __future__ import annotations

import math

import pytest
import torch

from fastdistill.evaluate import vendi_score, vendi_score_from_kernel

ORDERS = [0.0, 0.3, 0.5, 0.995, 1.0, 1.5, 2.0, 3.0, 50.0, math.inf]


def normal(n: int, d: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cosines(features: torch.Tensor) -> torch.Tensor:
    rows = torch.nn.functional.normalize(features.double(), dim=1)
    return rows @ rows.T


# --- published and closed-form values -------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "expected"),
    [(0.5, 2.42035), (1.0, 2.15730), (2.0, 1.94805), (math.inf, 1.57895), (0.0, 3.0)],
)
def test_two_similar_samples_and_one_different(order, expected):
    kernel = torch.tensor([[1, 0.9, 0], [0.9, 1, 0], [0, 0, 1]], dtype=torch.float64)
    assert vendi_score_from_kernel(kernel, order) == pytest.approx(expected, abs=5e-6)


def test_three_pairs_of_equal_samples_count_as_three():
    samples = torch.tensor([0.0, 0, 10, 10, 20, 20], dtype=torch.float64)
    kernel = torch.exp(-(samples[:, None] - samples).abs())
    assert vendi_score_from_kernel(kernel) == pytest.approx(3.0, abs=1e-4)


@pytest.mark.parametrize("order", ORDERS)
def test_samples_that_share_nothing_count_as_n(order):
    assert vendi_score_from_kernel(torch.eye(7), order) == pytest.approx(7.0, rel=1e-12)
    assert vendi_score(torch.eye(7) * torch.arange(1.0, 8), order) == pytest.approx(7.0, rel=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_equal_samples_count_as_one(order):
    assert vendi_score_from_kernel(torch.ones(7, 7), order) == pytest.approx(1.0, rel=1e-12)
    direction = normal(1, 5, seed=1)
    repeated = direction * torch.arange(1.0, 10)[:, None]  # the length of a feature is ignored
    assert vendi_score(repeated, order) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_any_order_is_the_hill_number_of_the_spectrum(order):
    # Groups of 1, 2 and 5 equal samples: lambda = 1/8, 2/8, 5/8.
    shares = torch.tensor([1, 2, 5], dtype=torch.float64) / 8
    kernel = torch.block_diag(torch.ones(1, 1), torch.ones(2, 2), torch.ones(5, 5)).double()
    expected = {
        0.0: 3.0,
        1.0: math.exp(-sum(p * math.log(p) for p in shares.tolist())),
        math.inf: 8 / 5,
    }.get(order)
    if expected is None:
        expected = float((shares**order).sum() ** (1 / (1 - order)))
    assert vendi_score_from_kernel(kernel, order) == pytest.approx(expected, rel=1e-12)


def test_one_sample_of_a_kind_among_a_thousand_counts():
    features = torch.eye(2).repeat_interleave(torch.tensor([999, 1]), dim=0)
    entropy = -(0.999 * math.log(0.999) + 0.001 * math.log(0.001))
    assert vendi_score(features, 0.0) == 2.0
    assert vendi_score(features) == pytest.approx(math.exp(entropy), rel=1e-12)
    assert vendi_score_from_kernel(cosines(features), 0.0) == 2.0


# --- the two routes -------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("n", "d"), [(40, 6), (6, 40), (12, 12)])
def test_the_smaller_gram_matrix_gives_the_score_of_the_whole_kernel(n, d, order):
    features = normal(n, d, seed=1) + 0.5
    expected = vendi_score_from_kernel(cosines(features), order)
    assert vendi_score(features, order) == pytest.approx(expected, rel=1e-9)


def test_only_the_smaller_side_is_decomposed(monkeypatch):
    sizes = []
    original = torch.linalg.eigvalsh

    def record(matrix):
        sizes.append(tuple(matrix.shape))
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigvalsh", record)
    vendi_score(normal(40, 6, seed=1))
    vendi_score(normal(6, 40, seed=1))
    vendi_score(normal(40, 6, seed=1), order=2.0)
    assert sizes == [(6, 6), (6, 6)]


def test_chunks_give_what_the_whole_gives(monkeypatch):
    features = normal(100, 6, seed=1)
    whole = vendi_score(features)
    monkeypatch.setattr("fastdistill.evaluate.vendi.ROWS_AT_ONCE", 7)
    assert vendi_score(features) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("order", [1.0, 2.0])
def test_orders_beside_one_and_two_join_on_smoothly(order):
    features = normal(30, 6, seed=1)
    for step in (-1e-5, 1e-5, 1e-7, 1e-9, 1e-13):
        near = vendi_score(features, order + step)
        assert near == pytest.approx(vendi_score(features, order), rel=1e-4)


def test_the_score_falls_with_the_order():
    scores = [vendi_score(normal(30, 6, seed=1) + 1, order) for order in ORDERS]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == 6.0


# --- rounding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", [0.0, 0.1, 1.0])
def test_rounding_of_the_storage_is_not_counted_as_diversity(dtype, order):
    # Three directions, each many times at many lengths: rounding tilts every row a little.
    directions = torch.eye(3, dtype=torch.float64).repeat(100, 1) @ normal(3, 32, seed=1)
    lengths = 1 + torch.rand(300, 1, generator=torch.Generator().manual_seed(2)).double()
    exact = vendi_score(directions, order)
    assert vendi_score((directions * lengths).to(dtype), order) == pytest.approx(exact, rel=2e-2)
    assert round(vendi_score((directions * lengths).to(dtype), 0.0)) == 3


def test_a_kernel_in_float32_with_tiny_negative_eigenvalues_is_clamped():
    kernel = cosines(normal(60, 3, seed=1)).float()
    assert torch.linalg.eigvalsh(kernel.double())[0] < 0
    assert vendi_score_from_kernel(kernel, 0.0) == 3.0
    expected = vendi_score_from_kernel(kernel.double(), 0.5)
    assert vendi_score_from_kernel(kernel, 0.5) <= expected
    assert vendi_score_from_kernel(kernel) == pytest.approx(vendi_score(normal(60, 3, seed=1)))


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [-1.0, math.nan])
def test_orders_that_mean_nothing_are_refused(order):
    with pytest.raises(ValueError, match="order is"):
        vendi_score(normal(4, 3, seed=1), order)
    with pytest.raises(ValueError, match="order is"):
        vendi_score_from_kernel(torch.eye(3), order)


def test_features_without_a_direction_are_refused():
    features = normal(4, 3, seed=1)
    features[2] = 0
    with pytest.raises(ValueError, match="row of zeros"):
        vendi_score(features)
    with pytest.raises(ValueError, match="row of zeros"):
        vendi_score(features[:, :2].repeat(1, 4))
    with pytest.raises(ValueError, match="at least 1"):
        vendi_score(features[:0])
    features[2, 1] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        vendi_score(features)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (torch.ones(2, 3), r"expected \[n, n\]"),
        (2 * torch.eye(3), "diagonal"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "negative eigenvalue"),
        (torch.tensor([[1.0, math.inf], [math.inf, 1.0]]), "not finite"),
        (torch.ones(0, 0), "expected floating-point"),
    ],
)
def test_what_is_not_a_similarity_is_refused(kernel, message):
    with pytest.raises(ValueError, match=message):
        vendi_score_from_kernel(kernel)
