"""Pairs of noise and the teacher's ODE solution, made once and kept in the run's folder.

Noise is a function of the seed and the pair's number, so that only the solutions are stored: one
file for each batch of the warm-up, ``pairs/000000000.safetensors``. A file is whole or absent, and
a run that is resumed makes those that are missing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastdistill.data import Data, Order, RealBatch
from fastdistill.diffusion import Noise
from fastdistill.engine.folder import partial_name, write_tensors
from fastdistill.engine.sampling import Conditions, solve
from fastdistill.models import Denoiser
from fastdistill.parallel import Ranks

_PAIRS_STEP = 2**32 - 2
"""The step of noise that belongs to pairs."""


class PairData:
    """Pairs as samples [2, ...]: the noise, and the solution that it leads to.

    The batches that pairs were made in are visited in a new order every epoch; their conditions are
    those of the same batches of ``data``.

    Args:
        folder: where the solutions lie.
        data: gave the conditions.
        seed: seed of the run.
        size: pairs of a batch.
        batches: number of batches.
        device: where pairs are returned.
    """

    def __init__(
        self,
        folder: Path,
        data: Data,
        seed: int,
        size: int,
        batches: int,
        device: torch.device,
    ) -> None:
        self.folder, self.data, self.seed, self.size = folder, data, seed, size
        self.batches, self.device = batches, device
        self._order = Order(batches)
        self._noise = Noise(seed, device).at(_PAIRS_STEP)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, as the student makes it."""
        return self.data.shape

    def batch(self, seed: int, step: int, count: int, share: slice = slice(None)) -> RealBatch:
        number = int(self._order.rows(seed, step, 1))
        return self.read(number, share)

    def read(self, number: int, share: slice = slice(None)) -> RealBatch:
        """This rank's share of a batch that was made."""
        given = self.data.batch(self.seed, number, self.size, share)
        with safe_open(self._file(number), "pt") as file:
            solution = file.get_slice("solution")[share].to(self.device)
        pairs = torch.stack((self._start(number, share), solution), dim=1)
        return RealBatch(pairs, given.condition, given.uncondition)

    def make(
        self,
        teacher: Denoiser,
        steps: int,
        guidance_scale: float,
        ranks: Ranks,
        say: Callable[[str], None],
    ) -> None:
        """Make the batches that are missing, each rank its share of every batch.

        Args:
            teacher: whole or sharded, alike on all ranks.
            steps: Heun steps.
            guidance_scale: classifier-free guidance.
            ranks: the processes of the run.
            say: called with lines on the progress.
        """
        missing = [number for number in range(self.batches) if not self._is_whole(number)]
        missing = ranks.broadcast_object(missing)
        own = self.size // ranks.size
        share = slice(ranks.rank * own, (ranks.rank + 1) * own)
        for done, number in enumerate(missing):
            if done % max(len(missing) // 10, 1) == 0:
                say(f"  warmup: {(self.batches - len(missing) + done) * self.size} pairs made")
            given = self.data.batch(self.seed, number, self.size, share)
            conditions = Conditions(given.condition, given.uncondition)
            z = self._start(number, share)
            whole = ranks.gather(solve(teacher, steps, z, conditions, guidance_scale))
            if ranks.is_first:
                self._write(number, whole)
        ranks.barrier()

    def _start(self, number: int, share: slice) -> Tensor:
        """The noise that this rank's trajectories of a batch begin at  # [B, ...]"""
        index = torch.arange(self.size, device=self.device)[share] + number * self.size
        return self._noise.normal("pairs", index, self.shape)

    def _write(self, number: int, solution: Tensor) -> None:
        file = self._file(number)
        file.parent.mkdir(exist_ok=True)
        partial = partial_name(file)
        write_tensors(partial, {"solution": solution.cpu()})
        partial.replace(file)

    def _is_whole(self, number: int) -> bool:
        try:
            with safe_open(self._file(number), "pt") as file:
                return file.get_slice("solution").get_shape() == [self.size, *self.shape]
        except (OSError, SafetensorError):
            return False

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:09d}.safetensors"
