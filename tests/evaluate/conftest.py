"""The classifier and the digits, made once for the folder."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from fastdistill.evaluate import digits_classifier


@pytest.fixture
def two_threads():
    """A thread count that one can tell from one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def classifier():
    return digits_classifier()


@pytest.fixture(scope="session")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images [1797, 1, 8, 8] in [-1, 1] and labels [1797]."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    return images, torch.tensor(labels)
