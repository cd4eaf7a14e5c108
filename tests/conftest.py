"""Every test sees NaN in uninitialised memory, one thread, and Triton's interpreter.

One thread, and threads that sleep while they wait, since a busy machine with two cores crawls where
two threads spin for each other; tests of threading ask for two themselves.

The interpreter is chosen when `@triton.jit` runs, so the variable is set before any kernel is
imported; `tests/kernels/test_ahead_of_time.py` compiles in processes of its own.

`bench` is imported from the checkout: it is not part of the package.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

torch.set_num_threads(1)
# Besides choosing deterministic algorithms this fills what torch.empty and its kin return with NaN,
# in C++ too, so that an output that a kernel leaves unwritten shows.
torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture
def reference_backend():
    """Run every op of the test on the reference."""
    from fastdistill.ops import use_backend

    with use_backend("reference"):
        yield
