"""The digits classifier is good, the same every time, and leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load, save_file

from fastdistill.evaluate import DigitsClassifier, digits_classifier
from fastdistill.evaluate import digits_classifier as digits_classifier_function


def same_weights(a: DigitsClassifier, b: DigitsClassifier) -> bool:
    weights_a, weights_b = a.state_dict(), b.state_dict()
    return weights_a.keys() == weights_b.keys() and all(
        torch.equal(weights_a[name], weights_b[name]) for name in weights_a
    )


# --- what it knows --------------------------------------------------------------------------------


def test_it_labels_digits_that_it_was_not_trained_on(classifier):
    assert 0.97 <= classifier.held_out_accuracy < 1.0


def test_the_held_out_digits_are_not_those_it_was_trained_on(monkeypatch):
    module = digits_classifier_function.__globals__
    seen = []
    monkeypatch.setitem(
        module, "_train", lambda _, images, labels, __: seen.append((images, labels))
    )
    all_images, all_labels = module["_digits"]()
    accuracy = digits_classifier().held_out_accuracy
    (images, labels) = seen[0]
    assert images.shape == (1797 - 450, 1, 8, 8)
    assert labels.shape == (1797 - 450,)
    assert accuracy < 0.5  # untrained: the accuracy that is reported is measured
    # No image is there twice, so a held-out one would show.
    known = {image.numpy().tobytes() for image in images}
    assert len({image.numpy().tobytes() for image in all_images}) == 1797
    assert len(known) == 1797 - 450
    assert set(labels.tolist()) == set(all_labels.tolist()) == set(range(10))


def test_its_labels_are_those_of_the_data(classifier, digits):
    images, labels = digits
    predicted = classifier.predict(images)
    assert predicted.dtype == torch.int64
    assert (predicted == labels).double().mean() > 0.98


def test_features_are_sixty_four_and_all_alive(classifier, digits):
    features = classifier.features(digits[0])
    assert features.shape == (1797, 64)
    assert features.dtype == torch.float32
    assert features.std(0).min() > 0.01


def test_features_are_centred_so_that_cosines_speak_of_differences(classifier, digits):
    features = classifier.features(digits[0])
    assert features.mean(0).norm() < 0.1 * features.norm(dim=1).mean()


def test_centring_does_not_change_the_logits(classifier, digits):
    images = digits[0][:50]
    again = copy.deepcopy(classifier)
    again.centre += 1.0  # as if the features had another mean: undone by centring once more
    again.head.bias += again.head.weight.sum(1)
    before = again(images)
    digits_classifier_function.__globals__["_centre"](again, images)
    torch.testing.assert_close(again(images), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.features(images).mean(0), torch.zeros(64), rtol=0, atol=1e-5)


def test_labels_come_from_the_features(classifier, digits):
    images = digits[0][:50]
    logits = classifier.head(classifier.features(images))
    assert torch.equal(classifier.predict(images), logits.argmax(1))
    torch.testing.assert_close(classifier(images), logits)


def test_chunks_give_what_the_whole_gives(classifier, digits, monkeypatch):
    whole = classifier.features(digits[0][:100])
    monkeypatch.setitem(digits_classifier_function.__globals__, "ROWS_AT_ONCE", 7)
    torch.testing.assert_close(classifier.features(digits[0][:100]), whole)


def test_images_in_other_dtypes_are_taken(classifier, digits):
    images = digits[0][:20]
    assert torch.equal(classifier.features(images.double()), classifier.features(images))
    assert classifier.features(images[:0]).shape == (0, 64)


def test_it_is_frozen_and_its_features_carry_no_graph(classifier, digits):
    assert not any(parameter.requires_grad for parameter in classifier.parameters())
    images = digits[0][:4].clone().requires_grad_()
    assert not classifier.features(images).requires_grad
    assert classifier(images).requires_grad


@pytest.mark.parametrize("shape", [(3, 64), (3, 8, 8), (3, 3, 8, 8), (1, 8)])
def test_images_of_another_shape_are_refused(classifier, shape):
    with pytest.raises(ValueError, match=r"expected floating-point \[n, 1, 8, 8\]"):
        classifier.features(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"expected floating-point \[n, 1, 8, 8\]"):
        classifier.predict(torch.zeros(3, 1, 8, 8, dtype=torch.uint8))


# --- the same every time --------------------------------------------------------------------------


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_again_anywhere_gives_the_same_weights_and_leaves_no_trace(classifier, mode):
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with mode(), torch.autocast("cpu"), torch.device("meta"):
            again = digits_classifier()
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_num_threads() == 2
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert same_weights(again, classifier)
    assert again.held_out_accuracy == classifier.held_out_accuracy


@pytest.mark.usefixtures("two_threads")
def test_the_thread_count_is_put_back_even_when_training_fails(monkeypatch):
    seen = []

    def fail(*_):
        seen.append(torch.get_num_threads())
        raise RuntimeError("on purpose")

    monkeypatch.setitem(digits_classifier_function.__globals__, "_train", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        digits_classifier()
    assert seen == [1]
    assert torch.get_num_threads() == 2


# --- on disk --------------------------------------------------------------------------------------


def test_a_saved_classifier_loads_bit_for_bit(classifier, digits, tmp_path):
    path = tmp_path / "digits.safetensors"
    classifier.save(path)
    state = torch.get_rng_state()
    loaded = DigitsClassifier.load(str(path))
    assert torch.equal(torch.get_rng_state(), state)
    assert same_weights(loaded, classifier)
    assert loaded.held_out_accuracy == classifier.held_out_accuracy
    assert torch.equal(loaded.features(digits[0][:50]), classifier.features(digits[0][:50]))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert [entry.name for entry in tmp_path.iterdir()] == ["digits.safetensors"]


def test_saving_replaces_what_was_there(classifier, tmp_path):
    path = tmp_path / "digits.safetensors"
    path.write_bytes(b"something else")
    classifier.save(path)
    assert same_weights(DigitsClassifier.load(path), classifier)


def test_a_loaded_classifier_does_not_depend_on_its_file(classifier, tmp_path):
    path = tmp_path / "digits.safetensors"
    classifier.save(path)
    loaded = DigitsClassifier.load(path)
    with path.open("r+b") as file:  # rewritten in place, as a copy over the network would
        file.write(b"\0" * path.stat().st_size)
    assert same_weights(loaded, classifier)


def test_a_damaged_or_foreign_file_is_refused_by_name(classifier, tmp_path):
    path = tmp_path / "digits.safetensors"
    classifier.save(path)
    whole, weights = path.read_bytes(), load(path.read_bytes())
    kind = {"kind": "fastdistill digits classifier 1", "held_out_accuracy": "0.98"}
    nan = copy.deepcopy(weights)
    nan["head.bias"][3] = float("nan")
    half = {name: value.half() for name, value in weights.items()}
    partial = {name: value for name, value in weights.items() if name != "head.bias"}
    smaller = {**weights, "head.bias": torch.zeros(9)}

    def write(tensors, metadata):
        save_file(tensors, path, metadata)

    cases = [
        lambda: path.write_bytes(whole[: len(whole) // 2]),
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(b"\xff" * 100),
        lambda: write(weights, None),
        lambda: write(weights, {**kind, "kind": "another"}),
        lambda: write(weights, {"kind": kind["kind"]}),
        lambda: write(nan, kind),
        lambda: write(half, kind),
        lambda: write(partial, kind),
        lambda: write(smaller, kind),
    ]
    for damage in cases:
        damage()
        with pytest.raises(ValueError, match=r"digits\.safetensors is not a digits classifier"):
            DigitsClassifier.load(path)


def test_a_missing_file_is_reported_as_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        DigitsClassifier.load(tmp_path / "nothing.safetensors")
