"""Memory of network calls: how much they take, how much is free, how many rows fit, and what to do if it runs out."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from carv_attrib.errors import ArgumentError, TeacherError

Result = TypeVar("Result")

HOST_SHARE = 0.5
"""Share of the free host memory that calls may take.

Linux promises memory that it does not have, and kills the process that uses it: no error, nothing to survive. The other
half is for other programs, pages that the allocator keeps, and buffers of libraries that no profile shows.
"""

CUDA_SHARE = 0.8
"""Share of the free CUDA memory that calls may take; the rest is for fragments, and workspaces of libraries."""

SLOWER = 1.1
"""Calls whose rows take more than this many times as long as those of smaller calls are not worth having."""

LONGEST_CALL = 30.0
"""Seconds after which a call is not tried with more rows: what it costs to start one no longer matters."""

_WAY_OUT = "use a smaller `dtype`, `gradient_checkpointing`, or another `device`"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CallCost:
    """What one network call takes.

    Attributes:
        rows: of the call.
        peak_bytes: most bytes of tensors that live at once, above those before it.
        seconds: that it takes.
    """

    rows: int
    peak_bytes: int
    seconds: float


class RowLimit:
    """How many rows network calls may have: as many as asked for until memory runs out, then half as many, for good."""

    def __init__(self) -> None:
        self.rows: int | None = None

    def run(self, work: Callable[[int], Result], rows: int) -> Result:
        """Return `work(rows)`, repeated with half the rows as often as memory runs out.

        Raises:
            TeacherError: if it runs out at one row.
        """
        while True:
            allowed = rows if self.rows is None else min(rows, self.rows)
            try:
                return work(allowed)
            except (RuntimeError, MemoryError) as err:
                if not is_out_of_memory(err):
                    raise
                if allowed == 1:
                    raise TeacherError(f"out of memory with one row for each network call; {_WAY_OUT}.") from err
            self.rows = allowed // 2  # out here, because the error's traceback held the tensors of the failed call
            free_cached_blocks()
            _log.warning(
                "out of memory: network calls have %d rows instead of %d from here on, and features differ in their "
                "last bits from those of larger calls; `--micro-batch %d` has them so from the start.",
                self.rows,
                allowed,
                self.rows,
            )


def is_out_of_memory(err: BaseException) -> bool:
    """Return whether an error says that no memory is left; those of the CPU and of MPS have no class of their own."""
    texts = ("DefaultCPUAllocator: can't allocate", "MPS backend out of memory")
    return isinstance(err, MemoryError | torch.cuda.OutOfMemoryError) or any(text in str(err) for text in texts)


def free_cached_blocks() -> None:
    """Free what nothing refers to any more: tensors in cycles, and blocks that the CUDA allocator keeps."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def largest_that_fits(measure: Callable[[int], CallCost], most: int, budget: float) -> int:
    """Return the most rows, a power of two or `most`, that fit into `budget` bytes and are no slower than fewer rows.

    Rows are doubled as long as a line through the last two peaks promises that the next one fits; the next peak is then
    measured, so that the line is never trusted further than that. Of the sizes that fit, it is the largest whose time
    for a row is within `SLOWER` of the best: large calls fall out of a processor's caches. At least 1, fit or not.
    """
    costs: list[CallCost] = []
    rows = 1
    while _worth_trying(costs, rows, budget):
        try:
            costs.append(measure(rows))
        except (RuntimeError, MemoryError) as err:
            if not is_out_of_memory(err):
                raise
            break
        rows = min(2 * rows, most)
    fitting = [cost for cost in costs if cost.peak_bytes <= budget]
    best = min((cost.seconds / cost.rows for cost in fitting), default=0.0)
    return max((cost.rows for cost in fitting if cost.seconds / cost.rows <= SLOWER * best), default=1)


def _worth_trying(costs: Sequence[CallCost], rows: int, budget: float) -> bool:
    """Return whether to make a call of more rows than the last; two are made before there is a line to go by."""
    if not costs:
        return True
    last, slope = costs[-1], 0.0
    if len(costs) > 1:
        slope = (last.peak_bytes - costs[-2].peak_bytes) / (last.rows - costs[-2].rows)
    predicted = last.peak_bytes + slope * (rows - last.rows)
    return rows > last.rows and last.seconds < LONGEST_CALL and predicted <= budget


def measure_call(work: Callable[[], object], rows: int, device: torch.device) -> CallCost:
    """Return what `work`, one call of so many rows, takes: its peak, and the shortest of a few times if it is short."""
    started = time.perf_counter()
    peak = peak_bytes(work, device)
    seconds = [time.perf_counter() - started]  # with the profiler: dear for short calls only, which are repeated
    while sum(seconds) < 1 and len(seconds) < 4:
        started = time.perf_counter()
        work()
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return CallCost(rows, peak, min(seconds))


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes of tensors on `device` that live at once while `work` runs, above those before it.

    Raises:
        ArgumentError: for a device that does not tell.
    """
    if device.type == "cuda":
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise _cannot_measure(device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces each start and stop on standard error
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    kineto: Any = profiler.profiler
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((int(event.nbytes()) for event in events), initial=0))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cannot_measure(device: torch.device) -> ArgumentError:
    return ArgumentError(f"`micro_batch` auto cannot measure the memory of `device` {device}; give a number.")


def call_budget(device: torch.device) -> float:
    """Return the bytes that calls may take: a share of those that are free.

    Raises:
        ArgumentError: for a device that does not tell.
    """
    if device.type == "cpu":
        return HOST_SHARE * free_host_bytes()
    if device.type != "cuda":
        raise _cannot_measure(device)
    free_cached_blocks()
    return CUDA_SHARE * torch.cuda.mem_get_info(device)[0]


def free_host_bytes(root: Path = Path("/")) -> int:
    """Return the bytes that this process can still take: of the machine, and of each control group that it is in.

    Where the system does not say what is available (macOS), all memory there is.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, min([available, *_free_of_groups(root)]))


def _free_of_groups(root: Path) -> Iterator[int]:
    """Yield the free bytes of the control groups (version 1 or 2) of this process, and of the groups they lie in."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in groups):
        if not controllers:
            base, files, cache = root / "sys/fs/cgroup", ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            base, files = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            cache = "total_inactive_file"
        else:
            continue
        folder = base / path.lstrip("/")
        for group in (folder, *(parent for parent in folder.parents if parent.is_relative_to(base))):
            yield from _free_of_group(group, files, cache)


def _free_of_group(group: Path, files: tuple[str, str], cache: str) -> Iterator[int]:
    """Yield the free bytes of one group, if it has a limit; files that the system keeps in memory count as free."""
    try:
        limit, used = ((group / name).read_text().strip() for name in files)
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:  # the root has no limit, and in a container the path may be that of the host
        return
    if limit != "max":
        yield int(limit) - int(used) + int(statistics.get(cache, 0))


@contextmanager
def less_memory(denoiser: nn.Module, *, gradient_checkpointing: bool, channels_last: bool) -> Iterator[None]:
    """Run a denoiser with activations recomputed, and weights in another layout; then it is as it was.

    Raises:
        ArgumentError: if it cannot recompute its activations.
    """
    with ExitStack() as stack:
        if gradient_checkpointing:
            stack.enter_context(_recomputed_activations(denoiser))
        if channels_last:
            stack.enter_context(_channels_last_weights(denoiser))
        yield


@contextmanager
def _recomputed_activations(denoiser: Any) -> Iterator[None]:
    try:
        was_on = denoiser.is_gradient_checkpointing
        denoiser.enable_gradient_checkpointing()
    except (AttributeError, ValueError) as err:
        raise ArgumentError(
            f"`gradient_checkpointing` is not supported by this teacher's {type(denoiser).__name__}; leave it out."
        ) from err
    try:
        yield
    finally:
        if not was_on:
            denoiser.disable_gradient_checkpointing()


@contextmanager
def _channels_last_weights(denoiser: nn.Module) -> Iterator[None]:
    strides = [(weight, weight.stride()) for weight in denoiser.parameters() if weight.dim() == 4]
    for weight, _ in strides:
        weight.data = weight.data.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for weight, stride in strides:  # exactly: strides of 1 x 1 kernels choose an algorithm, and so the last bits
            plain = torch.empty_strided(weight.shape, stride, dtype=weight.dtype, device=weight.device)
            weight.data = plain.copy_(weight.data)
