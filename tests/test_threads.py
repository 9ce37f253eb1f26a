from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from carv_attrib.threads import in_background, in_order


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_results_come_in_order_however_long_each_takes(num_workers: int) -> None:
    def slow_if_even(item: int) -> int:
        time.sleep(0.02 * (item % 2 == 0))
        return item * item

    assert list(in_order(slow_if_even, range(9), num_workers)) == [item * item for item in range(9)]


def test_threads_work_at_once() -> None:
    both = threading.Barrier(2, timeout=10)  # passed only if two threads wait at it together
    assert len(list(in_order(lambda item: both.wait(), range(2), 2))) == 2


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_no_more_is_made_ahead_than_there_are_threads(num_workers: int) -> None:
    begun: list[int] = []
    with closing(in_order(begun.append, range(100), num_workers)) as results:
        for taken in range(1, 5):
            next(results)
            time.sleep(0.02)
            assert len(begun) <= taken + num_workers
    assert len(begun) <= 4 + num_workers


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_an_error_is_raised_in_the_place_of_its_result(num_workers: int) -> None:
    results = in_order(lambda item: 1 // item, [1, 1, 0, 1], num_workers)
    assert [next(results), next(results)] == [1, 1]
    with pytest.raises(ZeroDivisionError, match="division"):
        next(results)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_threads_end_when_the_one_who_takes_is_stopped(stop: type[BaseException]) -> None:
    def use(result: int) -> None:
        raise stop

    begun: list[int] = []
    with pytest.raises(stop), closing(in_order(begun.append, range(1000), 2)) as results:
        use(next(results))  # the fixture sees that the threads are gone
    assert len(begun) <= 3


def test_a_call_in_the_background_waits_for_the_one_before_and_the_end_for_the_last() -> None:
    active, most, done = [], [0], []

    def write(item: int) -> None:
        active.append(item)
        most[0] = max(most[0], len(active))
        time.sleep(0.02)
        active.remove(item)
        done.append(item)

    with in_background(write) as start:
        for item in range(4):
            start(item)
            assert len(done) >= item - 1  # at most one is being written while another is made
    assert (most, done) == ([1], [0, 1, 2, 3])


def full(item: int) -> None:
    raise OSError(28, "No space left on device")


def test_an_error_in_the_background_is_raised_by_the_next_call_once() -> None:
    calls = []

    def work() -> None:
        with in_background(full) as start:
            for item in range(5):
                calls.append(item)
                start(item)

    with pytest.raises(OSError, match="No space left") as caught:
        work()
    assert calls == [0, 1]
    assert caught.value.__context__ is None


def test_an_error_of_the_last_call_is_raised_at_the_end() -> None:
    with pytest.raises(OSError, match="No space left"), in_background(full) as start:
        start(0)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_what_is_being_written_is_finished_when_the_block_is_stopped(stop: type[BaseException]) -> None:
    done = []

    def write() -> None:
        time.sleep(0.05)
        done.append(True)

    def work() -> None:
        with in_background(write) as start:
            start()
            raise stop

    with pytest.raises(stop):
        work()
    assert done == [True]


def test_an_error_of_a_write_is_not_hidden_by_a_later_one() -> None:
    def work() -> None:
        with in_background(full) as start:
            start(0)
            raise RuntimeError("later")

    with pytest.raises(OSError, match="No space left") as caught:
        work()
    assert str(caught.value.__context__) == "later"
