"""Work beside the network: threads that read ahead of it and write behind it, with every error in its place."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
P = ParamSpec("P")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], num_workers: int
) -> Generator[Result, None, None]:
    """Yield `function(item)` for every item, in order, computed ahead by threads; without threads when asked for.

    At most `num_workers` results are made ahead of the one that is in use. An error is raised in the place of its
    result. Close the generator to end the threads early: what has not begun is dropped.
    """
    if not num_workers:
        yield from map(function, items)
        return
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="carv-read")
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def in_background(function: Callable[P, None]) -> Iterator[Callable[P, None]]:
    """Yield `function` as one that returns at once while a thread does the work, one call at a time.

    A call first waits for the one before, and raises its error, if any; the end of the block does the same. So the
    block ends as it would without a thread: where a call fails and a later error ends the block, the call's error is
    raised, from within the other.
    """
    pending: deque[Future[None]] = deque()

    def start(*args: P.args, **kwargs: P.kwargs) -> None:
        while pending:
            pending.popleft().result()
        pending.append(pool.submit(function, *args, **kwargs))

    with ThreadPoolExecutor(1, thread_name_prefix="carv-write") as pool:
        try:
            yield start
        finally:
            while pending:
                pending.popleft().result()
