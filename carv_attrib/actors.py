"""Work on Ray actors, on one machine or a cluster: in any order, no faster than it is taken, a lost actor replaced."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

from carv_attrib.errors import CarvError

Item = TypeVar("Item")
Result = TypeVar("Result")

RESTARTS = 3
"""How often one actor is replaced, and one item is tried again, before the run stops."""


def on_actors(
    make_work: Callable[[], Callable[[Item], Result]], items: Iterable[Item], num_workers: int | None, *, gpu: bool
) -> Generator[tuple[Item, Result], None, None]:
    """Yield every item with what the work on it returns, as they are done.

    An actor has one item at a time, and gets the next when its result is taken: nothing piles up.

    Args:
        make_work: called once in each actor; what it returns is called with items. Both must be picklable.
        items: to work on.
        num_workers: actors; None: one for each GPU of the cluster, or for each CPU.
        gpu: whether an actor has a GPU for itself, where the cluster has some.

    Raises:
        CarvError: if Ray is not installed, or actors are lost again and again.
        Exception: what the work raised, as it was.
    """
    try:
        import ray
    except ImportError as err:
        raise CarvError("`engine` ray needs Ray; run `pip install 'carv-attrib[ray]'`.") from err
    started = not ray.is_initialized()
    if started:
        ray.init(
            address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, include_dashboard=False, logging_level="ERROR"
        )
    try:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if gpu else 0
        cpus = max(1, int(resources.get("CPU", 1)))
        num_workers = num_workers or gpus or cpus
        options: dict[str, Any] = {"num_gpus": min(1.0, gpus / num_workers)} if gpus else {}
        actor = ray.remote(max_restarts=RESTARTS, max_task_retries=RESTARTS, num_cpus=0, **options)(_Actor)
        kept = ray.put(make_work)  # while actors may have to be made again
        idle = [actor.remote(kept, max(1, cpus // num_workers)) for _ in range(num_workers)]
        waiting, busy = iter(items), {}
        while True:
            while idle and (item := next(waiting, None)) is not None:
                worker = idle.pop()
                busy[worker.work.remote(item)] = worker, item
            if not busy:
                return
            (done, *_), _ = ray.wait(list(busy))
            worker, item = busy.pop(done)
            idle.append(worker)
            yield item, ray.get(done)
    except ray.exceptions.RayTaskError as err:
        raise err.cause from None
    except ray.exceptions.RayError as err:
        raise CarvError(
            f"Ray lost a worker {RESTARTS + 1} times over ({type(err).__name__}), perhaps for want of memory; what is "
            "done is kept: run the same again with fewer workers."
        ) from err
    finally:
        if started:
            ray.shutdown()


class _Actor:
    """What runs in an actor."""

    def __init__(self, make_work: Callable[[], Callable[[Any], Any]], num_threads: int) -> None:
        import torch

        torch.set_num_threads(num_threads)
        self._work = make_work()

    def work(self, item: Any) -> Any:
        """Return what the work on an item returns."""
        return self._work(item)
