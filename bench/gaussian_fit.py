"""Time and memory of fitting a Gaussian to a stream: `python -m bench.gaussian_fit`."""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from fastdistill.gaussian import Gaussian, fit_gaussian
from fastdistill.gaussian.fit import MOST_EXACT_BYTES

HIDDEN = 400


def stream(count: int, dimensions: int, batch: int) -> Iterator[Tensor]:
    """Vectors whose spectrum falls as 1 / k over 400 directions, upon white noise  # [B, d]"""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(HIDDEN, dimensions, generator=generator) / dimensions**0.5
    mix *= torch.arange(1, HIDDEN + 1)[:, None] ** -0.5 * 30
    for first in range(0, count, batch):
        n = min(batch, count - first)
        z = torch.randn(n, HIDDEN, generator=generator)
        yield 0.1 + z @ mix + 0.05 * torch.randn(n, dimensions, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--dimensions", type=int, default=12_288)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sketch", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    start = time.perf_counter()
    for _ in stream(given.count, given.dimensions, given.batch):
        pass
    making = time.perf_counter() - start
    start = time.perf_counter()
    gaussian = fit_gaussian(
        stream(given.count, given.dimensions, given.batch),
        given.rank,
        exact_bytes=0 if given.sketch else MOST_EXACT_BYTES,
    )
    assert isinstance(gaussian, Gaussian)
    print(
        json.dumps(
            vars(given)
            | {
                "seconds_making_the_vectors": round(making, 1),
                "seconds_in_all": round(time.perf_counter() - start, 1),
                "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
                "rank_found": gaussian.rank,
                "left_out": gaussian.fit.left_out[-1],
                "sketch_error": gaussian.fit.sketch_error,
                "variances": [round(value, 6) for value in gaussian.variances[::85].tolist()],
            }
        )
    )


if __name__ == "__main__":
    main()
