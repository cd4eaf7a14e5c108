"""`Timer`: how long calls take, on a CPU by the clock and on a GPU by CUDA events."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

# Without it every trace writes two lines to stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_STATISTICS = Path("/proc/stat")


class Timer(Protocol):
    """The one interface of both clocks."""

    device: torch.device
    seconds: float
    """Time that a variant is given, of which a busy machine needs more."""
    shortest: float
    """Seconds that a sample must take for the clock to be exact."""
    cache_bytes: int
    """Size of the last-level cache."""
    rotation_bytes: int
    """Size of the buffers that outrun that cache."""
    memory_bytes: int
    """Most bytes that all sets of inputs may take."""
    captures: bool
    """Whether `capture` makes CUDA graphs."""

    def elapsed(self, run: Callable[[], Any]) -> float:
        """Seconds that one call of ``run`` takes."""

    def cpu(self, run: Callable[[], Any], elapsed: float) -> float:
        """CPU seconds of a call that takes ``elapsed``: to enqueue it, or of all threads."""

    def peak_bytes(self, run: Callable[[], Any]) -> int:
        """Most bytes allocated at once during one call, beyond those held before it."""

    def capture(self, runs: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
        """One CUDA graph of all ``runs`` in order."""


class CpuTimer:
    """`time.perf_counter` round the call."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.seconds, self.shortest = 0.25, 1e-4
        self.cache_bytes = _last_level_cache()
        self.rotation_bytes = 6 * self.cache_bytes  # virtual machines may hide some
        self.memory_bytes = 2**30
        self.captures = False
        _keep_freed_memory()

    def elapsed(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def cpu(self, run: Callable[[], Any], elapsed: float) -> float:
        """``elapsed`` times the cores that many calls keep busy: the system tells in ticks."""
        begin, start = time.process_time(), time.perf_counter()
        run()
        while time.perf_counter() - start < 0.05:
            run()
        return elapsed * (time.process_time() - begin) / (time.perf_counter() - start)

    def peak_bytes(self, run: Callable[[], Any]) -> int:
        """As on a GPU, from the allocations and releases in a trace of torch's profiler."""
        run()
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            kept = run()
        del kept
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        changes = [event for event in events if event["name"] == "[memory]"]
        held = peak = 0
        for event in sorted(changes, key=lambda event: event["ts"]):
            held += event["args"]["Bytes"]
            peak = max(peak, held)
        return peak

    def capture(self, runs: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
        raise NotImplementedError("a CPU has no CUDA graphs")


class CudaTimer:
    """CUDA events behind a backlog: the GPU sleeps until all calls are enqueued.

    So the events see the GPU's own time, without the gaps between launches.
    """

    _CYCLES_PER_SECOND = 2e9

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        self.device = device
        self.seconds, self.shortest = 0.1, 2e-4
        self.cache_bytes = properties.L2_cache_size
        self.rotation_bytes = 6 * self.cache_bytes  # virtual machines may hide some
        self.memory_bytes = min(properties.total_memory // 8, 8 * 2**30)
        self.captures = True
        self._backlog: WeakKeyDictionary[Callable[[], Any], float] = WeakKeyDictionary()
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def elapsed(self, run: Callable[[], Any]) -> float:
        start, end = self._events
        torch.cuda.synchronize()
        torch.cuda._sleep(int(self._backlog.get(run, 1e-3) * self._CYCLES_PER_SECOND))
        before = time.perf_counter()
        start.record()
        run()
        end.record()
        # Next time the GPU sleeps for longer than this took to enqueue, within reason.
        self._backlog[run] = min(1.5 * (time.perf_counter() - before) + 1e-4, 2e-2)
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def cpu(self, run: Callable[[], Any], elapsed: float) -> float:
        return statistics.median(self._enqueue(run) for _ in range(15))

    def _enqueue(self, run: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def peak_bytes(self, run: Callable[[], Any]) -> int:
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = run()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before

    def capture(self, runs: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for run in runs[:3]:
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for run in runs:
                run()
        return graph.replay


class Bystanders:
    """What other programs take of the CPU from now on; a busy machine has no times to report."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        """CPU seconds of everybody else, and seconds of all cores; zeros where nobody tells."""
        if not _STATISTICS.exists():
            return 0.0, 0.0
        user, nice, system, _, _, *interrupts = map(int, _STATISTICS.read_text().split()[1:9])
        busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
        return busy - time.process_time(), time.perf_counter() * (os.cpu_count() or 1)

    def share(self) -> float:
        """Their share of all cores since this began, from 0 to 1."""
        others, whole = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return min(max(others / whole, 0.0), 1.0) if whole else 0.0


def timer_for(device: torch.device) -> Timer:
    """The clock of a device."""
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


@functools.cache
def _keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next allocation, as a GPU's caching allocator does.

    Otherwise it gives large blocks back to the system, now and then, and what is then timed are the
    page faults of rivals with many temporaries.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_mmap_max = -1, -4
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_mmap_max, 0)


@functools.cache
def _last_level_cache() -> int:
    """Bytes of the largest cache that the system tells of; 32 MiB where it tells of none."""
    sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    found = [re.fullmatch(r"(\d+)([KM])", size) for size in sizes]
    units = {"K": 2**10, "M": 2**20}
    return max((int(m[1]) * units[m[2]] for m in found if m), default=32 * 2**20)
