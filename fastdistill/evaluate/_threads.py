"""One CPU thread for small matrices.

Threads meet at spinning barriers. On a machine whose two cores are busy, one `evaluate_samples` of
1,797 digits took 0.4 s on one thread and 1.3 to 14 s on two, most of it in 64 x 64
eigendecompositions. One thread also makes the result independent of their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL_WIDTH = 256
SMALL_SET = 2**19


@contextmanager
def one_thread(when: bool = True) -> Iterator[None]:
    """Run torch's CPU kernels on one thread, and put the caller's number back on leaving."""
    threads = torch.get_num_threads()
    if when:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if when:
            torch.set_num_threads(threads)
