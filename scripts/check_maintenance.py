"""Is an index that was appended to, cut, sharded or made by Ray the one that is made in one go? And how fast is Ray?

Command:  python scripts/check_maintenance.py
Hardware: 2 CPU cores, about 10 minutes; needs the `ray` extra
Writes:   docs/benchmarks/maintenance.json and the table that it prints

All 1,797 digits, packaged teacher, 4 draws. `append`: an index of the first 1,617 and then the other 180, against one
of all. `remove`: 180, chosen by a hash, taken out of that of all, against one without them. Compared are the scores of
20 queries with all examples, at uniform timestep weighting: balanced weights come from a pilot, whose examples would
differ. `shards`: 8, made one after the other and merged; `ray`: with 2 workers, and again while one of them is killed;
compared are all bytes of features, records and search index with those of the local engine.

Speed: seconds of `featurize` with Ray and 1 and 2 workers of one thread each, alternately, three times; starting Ray
and loading the teacher are counted too. Also of as many parts as workers, which take as long, to see what is left
when that is taken off.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import ray
from benchmark import describe_machine, quartiles
from datasets import Dataset
from rich.console import Console
from rich.table import Table

from carv_attrib import Attributor, featurize
from carv_attrib.data.sources import open_digits
from carv_attrib.demo import generate
from carv_attrib.maintenance import append, merge, remove
from carv_attrib.seeding import stream

COMMAND = "python scripts/check_maintenance.py"
WORK = Path("build/maintenance")
NUM_CHANGED, NUM_SHARDS, NUM_RUNS = 180, 8, 3
PART_SIZE = 128  # the default
SETTINGS: dict[str, Any] = {"num_draws": 4, "weighting": "uniform", "device": "cpu"}


def numbered(digits: Dataset) -> Dataset:
    """Return the digits with ids that stay when rows go."""
    return digits.add_column("number", list(range(len(digits))))


def make(name: str, digits: Dataset, **settings: Any) -> Path:
    """Return a new index."""
    shutil.rmtree(WORK / name, ignore_errors=True)
    featurize("demo", digits, WORK / name, id_column="number", **SETTINGS, **settings)
    return WORK / name


def difference(one: Path, other: Path) -> float:
    """Return the largest difference of scores of the same examples, relative to the largest score of their query."""
    labels = [i % 10 for i in range(20)]
    pictures, found = generate(labels), []
    for path in (one, other):
        attributor = Attributor.open(path, device="cpu")
        found.append(attributor.scores(pictures, labels=labels)[:, np.argsort(attributor.ids)])
    return float((np.abs(found[0] - found[1]).max(1) / np.abs(found[1]).max(1)).max())


def same_bytes(one: Path, other: Path) -> bool:
    """Return whether all files but the manifests are the same bit for bit."""
    suffixes = (".safetensors", ".parquet", ".faiss")
    files = [[file for file in sorted(path.rglob("*.*")) if file.suffix in suffixes] for path in (one, other)]
    names = [[file.relative_to(path) for file in own] for own, path in zip(files, (one, other), strict=True)]
    return names[0] == names[1] and all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def kill_a_worker(index: Path, killed: list[int]) -> None:
    """Kill a Ray actor as soon as an index has a part."""
    while not list(index.glob("features/*.safetensors")):
        time.sleep(0.05)
    actors = subprocess.run(["pgrep", "-f", "ray::_Actor"], capture_output=True, text=True, check=False).stdout.split()
    for process in map(int, actors[:1]):
        os.kill(process, signal.SIGKILL)
        killed.append(process)


def check_sameness(digits: Dataset) -> dict[str, Any]:
    """Return how far indexes that were made in other ways are from those made in one go."""
    whole = make("whole", digits)
    first = len(digits) - NUM_CHANGED
    grown = make("grown", digits.select(range(first)))
    append(grown, digits.select(range(first, len(digits))), id_column="number", device="cpu")
    gone = stream(0, "removed digits").permutation(len(digits))[:NUM_CHANGED].tolist()
    cut = Path(shutil.copytree(whole, WORK / "cut", dirs_exist_ok=True))
    remove(cut, ids=gone)
    without = make("without", digits.select([i for i in range(len(digits)) if i not in set(gone)]))
    shards = [make(f"shard-{i}", digits, shard=f"{i}/{NUM_SHARDS}") for i in range(NUM_SHARDS)]
    shutil.rmtree(WORK / "merged", ignore_errors=True)
    merge(WORK / "merged", shards)
    killed: list[int] = []
    shutil.rmtree(WORK / "ray-killed", ignore_errors=True)
    killer = threading.Thread(target=kill_a_worker, args=(WORK / "ray-killed", killed), daemon=True)
    killer.start()
    survived = make("ray-killed", digits, engine="ray", ray_workers=2)
    return {
        "append, relative difference of scores": difference(grown, whole),
        "remove, relative difference of scores": difference(cut, without),
        f"{NUM_SHARDS} shards, merged: same bytes": same_bytes(WORK / "merged", whole),
        "ray, 2 workers: same bytes": same_bytes(make("ray", digits, engine="ray", ray_workers=2), whole),
        "ray, a worker killed: same bytes": bool(killed) and same_bytes(survived, whole),
    }


def seconds_with_ray(digits: Dataset, workers: int) -> float:
    """Return the seconds of featurizing with some Ray workers of one thread each, from nothing."""
    started = time.perf_counter()
    ray.init(num_cpus=workers, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    make("speed", digits, engine="ray", ray_workers=workers)
    ray.shutdown()
    return time.perf_counter() - started


def speed(digits: Dataset) -> dict[str, Any]:
    """Return the seconds with one and two workers, of all digits and of one part for each worker, and the speed-ups."""
    seconds: dict[str, list[float]] = {f"{workers}, {what}": [] for what in ("all", "start") for workers in (1, 2)}
    for _ in range(NUM_RUNS):
        for workers in (1, 2):
            seconds[f"{workers}, all"].append(seconds_with_ray(digits, workers))
            seconds[f"{workers}, start"].append(seconds_with_ray(digits.select(range(PART_SIZE * workers)), workers))
    one, two, start_one, start_two = (np.array(own) for own in seconds.values())
    return {
        "seconds": seconds,
        "speed-up": quartiles(one / two),
        "speed-up after the first part of each worker": quartiles(
            (one - start_one) / (len(digits) - PART_SIZE) / ((two - start_two) / (len(digits) - 2 * PART_SIZE))
        ),
    }


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("docs/benchmarks/maintenance.json"))
def main(output: Path) -> None:
    """Compare, time, write and print."""
    digits = numbered(open_digits())
    result = {"command": COMMAND, "machine": describe_machine(), **check_sameness(digits), "ray": speed(digits)}
    output.write_text(json.dumps(result, indent=1) + "\n")
    table = Table("", "")
    for name, value in result.items():
        table.add_row(name, str(value))
    Console(width=140).print(table)
    shutil.rmtree(WORK)


if __name__ == "__main__":
    main()
