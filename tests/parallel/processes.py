"""Runs a function in several gloo processes, cheaply, and brings home what it returned or raised.

    values = run_ranks(4, function, argument)        # function(ranks, argument) on each of 4 ranks

The function is importable (at the top level of a test file) and takes a `Ranks` first. Processes
are forked from a server that has imported torch once. They end by ``os._exit``, since gloo's
teardown aborts now and then. The store that they meet in is the caller's, as under ``torchrun``.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed.tensor", "fastdistill.parallel"])


class Outcome(NamedTuple):
    """How one rank ended."""

    value: Any = None
    error: str | None = None
    """A traceback, or what ended the process without one."""
    aborted: bool = False
    """Whether it ended itself by a signal."""


class RunningRanks:
    """Started processes, for tests that harm them; `run_ranks` is for all others.

    Args:
        size: number of processes.
        function: called on each with its `Ranks` and ``args``.
        args: what can be pickled.
        patience: seconds that a rank waits for the others (`Ranks.start`).
        own_store: let rank 0 keep the store, as without torchrun.
    """

    def __init__(
        self,
        size: int,
        function: Callable[..., Any],
        *args: Any,
        patience: float = 60.0,
        own_store: bool = False,
    ) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = self._store.port
        if own_store:
            del self._store
        self._ends: list[Connection] = []
        self.processes = []
        for rank in range(size):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_USE_AGENT_STORE": str(not own_store),
            }
            mine, theirs = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_work, args=(theirs, environment, patience, function, args), daemon=True
            )
            process.start()
            theirs.close()
            self._ends.append(mine)
            self.processes.append(process)

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank."""
        os.kill(self.processes[rank].pid, number)

    def outcomes(
        self, timeout: float, grace: float | None = None, lost: int | None = None
    ) -> list[Outcome]:
        """Wait for all ranks; those that are left after ``timeout`` seconds are killed.

        Args:
            timeout: seconds for all.
            grace: seconds that the others have after one failed; all of them by default.
            lost: a rank that is not waited for.
        """
        deadline = time.monotonic() + timeout
        outcomes: dict[int, Outcome] = {}
        left = {end: rank for rank, end in enumerate(self._ends)}
        while set(left.values()) - {lost}:
            ready = wait(list(left), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for end in ready:
                rank = left.pop(end)
                outcomes[rank] = self._receive(end, rank)
                if outcomes[rank].error is not None and grace is not None:
                    deadline = min(deadline, time.monotonic() + grace)
        for rank in left.values():
            self.processes[rank].kill()
            outcomes[rank] = Outcome(error="was still running, and was killed")
        for process in self.processes:
            process.join()
        return [outcomes[rank] for rank in range(len(self.processes))]

    def _receive(self, end: Connection, rank: int) -> Outcome:
        try:
            return Outcome(*pickle.loads(end.recv_bytes()))
        except EOFError:
            self.processes[rank].join()
            code = self.processes[rank].exitcode
            aborted = code in (-signal.SIGABRT, -signal.SIGSEGV)
            return Outcome(error=f"ended with exit code {code}", aborted=aborted)


def run_ranks(size: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list:
    """Call ``function(ranks, *args)`` in ``size`` gloo processes.

    gloo very rarely aborts a process in its own allocations (the same ranks are clean under an
    address sanitizer): where a rank aborts, all are started once more, with a warning.

    Args:
        size: number of processes.
        function: an importable function.
        args: what can be pickled.
        timeout: seconds for all of it; ten after one failed.

    Returns:
        What each rank returned, in their order.

    Raises:
        AssertionError: with the traceback of every rank that failed.
    """
    outcomes = RunningRanks(size, function, *args).outcomes(timeout, grace=10)
    if any(end.aborted for end in outcomes):
        warnings.warn(f"a rank of {function.__name__} aborted, and all began anew", stacklevel=2)
        outcomes = RunningRanks(size, function, *args).outcomes(timeout, grace=10)
    errors = [f"rank {k}: {end.error}" for k, end in enumerate(outcomes) if end.error is not None]
    assert not errors, "\n".join(errors)
    return [end.value for end in outcomes]


def _work(
    end: Connection,
    environment: dict[str, str],
    patience: float,
    function: Callable[..., Any],
    args: tuple,
) -> None:
    """A child: everything that it has to say goes through its pipe."""
    import torch

    from fastdistill.parallel import Ranks

    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is filled with NaN
    try:
        ranks = Ranks.start("cpu", timeout=patience)
        value = function(ranks, *args)
        ranks.barrier()
        answer = pickle.dumps((value, None))
    except BaseException:
        answer = pickle.dumps((None, traceback.format_exc()))
    end.send_bytes(answer)
    end.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
