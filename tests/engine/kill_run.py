"""Runs the digits recipe in child processes that are killed at random moments, then to its end.

    python tests/engine/kill_run.py FOLDER KILLS SECONDS SEED [OVERRIDE ...]

This process only imports, so that it can fork cheaply; every child resumes the run in FOLDER (or
starts it), and is killed after a random time of SECONDS / KILLS on average, SECONDS being about
what the uninterrupted run takes.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import fastdistill.engine.job
import fastdistill.evaluate
from fastdistill.config import load_recipe


def work(folder: Path, overrides: list[str]) -> None:
    job = fastdistill.engine.job.Job
    if (folder / "recipe.yaml").exists():
        job.open(folder, lambda line: None).run()
    else:
        job.create(folder, load_recipe("digits", overrides), lambda line: None).run()


def main() -> None:
    folder, kills, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    generator, overrides = random.Random(sys.argv[4]), sys.argv[5:]
    killed = 0
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            work(folder, overrides)
            os._exit(0)
        time.sleep(generator.uniform(0, 2 * seconds / kills))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        found = sorted(path.name for path in (folder / "checkpoints").glob("*-*"))
        print(f"kill {killed}: {', '.join(found) or 'no checkpoint yet'}", flush=True)
    work(folder, overrides)
    print(f"killed {killed} times", flush=True)


if __name__ == "__main__":
    main()
