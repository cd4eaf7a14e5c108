"""The C++ losses of whole samples: score projection and consistency, in every distance."""

from __future__ import annotations

import cpu_backend
import pytest
from cpu_backend import (
    DISTANCES,
    by_shape,
    by_storage,
    check,
    consistency_args,
    projection_args,
)

from fastdistill.ops.consistency import _consistency_cotangent
from fastdistill.ops.projection import _projection_cotangents

pytestmark = cpu_backend.needs_extension

by_distance = pytest.mark.parametrize("distance", list(DISTANCES))


class TestProjection:
    @by_shape
    @by_storage
    @by_distance
    @pytest.mark.parametrize("options", ["all", "guided", "none"])
    def test_agrees_with_the_reference(self, shape, storage, distance, options):
        check(
            _projection_cotangents,
            *projection_args(shape, storage, distance, options),
            places=64,  # E and R are independent here: the loss is 20 times less than its terms
            slack=1e-7,
        )


class TestConsistency:
    @by_shape
    @by_storage
    @by_distance
    @pytest.mark.parametrize("options", ["all", "raw", "none"])
    def test_agrees_with_the_reference(self, shape, storage, distance, options):
        check(_consistency_cotangent, *consistency_args(shape, storage, distance, options))
