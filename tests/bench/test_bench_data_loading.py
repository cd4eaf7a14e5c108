"""The bench of data loading runs, and counts waiting as what it is."""

from __future__ import annotations

import time

from bench import data_loading
from fastdistill.data import EncodedData, ImageData, RealBatch


class Slow:
    shape = (1,)

    def batch(self, seed, step, count, share=slice(None)):
        time.sleep(0.02)
        return RealBatch(None)


def test_a_step_that_does_nothing_else_waits_all_the_time():
    found = data_loading.run(Slow(), lambda: None, 1, 5)
    assert found.waited > 0.9
    assert found.step >= 20
    assert data_loading.run(None, lambda: None, 1, 5).waited == 0


def test_both_data_sets_are_made_and_measured(tmp_path):
    latents = data_loading.make_latents(tmp_path / "latents", 3)
    images = data_loading.make_images(tmp_path / "images", 2)
    cases = ((lambda: EncodedData(latents), latents), (lambda: ImageData(images, 64), images))
    for open_data, folder in cases:
        columns = data_loading.measure(
            open_data,
            folder,
            data_loading.waiting_step(0.001),
            batch=1,
            steps=2,
            rounds=1,
            cold=True,
        )
        assert len(columns) == data_loading.HEADER.splitlines()[0].count("|") - 4
