"""`ConsistencyMatching`: a consistency function and a matched distribution at once, as rCM.

    loss = loss of distribution matching + consistency_weight * loss of continuous consistency

(rCM, arXiv 2510.08431). Consistency alone blurs details, since its errors add up along the
trajectory; matching alone, with reverse KL, forgets modes. Both losses are what they are in
`distribution_matching` and `continuous_consistency`. Published weights, as rCM's 100, belong to
other reductions: here an element's gradient is of the order of 1 / elements from the matching and,
since its tangent is normalised, 1 / elements^1.5 from the consistency.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from pydantic import PositiveFloat
from torch import Tensor

from fastdistill.objectives.base import Batch, Update
from fastdistill.objectives.continuous_consistency import ContinuousConsistency, TangentSettings
from fastdistill.objectives.distribution_matching import DistributionMatching
from fastdistill.objectives.matching_methods import DistributionMatchingMethod
from fastdistill.objectives.method import Networks
from fastdistill.objectives.trajectories import check_derivative


class ConsistencyMatchingMethod(DistributionMatchingMethod, TangentSettings):
    """rCM (arXiv 2510.08431): sCM beside distribution matching."""

    name: Literal["consistency_matching"]  # type: ignore[assignment]
    """consistency_matching: continuous consistency and distribution matching together."""
    consistency_weight: PositiveFloat = 1.0
    """Weight of the consistency's loss; sqrt(elements of a sample) makes both gradients alike."""

    @property
    def needs_real(self) -> bool:
        return True

    def build(self, networks: Networks) -> ConsistencyMatching:
        check_derivative(self.derivative, networks.training.precision)
        consistency = ContinuousConsistency(
            networks.student, networks.teacher, self, self.guidance_scale
        )
        return ConsistencyMatching(consistency, self.consistency_weight, **self.parts(networks))


class ConsistencyMatching(DistributionMatching):
    """Distribution matching whose student is held to the teacher's trajectories too.

    Args:
        consistency: the objective of the same student.
        consistency_weight: its weight.
        options: arguments of `DistributionMatching`.

    Raises:
        ValueError: for objectives of two students.
    """

    def __init__(
        self, consistency: ContinuousConsistency, consistency_weight: float, **options: Any
    ) -> None:
        super().__init__(**options)
        if consistency.student is not self.student:
            raise ValueError("consistency is of another student than the matching's")
        self.consistency_weight = consistency_weight
        self._beside = (consistency,)  # a tuple: its networks are registered here already

    @property
    def consistency(self) -> ContinuousConsistency:
        """The consistency's objective."""
        return self._beside[0]

    def before_step(self, step: int) -> None:
        super().before_step(step)
        self.consistency.before_step(step)

    def student_update(self, batch: Batch, sample: Tensor) -> Update:
        assert batch.real is not None
        matched = super().student_update(batch, sample)
        scaled = dataclasses.replace(batch, scale=batch.scale * self.consistency_weight)
        held = self.consistency.student_update(scaled, batch.real)
        metrics = {f"consistency_{name}": value for name, value in held.metrics.items()}
        return dataclasses.replace(
            matched, pairs=[*matched.pairs, *held.pairs], metrics=matched.metrics | metrics
        )
