"""What a run costs: measured seconds for each unit of work, and how many units `featurize` will do."""

from __future__ import annotations

import math
import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from carv_attrib.config import FeaturizeConfig
from carv_attrib.errors import ArgumentError
from carv_attrib.estimator import PILOT_DRAWS, PILOT_EXAMPLES
from carv_attrib.parts import GROUP
from carv_attrib.variance import Measured

_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0}
_AMOUNT = r"(\d+(?:\.\d+)?)"
_BUDGET = re.compile(rf"(?:{_AMOUNT}h)?(?:{_AMOUNT}m)?(?:{_AMOUNT}s?)?")


def parse_budget(budget: str | float) -> float:
    """Return the seconds of a budget.

    >>> parse_budget("1h30m"), parse_budget("90s"), parse_budget(12.5)
    (5400.0, 90.0, 12.5)

    Raises:
        ArgumentError: if it is not a positive time.
    """
    match = _BUDGET.fullmatch(str(budget).strip())
    amounts = match.groups() if match else (None,)
    seconds = sum(float(amount) * unit for amount, unit in zip(amounts, _SECONDS.values(), strict=False) if amount)
    if not 0 < seconds < math.inf:
        raise ArgumentError(f"`budget` must be a positive time, got {budget!r}; use 90s, 30m, 2h, 1h30m or seconds.")
    return seconds


class Stopwatch:
    """Seconds for each unit of some work, timed again and again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._times: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def time(self, name: str, units: int | float) -> Iterator[None]:
        """Time what is done inside, which is so many units of work."""
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        self.add(name, (time.perf_counter() - started) / units)

    def add(self, name: str, seconds: float) -> None:
        """Note the seconds of one unit."""
        self._times[name].append(seconds)

    def __getitem__(self, name: str) -> Measured:
        """Return the median seconds for a unit, and half the range between the quartiles."""
        low, median, high = np.quantile(self._times[name], (0.25, 0.5, 0.75))
        return Measured(float(median), float(high - low) / 2)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@dataclass(frozen=True)
class UnitCosts:
    """Measured on this machine: seconds with half their quartile range, and bytes.

    Attributes:
        read: decoding an image, making pixels of it, and its thumbnail.
        encode_call: a call of the encoder, whatever its size.
        encode_row: each picture in it.
        draw: forward, backward and projection for one row of a network call.
        bare_draw: the same without hooks and projection.
        matrix_row: a vector times the blocks of a matrix of `proj_dim` x `proj_dim` in float64.
        eigh: the eigendecomposition of a block, among others.
        byte: writing one byte of features and reading it twice.
        record_bytes: of what is kept of an example beside its features.
        memory_bytes: most resident memory of this process up to the end of the pilot.
        device_memory_bytes: most memory of the GPU during the pilot; 0 without one.
    """

    read: Measured
    encode_call: Measured
    encode_row: Measured
    draw: Measured
    bare_draw: Measured
    matrix_row: Measured
    eigh: Measured
    byte: Measured
    record_bytes: float
    memory_bytes: int
    device_memory_bytes: int

    @property
    def projection_share(self) -> float:
        """The part of a draw that hooks and projection take."""
        return max(0.0, 1 - self.bare_draw.value / self.draw.value)


@dataclass(frozen=True)
class CostModel:
    """Time, memory and disk of `featurize` with any settings.

    Attributes:
        units: what a unit of work costs here.
        num_examples: in the dataset.
        proj_dim: of features, as the projector makes them.
    """

    units: UnitCosts
    num_examples: int
    proj_dim: int

    def upstream_seconds(self, examples_per_call: int) -> float:
        """Return the seconds for encoding one example once, so many at a time."""
        return self.units.encode_row.value + self.units.encode_call.value / examples_per_call

    def seconds(self, config: FeaturizeConfig, micro_batch: int) -> Measured:
        """Return the seconds of the whole run with a loaded teacher, and how far they could be off by the timings.

        `N (read + R (encode + K draw))`, in the calls that `featurize` makes of it, which are always full, its
        own pilot, the files, the kernel and the index.
        """
        units, estimator = self.units, config.estimator
        calls = _network_calls(config, micro_batch, self.num_examples)
        pilot_rows = min(PILOT_EXAMPLES, self.num_examples)
        encoded = self.num_examples + pilot_rows
        encode = estimator.num_encodings * encoded * self.upstream_seconds(estimator.examples_per_call(micro_batch))
        rows = calls * micro_batch + math.ceil(pilot_rows * PILOT_DRAWS / micro_batch) * micro_batch
        linear = self.num_examples * estimator.num_bands * (1 + 2 * estimator.num_replicates)
        blocks = self.proj_dim // config.projection.block_size(self.proj_dim)
        parts = [
            (encoded, units.read),
            (rows, units.draw),
            (self.disk_bytes(config), units.byte),
            (linear, units.matrix_row),
            ((estimator.num_bands + 2) * blocks, units.eigh),  # of H, and of halves for the damping
        ]
        return Measured(
            encode + sum(count * unit.value for count, unit in parts),
            sum(count * unit.standard_error for count, unit in parts),
        )

    def disk_bytes(self, config: FeaturizeConfig) -> int:
        """Return the bytes of features, records, kernel and search index; headers are left out."""
        estimator, d = config.estimator, self.proj_dim
        width = {"int8": d + 4 * math.ceil(d / GROUP), "float16": 2 * d + 4, "float32": 4 * d}[
            config.storage.feature_dtype
        ]
        vectors = self.num_examples * estimator.num_bands * estimator.num_replicates
        records = self.num_examples * (self.units.record_bytes + 8)
        index = 4 * self.num_examples * estimator.num_bands * d + 8 * self._kernel_entries(config)
        return int(vectors * width + records + index)

    def memory_bytes(self, config: FeaturizeConfig) -> int:
        """Return the most host memory: the pilot's, and on top of it the larger of what a part and the index need.

        A part is held in float32 while its batches are joined and written; an index grows by doubling, beside the
        matrices of the kernel.
        """
        estimator, d = config.estimator, self.proj_dim
        part = min(config.storage.part_size, self.num_examples)
        part_floats = part * d * estimator.num_bands * estimator.num_replicates
        kernel = 4 * 8 * self._kernel_entries(config)
        index = 8 * self.num_examples * estimator.num_bands * d + kernel + 16 * part_floats
        return int(self.units.memory_bytes + max(12 * part_floats, index))

    def _kernel_entries(self, config: FeaturizeConfig) -> int:
        """Return the numbers in the eigenvectors of the kernel."""
        return config.estimator.num_bands * self.proj_dim * config.projection.block_size(self.proj_dim)


def _network_calls(config: FeaturizeConfig, micro_batch: int, num_examples: int) -> int:
    """Return how many network calls the batches of all parts make."""
    draws, size = config.estimator.draws_per_example, config.storage.part_size
    step = config.execution.examples_per_batch(config.estimator.examples_per_call(micro_batch))

    def calls(examples: int) -> int:
        full, rest = divmod(examples, step)
        return full * math.ceil(step * draws / micro_batch) + math.ceil(rest * draws / micro_batch)

    return num_examples // size * calls(size) + calls(num_examples % size)


def peak_memory() -> int:
    """Return the most resident memory that this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
