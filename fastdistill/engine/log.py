"""`RunLog`: one row to the JSON-lines files, to TensorBoard and to the screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastdistill.config import TrainingSettings
from fastdistill.engine.metrics import JSONLines

METRICS, TIMINGS = "metrics.jsonl", "timings.jsonl"

_SHOWN = {
    "student/loss": "loss",
    "student/score_gap": "gap",
    "critic/loss": "critic",
    "critic/discriminator_accuracy": "D accuracy",
    "student/effective_sample_size": "ESS",
}
_SCORED = {
    "frechet_pixel": "Frechet distance of pixels",
    "frechet_features": "of features",
    "vendi": "Vendi score",
    "reverse_kl": "KL(student|truth)",
    "forward_kl": "KL(truth|student)",
    "fitted_reverse_kl": "fitted KL(student|truth)",
    "fitted_forward_kl": "fitted KL(truth|student)",
    "modes_covered": "modes covered",
}


class RunLog:
    """Everything that a run writes as it goes.

    Args:
        folder: the run's folder.
        say: called with each line for the screen.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self._metrics = JSONLines(folder / METRICS)
        self._timings = JSONLines(folder / TIMINGS)
        self._throughput = Throughput(0, 0)
        self._boards: dict[str, Any] = {}

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()
        self._timings.close()
        for board in self._boards.values():
            board.close()

    def begin(self, stage: str, settings: TrainingSettings) -> None:
        """Start the clock of a stage."""
        images = settings.batch_size * settings.accumulation
        self._throughput = Throughput(images, settings.steps)

    def restart(self, length: int, step: int = 0) -> None:
        """Drop the metrics that were written after the checkpoint that is resumed from."""
        self._metrics.truncate(length)
        self._throughput.skip_to(step)

    def commit(self) -> dict[str, Any]:
        """Force the metrics to the disk; what `restart` needs to come back to this moment."""
        return {"metrics_bytes": self._metrics.commit()}

    def write(self, row: Mapping[str, Any], memory: float) -> None:
        """One log point: a row of metrics, and a line with speed, memory (GiB) and time left."""
        self._metrics.write(row)
        stage, step = row["stage"], row["step"]
        rate, left = self._throughput.read(step)
        timing = {"images_per_second": rate, "memory_gib": memory, "seconds_left": left}
        self._timings.write({"stage": stage, "step": step} | timing)
        self._to_board(dict(row) | {f"timing/{name}": value for name, value in timing.items()})
        shown = "  ".join(f"{label} {row[key]:.4g}" for key, label in _SHOWN.items() if key in row)
        self.say(
            f"{stage:>8} {step:>6}/{self._throughput.steps}  {rate:>7,.0f} img/s  "
            f"{memory:.2f} GiB  {left:>4.0f} s left  {shown}"
        )

    def write_scores(self, stage: str, step: int, scores: Mapping[str, float]) -> None:
        """Evaluation of the averaged student during training."""
        named = {f"evaluation/{name}": value for name, value in scores.items()}
        row = {"stage": stage, "step": step} | named
        self._metrics.write(row)
        self._to_board(row)
        shown = ", ".join(
            f"{label} {scores[key]:.4g}" for key, label in _SCORED.items() if key in scores
        )
        self.say(f"{stage:>8} {step:>6}  {shown}")

    def _to_board(self, row: Mapping[str, Any]) -> None:
        """Numbers as TensorBoard scalars, one board a stage, so that steps do not mix."""
        stage, step = row["stage"], row["step"]
        if stage not in self._boards:
            from torch.utils.tensorboard import SummaryWriter

            path = self.folder / "tensorboard" / stage
            self._boards[stage] = SummaryWriter(str(path), purge_step=step)
        for name, value in row.items():
            if isinstance(value, float):
                self._boards[stage].add_scalar(name, value, step)


class Throughput:
    """Images a second and seconds left, by the host's clock between log points."""

    def __init__(self, batch: int, steps: int) -> None:
        self.batch, self.steps = batch, steps
        self._time, self._step = time.monotonic(), 0

    def skip_to(self, step: int) -> None:
        """Start counting at a step that was done in an earlier process."""
        self._time, self._step = time.monotonic(), step

    def read(self, step: int) -> tuple[float, float]:
        """(images a second since the last call, seconds left at that rate)."""
        now = time.monotonic()
        rate = max(step - self._step, 1) / max(now - self._time, 1e-9)
        self._time, self._step = now, step
        return rate * self.batch, (self.steps - step) / rate
