"""Share of each class."""

from __future__ import annotations

import pytest
import torch

from fastdistill.evaluate import class_shares


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_shares_are_counts_over_n_and_missing_classes_have_none(dtype):
    result = class_shares(torch.tensor([0, 2, 2, 2, 3, 3, 0, 2], dtype=dtype), classes=5)
    assert result.shares.tolist() == [0.25, 0.0, 0.5, 0.25, 0.0]
    assert (result.smallest, result.largest) == (0.0, 0.5)


def test_the_smallest_share_of_a_complete_set_is_not_zero():
    result = class_shares(torch.tensor([0, 1, 1, 1]), classes=2)
    assert (result.smallest, result.largest) == (0.25, 0.75)


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (torch.tensor([0, 3]), 3, r"0\.\.3; expected 0\.\.2"),
        (torch.tensor([-1, 0]), 3, r"-1\.\.0; expected 0\.\.2"),
        (torch.tensor([0.0, 1.0]), 3, "expected integers"),
        (torch.tensor([[0, 1]]), 3, "expected integers"),
        (torch.tensor([], dtype=torch.int64), 3, "expected integers"),
        (torch.tensor([True]), 3, "expected integers"),
        (torch.tensor([0]), 0, "classes is 0"),
    ],
)
def test_bad_labels_are_refused(labels, classes, message):
    with pytest.raises(ValueError, match=message):
        class_shares(labels, classes)
