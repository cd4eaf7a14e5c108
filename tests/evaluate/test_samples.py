"""The whole report: it ranks generators as a person would, and refuses what cannot be judged."""

from __future__ import annotations

import math

import pytest
import torch

from fastdistill.evaluate import (
    class_shares,
    evaluate_samples,
    precision_recall,
    real_split_distance,
    vendi_score,
)

KEYS = {
    "frechet_pixel",
    "frechet_pixel_real_halves",
    "frechet_features",
    "frechet_features_real_halves",
    "kernel_distance",
    "precision",
    "recall",
    "density",
    "coverage",
    "vendi",
    "vendi_real",
    "class_share_min",
    "class_share_max",
    "samples",
    "frechet_samples",
}


@pytest.fixture(scope="module")
def halves(digits):
    """Two disjoint sets of real digits, the second in the place of generated ones."""
    images, labels = digits
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return images[order[:1200]], images[order[1200:]], labels[order[1200:]]


def test_the_report_is_plain_finite_floats(halves, classifier):
    real, generated, _ = halves
    report = evaluate_samples(real, generated, classifier)
    assert report.keys() == KEYS
    assert all(type(value) is float and math.isfinite(value) for value in report.values())


def test_fresh_real_digits_score_like_two_real_halves(halves, classifier):
    real, generated, _ = halves
    report = evaluate_samples(real, generated, classifier)
    for name in ("frechet_pixel", "frechet_features"):
        assert 0.6 < report[name] / report[f"{name}_real_halves"] < 1.4
    assert report["precision"] > 0.9
    assert report["recall"] > 0.9
    assert report["vendi"] == pytest.approx(report["vendi_real"], rel=0.03)
    assert report["class_share_min"] > 0.07
    assert report["class_share_max"] < 0.13


def test_dropped_classes_show_in_every_number_but_precision(halves, classifier):
    real, generated, labels = halves
    report = evaluate_samples(real, generated[labels < 5], classifier)
    assert report["frechet_pixel"] > 3 * report["frechet_pixel_real_halves"]
    assert report["frechet_features"] > 5 * report["frechet_features_real_halves"]
    assert report["recall"] < 0.7
    assert report["vendi"] < 0.85 * report["vendi_real"]
    assert report["class_share_min"] == 0.0
    assert report["class_share_max"] > 0.15
    assert report["precision"] > 0.9


def test_noise_is_neither_precise_nor_near(halves, classifier):
    real, generated, _ = halves
    noise = torch.randn(generated.shape, generator=torch.Generator().manual_seed(1))
    report = evaluate_samples(real, generated + noise, classifier)
    assert report["precision"] < 0.1
    assert report["frechet_features"] > 10 * report["frechet_features_real_halves"]


def test_one_image_for_all_is_precise_and_covers_nothing(halves, classifier):
    real, generated, _ = halves
    report = evaluate_samples(real, generated[:1].expand(500, 1, 8, 8), classifier)
    assert report["recall"] < 0.01
    assert report["vendi"] == pytest.approx(1.0, abs=1e-6)
    assert report["class_share_max"] == 1.0


def test_digits_drawn_too_faint_are_seen_in_pixels(halves, classifier):
    # The mean stays: only the scale of the deviations is wrong.
    real, generated, _ = halves
    faint = generated.mean(0) + 0.8 * (generated - generated.mean(0))
    report = evaluate_samples(real, faint, classifier)
    assert report["frechet_pixel"] > 2 * report["frechet_pixel_real_halves"]


@pytest.mark.usefixtures("two_threads")
def test_a_small_set_is_judged_on_one_thread_and_the_number_is_put_back(
    halves, classifier, monkeypatch
):
    real, generated, _ = halves
    seen = []

    class Watching:
        classes = 10
        predict = staticmethod(classifier.predict)

        @staticmethod
        def features(images):
            seen.append(torch.get_num_threads())
            return classifier.features(images)

    evaluate_samples(real, generated, Watching())
    monkeypatch.setattr("fastdistill.evaluate.samples.SMALL_SET", 0)
    evaluate_samples(real, generated, Watching())
    assert seen == [1, 1, 2, 2]
    with pytest.raises(ValueError, match="are empty"):
        evaluate_samples(real, generated[:0], classifier)
    assert torch.get_num_threads() == 2


def test_every_metric_is_taken_at_equal_numbers_of_samples(halves, classifier):
    real, generated, _ = halves
    few = evaluate_samples(real, generated[:300], classifier)
    assert (few["samples"], few["frechet_samples"]) == (300, 300)
    assert few["frechet_pixel_real_halves"] == pytest.approx(
        real_split_distance(real.flatten(1), size=300)
    )
    many = evaluate_samples(generated, real, classifier)
    assert (many["samples"], many["frechet_samples"]) == (597, 298)
    expected = vendi_score(classifier.features(generated))  # all of the smaller set
    assert many["vendi_real"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("swap", [False, True])
def test_precision_recall_and_vendi_see_as_many_real_as_generated_samples(
    halves, classifier, monkeypatch, swap
):
    real, generated = reversed(halves[:2]) if swap else halves[:2]
    sizes = []

    def record(*features):
        sizes.append([len(value) for value in features])
        return (0.5, 0.5) if len(features) == 2 else 1.0

    monkeypatch.setattr("fastdistill.evaluate.samples.precision_recall", record)
    monkeypatch.setattr("fastdistill.evaluate.samples.vendi_score", record)
    evaluate_samples(real, generated, classifier)
    assert sizes == [[597, 597], [597], [597]]


def test_the_numbers_are_those_of_the_metrics_in_feature_space(halves, classifier):
    real, generated, _ = halves
    real = real[:597]  # equal sets are used whole
    report = evaluate_samples(real, generated, classifier)
    expected = precision_recall(classifier.features(real), classifier.features(generated))
    assert (report["precision"], report["recall"]) == expected
    assert report["vendi"] == pytest.approx(vendi_score(classifier.features(generated)))
    shares = class_shares(classifier.predict(generated), 10)
    assert report["class_share_min"] == shares.smallest
    assert report["class_share_max"] == shares.largest
    assert report["frechet_features_real_halves"] == pytest.approx(
        real_split_distance(classifier.features(real))
    )


def test_the_report_depends_on_its_own_seed_only(halves, classifier):
    real, generated, _ = halves
    first = evaluate_samples(real, generated[:300], classifier)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert evaluate_samples(real, generated[:300], classifier) == first
    assert torch.equal(torch.get_rng_state(), state)
    other = evaluate_samples(real, generated[:300], classifier, seed=1)
    for name in ("frechet_pixel", "frechet_features_real_halves", "vendi_real"):
        assert other[name] != first[name]


def test_samples_with_a_graph_are_judged_without_it(halves, classifier):
    real, generated, _ = halves
    seen = []

    class WithGraph:
        classes = 10
        predict = staticmethod(classifier.predict)

        @staticmethod
        def features(images):
            features = classifier.body(images) - classifier.centre
            seen.append(features.requires_grad)
            return features

    report = evaluate_samples(real, generated.clone().requires_grad_(), WithGraph())
    assert report == evaluate_samples(real, generated, classifier)
    assert seen == [False, False]


def test_non_finite_samples_are_refused_with_their_number(halves, classifier):
    real, generated, _ = halves
    broken = generated.clone()
    broken[3, 0, 2, 2] = math.nan
    broken[5, 0, 0] = math.inf
    message = "generated images: 9 of 38208 elements are not finite, in 2 of 597 samples"
    with pytest.raises(ValueError, match=message):
        evaluate_samples(real, broken, classifier)
    with pytest.raises(ValueError, match="real images: 9 of"):
        evaluate_samples(broken, real, classifier)


def test_empty_few_or_foreign_samples_are_refused(halves, classifier):
    real, generated, _ = halves
    with pytest.raises(ValueError, match="generated images are empty"):
        evaluate_samples(real, generated[:0], classifier)
    with pytest.raises(ValueError, match="generated images: 3 samples; at least 4"):
        evaluate_samples(real, generated[:3], classifier)
    with pytest.raises(ValueError, match=r"shape \(3, 8, 8\); expected \(1, 8, 8\)"):
        evaluate_samples(real, generated.expand(-1, 3, 8, 8), classifier)
    with pytest.raises(ValueError, match=r"generated images are torch.uint8 of shape \(597"):
        evaluate_samples(real, generated.to(torch.uint8), classifier)


def test_importing_the_package_imports_neither_scipy_nor_sklearn():
    import subprocess
    import sys

    program = (
        "import sys, torch; before = torch.get_rng_state(); import fastdistill.evaluate; "
        "assert torch.equal(before, torch.get_rng_state()); "
        "print([name for name in ('sklearn', 'scipy', 'safetensors') if name in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"
