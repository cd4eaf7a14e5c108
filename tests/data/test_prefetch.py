"""Prefetched batches are the data set's own, made before they are asked for."""

from __future__ import annotations

import threading

import pytest
import torch

from fastdistill.data import Order, Prefetched, RealBatch


class Counting:
    """Ten samples; remembers which batches were made by which threads, and can be held up."""

    shape = (3,)

    def __init__(self) -> None:
        self.made: list[tuple[int, int]] = []
        self.threads: set[str] = set()
        self.may_work = threading.Event()
        self.may_work.set()
        self.broken_step: int | None = None
        self._order = Order(10)

    def batch(self, seed, step, count, share=slice(None)):
        self.threads.add(threading.current_thread().name.split("_")[0])
        if threading.current_thread() is not threading.main_thread():
            assert self.may_work.wait(20)
        self.made.append((seed, step))
        if step == self.broken_step:
            raise ValueError("image-7.jpg cannot be used: it is truncated")
        rows = self._order.rows(seed, step, count)[share]
        condition = {"labels": rows, "text": rows[:, None].float()}
        null = {"labels": torch.tensor([10]).expand(len(rows)), "text": condition["text"]}
        return RealBatch(rows[:, None].float().expand(-1, 3), condition, null)


@pytest.fixture
def data():
    return Counting()


def equal(one, other):
    assert torch.equal(one.samples, other.samples)
    for name in one.condition:
        assert torch.equal(one.condition[name], other.condition[name])
        assert torch.equal(one.uncondition[name], other.uncondition[name])


def test_batches_are_the_data_set_s_own(data):
    with Prefetched(data, depth=2) as prefetched:
        assert prefetched.shape == (3,)
        for step in range(20):
            equal(prefetched.batch(1, step, 4, slice(1, 3)), data.batch(1, step, 4, slice(1, 3)))
        assert (prefetched.batches, prefetched.foreseen) == (20, 19)


def test_the_next_batches_are_made_before_they_are_asked_for(data):
    with Prefetched(data, depth=3, workers=1) as prefetched:
        prefetched.batch(0, 5, 4)
        for future in list(prefetched._waiting.values()):
            future.result(20)
        assert sorted(data.made) == [(0, step) for step in (5, 6, 7, 8)]
        assert data.threads == {"MainThread", "prefetch"}
        data.may_work.clear()  # nothing more is made, and nothing more is needed:
        assert prefetched.batch(0, 6, 4).samples is not None
        assert len(data.made) == 4
        data.may_work.set()


def test_each_batch_is_made_once(data):
    with Prefetched(data, depth=3, workers=2) as prefetched:
        for step in range(12):
            prefetched.batch(0, step, 4)
    assert len(data.made) == len(set(data.made))


def test_a_call_that_was_not_foreseen_is_computed_and_disturbs_nothing(data):
    """An evaluation's batch between two of the training."""
    with Prefetched(data, depth=2) as prefetched:
        prefetched.batch(0, 0, 4)
        prefetched.batch(0, 1, 4)
        equal(prefetched.batch(9, 0, 6), data.batch(9, 0, 6))
        prefetched.batch(0, 2, 4)
        prefetched.batch(0, 3, 4)
        assert (prefetched.batches, prefetched.foreseen) == (5, 3)


def test_a_jump_to_another_step_is_followed(data):
    """As a trainer that is resumed, or one of another number of processes."""
    with Prefetched(data, depth=2) as prefetched:
        prefetched.batch(0, 0, 4)
        for step in range(70, 76):
            equal(prefetched.batch(0, step, 4), data.batch(0, step, 4))
        assert prefetched.foreseen == 4
        assert len(prefetched._waiting) == 2


def test_an_error_of_a_worker_is_raised_by_the_batch_that_needs_it(data):
    data.broken_step = 3
    with Prefetched(data, depth=2) as prefetched:
        for step in range(3):
            prefetched.batch(0, step, 4)
        with pytest.raises(ValueError, match=r"image-7.jpg cannot be used"):
            prefetched.batch(0, 3, 4)
        equal(prefetched.batch(0, 4, 4), data.batch(0, 4, 4))


def test_waiting_is_measured(data, monkeypatch):
    """A clock that advances by five seconds whenever the caller makes a batch itself."""
    clock = [0.0]
    monkeypatch.setattr("fastdistill.data.prefetch.time.perf_counter", lambda: clock[0])

    def slow(*arguments):
        if threading.current_thread() is threading.main_thread():
            clock[0] += 5
        return Counting.batch(data, *arguments)

    data.batch = slow
    with Prefetched(data, depth=2) as prefetched:
        waited = []
        for step in (0, 1, 2, 50):
            prefetched.batch(0, step, 4)
            waited.append(prefetched.waited_seconds)
    assert waited == [5, 5, 5, 10]


def test_a_null_of_one_row_stays_one_row(data):
    with Prefetched(data) as prefetched:
        batch = prefetched.batch(0, 0, 4)
    assert batch.uncondition["labels"].stride(0) == 0
    assert batch.uncondition["labels"].tolist() == [10] * 4
    with Prefetched(data, "meta") as prefetched:  # another device, on which copies have no content
        batch = prefetched.batch(0, 0, 4)
    assert batch.samples.is_meta
    assert batch.uncondition["labels"].is_meta
    assert batch.uncondition["labels"].stride(0) == 0


def test_wrong_numbers_are_refused(data):
    with pytest.raises(ValueError, match="depth is 0"):
        Prefetched(data, depth=0)
