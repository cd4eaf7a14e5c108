"""Runs small jobs by the command line, once to their end and once killed and resumed.

    python tests/engine/kill_jobs.py kills FOLDER RECIPE ...
    python tests/engine/kill_jobs.py modes FOLDER

``kills`` leaves FOLDER/RECIPE/whole and FOLDER/RECIPE/killed; ``modes`` leaves FOLDER/alone, and
what each mode made after it was killed and continued over other processes. This process only
imports, so that it can fork cheaply: every child is one rank of a command, and some send themselves
SIGKILL in the middle of a run.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path
from typing import NamedTuple

from small_jobs import overrides

from fastdistill import cli
from fastdistill.engine.trainer import Trainer


class Death(NamedTuple):
    """When a rank is killed."""

    stage: str
    step: int
    rank: int = 0


DEATHS = {
    "sdxl_dmd2_1step": [Death("warmup", 3), Death("distill", 3), Death("distill", 5)],
}
"""Moments at which a run is killed, one after the other; once in the distillation by default."""


def command(*arguments: str, death: Death | None = None, ranks: int = 0) -> list[int]:
    """The status with which each rank of a command ends, minus nine where it was killed.

    Args:
        arguments: those of the command line.
        death: when one rank is killed.
        ranks: processes, as torchrun would start them; one without torchrun if 0.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks or 1):
        child = os.fork()
        if child == 0:
            if ranks:
                os.environ |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            _work(arguments, death if death and death.rank == rank else None)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _work(arguments: tuple[str, ...], death: Death | None) -> None:
    update = Trainer.update

    def deadly(trainer: Trainer) -> None:
        update(trainer)
        if death is not None and (trainer.stage, trainer.step) == (death.stage, death.step):
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer.update = deadly
    sys.argv = ["fastdistill", *arguments]
    code = 1
    try:
        cli.main()
    except SystemExit as request:
        code = int(request.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def kills(folder: Path, names: list[str]) -> None:
    for name in names:
        settings = [*overrides(name, folder), "training.sample_every=null"]
        whole, killed = (str(folder / name / kind) for kind in ("whole", "killed"))
        assert command("train", name, *settings, "-o", whole) == [0]
        for number, death in enumerate(DEATHS.get(name, [Death("distill", 3)])):
            action = ["resume", killed] if number else ["train", name, *settings, "-o", killed]
            assert command(*action, death=death) == [-signal.SIGKILL], death
        assert command("resume", killed) == [0]


MODES = {
    "resident": (4, 2, "resident"),
    "fsdp": (4, 1, "single"),
    "single": (1, 2, "fsdp"),
}
"""Ranks that are killed in a mode, and ranks and mode that continue."""

# Adam's epsilon makes small gradients' signs, which ranks round otherwise, not matter.
_STEADY = [f"{part}.eps=1.0e-3" for part in ("training.student", "training.critic")]
_SETTINGS = [
    *_STEADY,
    "training.discriminator.eps=1.0e-3",
    "training.sample_every=null",
    "training.steps=4",
    "evaluation={samples: 2, samples_during_training: 2}",
    "parallel.largest_unit=30000",
    "parallel.timeout=60",
]


def modes(folder: Path) -> None:
    name = "sdxl_dmd2_4step"
    settings = [*overrides(name, folder), *_SETTINGS]
    assert command("train", name, *settings, "-o", str(folder / "alone")) == [0]
    for mode, (before, after, continued) in MODES.items():
        run, ranks = str(folder / mode), before if before > 1 else 0
        death = Death("distill", 3, before - 1)
        chosen = [*settings, f"parallel.mode={mode}", "-o", run]
        ends = command("train", name, *chosen, death=death, ranks=ranks)
        assert ends == [*[1] * (before - 1), -signal.SIGKILL], (mode, ends)
        ranks = after if after > 1 else 0
        ends = command("resume", run, f"parallel.mode={continued}", ranks=ranks)
        assert ends == [0] * after, (mode, ends)


def low_rank(folder: Path) -> None:
    """LoRA student and critic, whose base is the teacher's, alone and over two sharded ranks."""
    settings = [*overrides("dit_xl2_256", folder), *_STEADY, *_LOW_RANK]
    for kind, ranks in (("alone", 0), ("fsdp", 2)):
        run = str(folder / f"low-rank-{kind}")
        assert set(command("train", "dit_xl2_256", *settings, "-o", run, ranks=ranks)) == {0}


_LOW_RANK = [
    "model.student_lora=2",
    "model.critic_lora=2",
    "training.precision=bfloat16",
    "training.sample_every=null",
    "parallel.largest_unit=4000",
]


if __name__ == "__main__":
    if sys.argv[1] == "kills":
        kills(Path(sys.argv[2]), sys.argv[3:])
    else:
        modes(Path(sys.argv[2]))
        low_rank(Path(sys.argv[2]))
