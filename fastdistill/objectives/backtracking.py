"""`Backtracking`: DisBack, distribution matching to nodes on a path that ends at the teacher.

    degradation     a copy of the teacher is trained by denoising score matching on samples of the
                    initial student; node 0 is the teacher, nodes 1 ... N are kept as it goes
    backtracking    the critic starts as node N; the student is matched to node N-1, then to N-2,
                    ..., and at last to node 0, the teacher itself

Source: arXiv 2408.15991. Far from the teacher its scores at the student's samples say little; the
nodes between them lead there. For a linear denoiser D = a x of data of variance v at one sigma, by
gradient descent with rate eta, a_k = a_S + (1 - 2 eta (v + sigma^2))^k (a_T - a_S) with
a_S = v / (v + sigma^2): the path is the exponential interpolation from the teacher's to the
student's score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from fastdistill.diffusion import Noise, TimestepLaw
from fastdistill.models import Denoiser
from fastdistill.objectives.base import Batch, Objective, Update
from fastdistill.objectives.denoising import denoising_update
from fastdistill.objectives.distribution_matching import DistributionMatching
from fastdistill.objectives.matching_methods import DistributionMatchingMethod
from fastdistill.objectives.method import Networks
from fastdistill.objectives.score_distillation import backward_simulation, draw_course
from fastdistill.ops import log_snr_bin


class DegradationPath(Protocol):
    """The kept networks of a degradation: node 0 is the teacher, the last is nearest the student.

    `fastdistill.engine.nodes.NodeFolder` keeps them in a run's folder.
    """

    @property
    def last(self) -> int:
        """Number of the last node."""

    def load_(self, number: int, network: nn.Module) -> None:
        """Write a node's weights into a network of its kind, in place.

        Raises:
            ValueError: for a node that is damaged, or of another network.
        """


@runtime_checkable
class PathNetworks(Networks, Protocol):
    """Networks that know the path which the stage before has made."""

    @property
    def path(self) -> DegradationPath | None:
        """The path; None where no step will be taken, as in a plan."""


class BacktrackingMethod(DistributionMatchingMethod):
    """DisBack (arXiv 2408.15991): distribution matching along the path back to the teacher."""

    name: Literal["backtracking"]  # type: ignore[assignment]
    """backtracking: DisBack; the teacher is approached over the nodes of `degradation`."""
    interval: PositiveInt | None = None
    """Steps for which each node is the target; the teacher is for the rest. null spends half of the
    training on the nodes."""
    gan_features: Literal["teacher", "critic"] = "critic"
    """Whose features the discriminator reads; the teacher's change with every node."""
    gan_weight: float = Field(default=0.0, ge=0)
    """Weight of the GAN term in the student's loss (mean-reduction convention)."""

    @model_validator(mode="after")
    def _nodes_have_no_stand_in(self) -> BacktrackingMethod:
        if self.stand_in is not None:
            raise ValueError("stand_in is fitted to the teacher, and not to the nodes before it")
        return self

    def steps_per_node(self, last: int, steps: int) -> int:
        """Steps for which each of the nodes ``last - 1``, ..., 1 is the target.

        Raises:
            ValueError: where the training ends before it comes to the teacher.
        """
        between = last - 1
        interval = self.interval or max(steps // (2 * max(between, 1)), 1)
        if between * interval >= steps:
            raise ValueError(
                f"{between} nodes between student and teacher for {interval} steps each leave "
                f"none of training.steps, {steps}, for the teacher; lower objective.interval or "
                "degradation.nodes, or train longer"
            )
        return interval

    def build(self, networks: Networks) -> Backtracking:
        if not isinstance(networks, PathNetworks):
            raise ValueError(
                "objective backtracking has a stage of its own before the distillation, which "
                "`fastdistill train` runs; here, give an Objective: Backtracking with a path"
            )
        parts, path = self.parts(networks), networks.path
        if path is None:
            return Backtracking(**parts, path=None, interval=1)
        path.load_(path.last, parts["critic"].network)
        interval = self.steps_per_node(path.last, networks.training.steps)
        return Backtracking(**parts, path=path, interval=interval)


class Degradation(Objective):
    """Denoising score matching of ``student``, a copy of the teacher, on a generator's samples.

    Args:
        student: the denoiser that is trained, and becomes the nodes.
        generator: the initial student, which stays as it is.
        student_times: the generator's times from the noisiest on.
        law: law of the training times.
    """

    def __init__(
        self,
        student: Denoiser,
        generator: Denoiser,
        student_times: Sequence[float],
        law: TimestepLaw,
    ) -> None:
        super().__init__()
        self.student = student
        self.student_times = list(student_times)
        self.law = law
        self._generator = (generator.requires_grad_(False).eval(),)  # a tuple: not registered

    def networks(self) -> dict[str, Denoiser]:
        return {**super().networks(), "generator": self._generator[0]}

    def course(self, noise: Noise) -> int:
        return draw_course(noise, self.student_times)

    def generate(self, batch: Batch) -> Tensor:
        """The generator's samples, without a graph  # [B, ...]"""
        course = self.course(batch.noise)
        return backward_simulation(self._generator[0], self.student_times, course, batch).detach()

    def student_update(self, batch: Batch, sample: Tensor) -> Update:
        space = self.student.parametrisation
        pair, loss, level = denoising_update(
            self.student, batch, sample, self.law, space, "degradation"
        )
        bins = log_snr_bin(level.alpha, level.sigma, self.noise_bins, *self.log_snr_range)
        return Update([pair], {"loss": loss}, bins, ("loss",))


class Backtracking(DistributionMatching):
    """Distribution matching whose frozen teacher is one node of a path after the other.

    Weights are replaced in place, in the teacher's own dtype: node 0 leaves it bit for bit what it
    was, and a CUDA graph that reads it stays valid.

    Args:
        *networks: as `DistributionMatching` takes them. The critic starts as the last node; neither
            it nor the student may share weights with the teacher.
        path: where the nodes are; None for an objective that takes no step.
        interval: steps for which each node is the target.
        **options: as `DistributionMatching` takes them.

    Raises:
        ValueError: for networks that share weights with the teacher.
    """

    def __init__(
        self, *networks: Any, path: DegradationPath | None, interval: int, **options: Any
    ) -> None:
        super().__init__(*networks, **options)
        self.path, self.interval = path, interval
        self._held = 0
        own = set(map(id, self.teacher.parameters()))
        for role, denoiser in (("student", self.student), ("critic", self.critic)):
            shared = own & set(map(id, denoiser.parameters()))
            if shared or getattr(denoiser.network, "base", None) is self.teacher.network:
                raise ValueError(
                    f"the {role} shares weights with the teacher, whose weights are replaced as "
                    "backtracking goes; give it weights of its own"
                )

    def target(self, step: int) -> int:
        """Number of the node that the student is matched to at a step."""
        if self.path is None:
            raise ValueError("this objective has no degradation path, so that it takes no step")
        return max(self.path.last - 1 - step // self.interval, 0)

    def before_step(self, step: int) -> None:
        """Put this step's node in the teacher's place, where it is not there yet."""
        super().before_step(step)
        number = self.target(step)
        if number != self._held:
            assert self.path is not None
            self.path.load_(number, self.teacher.network)
            self._held = number
