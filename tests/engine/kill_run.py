"""Runs a job in child processes that are killed at random moments, until one gets through.

    python kill_run.py FOLDER KILLS SEED OVERRIDE ...

This process only imports, so that it can fork cheaply; every child resumes the run in FOLDER (or
starts it). The moments are drawn between 0 and the time that the uninterrupted run took, which the
caller measured and passes in the environment as RUN_SECONDS.
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
    folder, kills, generator = Path(sys.argv[1]), int(sys.argv[2]), random.Random(sys.argv[3])
    seconds, killed = float(os.environ["RUN_SECONDS"]), 0
    while killed < kills:
        child = os.fork()
        if child == 0:
            work(folder, sys.argv[4:])
            os._exit(0)
        time.sleep(generator.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += 1
        else:  # it finished before its moment came: begin a new life from an older checkpoint
            for path in sorted((folder / "checkpoints").glob("distill-*"))[-1:]:
                (path / "manifest.json").write_text("cut")
            kills -= 1
        found = sorted(path.name for path in (folder / "checkpoints").glob("*-*"))
        print(f"kill {killed}: {found[-1] if found else 'no checkpoint yet'}", flush=True)
    work(folder, sys.argv[4:])
    print(f"killed {killed} times", flush=True)


if __name__ == "__main__":
    main()
