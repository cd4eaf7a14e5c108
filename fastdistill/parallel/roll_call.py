"""`RollCall` finds out which processes of a run still live, whatever they are busy with."""

from __future__ import annotations

import contextlib
import threading
import time

import torch.distributed as dist

_PAUSE = 0.5  # seconds between two looks at the store
_PATIENCE = 3.0  # seconds that a living process has to answer, on a machine that others keep busy


class RollCall:
    """A thread that answers when any rank calls, also while its own rank waits in a collective.

    Args:
        store: what all ranks can reach; its client is used by this thread too.
        rank: this process.
        size: number of processes.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store = dist.PrefixStore("roll-call", store)
        self._rank, self._size = rank, size
        self._missing: list[int] | None = None
        self._wanted, self._closed, self._done = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(target=self._listen, name="roll-call", daemon=True)
        self._thread.start()

    def missing(self) -> list[int] | None:
        """Ranks that do not answer, after a few seconds; None where the store does not either."""
        self._wanted.set()
        self._done.wait(_PATIENCE + 3 * _PAUSE)
        return self._missing

    def close(self) -> None:
        """Stop answering."""
        self._closed.set()
        self._wanted.set()
        self._thread.join(_PATIENCE)

    def _listen(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store went with its process
            while not self._wanted.wait(_PAUSE) and not self._store.check(["called"]):
                pass
            if not self._closed.is_set():
                self._call()
        self._done.set()

    def _call(self) -> None:
        self._store.set("called", "")
        self._store.set(str(self._rank), "")
        deadline = time.monotonic() + _PAUSE + _PATIENCE
        missing = list(range(self._size))
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not self._store.check([str(rank)])]
            self._missing = missing  # stands if the store goes before the time is over
            time.sleep(_PAUSE / 5)
