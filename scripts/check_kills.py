"""Does an index survive `kill -9` at any moment? Runs that are killed at random, resumed, and compared bit for bit.

Command:  python scripts/check_kills.py --kills 200
Hardware: 2 CPU cores; about 15 minutes
Writes:   docs/benchmarks/kills.json, and the table that it prints; exit code 1 if anything differed or was left behind

An index of 96 digits by the packaged teacher, with parts of 8. For each of featurize, append, remove, merge and index:
the uninterrupted run gives the bytes that are expected and the time it takes. Then, again and again from the same
start, a process that runs it is killed one to four times, each at a moment drawn evenly over that time, and run to the
end; every file must be that of the uninterrupted run, and no temporary file may be left. What the folder looks like
after a kill says in which phase it fell.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch
from benchmark import Results
from rich.console import Console
from rich.table import Table

from carv_attrib import featurize, load_teacher
from carv_attrib.data import open_dataset
from carv_attrib.files import read_sealed, unfinished_files
from carv_attrib.maintenance import append, merge, remove
from carv_attrib.pipeline import build_index
from carv_attrib.store import FeatureStore

OUTPUT = Path("docs/benchmarks/kills.json")
SETTINGS = {"num_draws": 2, "num_bands": 2, "proj_dim": 1024, "part_size": 8, "device": "cpu"}
NUM_DIGITS, NUM_FIRST = 96, 64


@dataclass
class Operation:
    """Something that is killed.

    Attributes:
        start: folder that it begins from, or None.
        run: what it does to a folder; again after a kill.
    """

    start: Path | None
    run: Callable[[Path], object]
    phases: Counter[str] = field(default_factory=Counter)


def in_child(run: Callable[[Path], object], folder: Path, kill_after: float | None = None) -> int:
    """Run in a process of its own, killed after so many seconds; return its exit code, or minus the signal."""
    child = os.fork()
    if not child:
        try:
            run(folder)
        except BaseException as err:  # noqa: BLE001 the parent must never go on in the child
            print(f"{type(err).__name__}: {err}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def digests(folder: Path) -> dict[str, str]:
    """Return the checksum of every file."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def has_index(folder: Path) -> bool:
    """Return whether a folder has a search index that has not been retired."""
    path = folder / "index.json"
    return path.is_file() and bool(read_sealed(path)["bytes"])


def phase(folder: Path) -> str:
    """Return what a folder looks like after a kill."""
    if not (folder / "manifest.json").is_file():
        return "before the manifest"
    if unfinished_files(folder):
        return "while a file was written"
    store = FeatureStore.open(folder)
    if store.missing_parts():
        return "between parts"
    if not store.removed.isdisjoint(store.ids.tolist()):
        return "between rewritten parts"
    return "before it began, or after its end" if has_index(folder) else "kernel and search index"


def begin(operation: Operation, folder: Path) -> None:
    """Put a folder in the state that an operation begins from."""
    shutil.rmtree(folder, ignore_errors=True)
    if operation.start:
        shutil.copytree(operation.start, folder)


def check(name: str, operation: Operation, kills: int, work: Path) -> dict[str, object]:
    """Kill an operation so many times; return what was found."""
    folder, moments = work / "killed", random.Random(name)
    begin(operation, folder)
    started = time.monotonic()
    if in_child(operation.run, folder) != 0:
        raise click.ClickException(f"{name} fails by itself")
    seconds, expected = time.monotonic() - started, digests(folder)
    done, runs, differed, left = 0, 0, 0, 0
    while done < kills:
        begin(operation, folder)
        for _ in range(min(moments.randint(1, 4), kills - done)):
            in_child(operation.run, folder, moments.uniform(0, seconds))
            operation.phases[phase(folder)] += 1
            done += 1
        code = in_child(operation.run, folder)
        runs += 1
        differed += code != 0 or digests(folder) != expected
        left += bool(unfinished_files(folder))
    return {
        "kills": done,
        "resumed_runs": runs,
        "differ": differed,
        "leave_temporary_files": left,
        "phases": dict(operation.phases),
        "seconds": round(seconds, 2),
    }


@click.command()
@click.option("--kills", default=200, show_default=True, help="In all, spread over the operations.")
@click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, show_default=True)
def main(kills: int, output: Path) -> None:
    """Kill every operation, print what happened, and keep it."""
    torch.set_num_threads(1)
    teacher = load_teacher("demo", device="cpu")
    results = Results(output, f"python scripts/check_kills.py --kills {kills}", fresh=True)
    with TemporaryDirectory() as name:
        work = Path(name)
        for number, folder in ((NUM_FIRST, "first"), (NUM_DIGITS, "all"), (NUM_DIGITS - NUM_FIRST, "rest")):
            save_digits(work / folder, number, NUM_FIRST if folder == "rest" else 0)

        def make(folder: Path, digits: str = "all", **settings: str) -> object:
            return featurize(teacher, work / digits, folder, **SETTINGS, **settings)  # type: ignore[arg-type]

        for shard in range(2):
            in_child(lambda path, s=f"{shard}/2": make(path, shard=s), work / f"shard-{shard}")  # type: ignore[misc]
        in_child(make, work / "whole")
        in_child(lambda path: make(path, "first"), work / "begun")
        gone = list(range(0, NUM_DIGITS, 10))
        operations = {
            "featurize": Operation(None, make),
            "append": Operation(work / "begun", lambda path: append(path, work / "rest", teacher=teacher)),
            "remove": Operation(work / "whole", lambda path: remove(path, ids=gone)),
            "merge": Operation(None, lambda path: merge(path, [work / "shard-0", work / "shard-1"])),
            "index": Operation(work / "whole", index_again),
        }
        for label, operation in operations.items():
            results.add(label, check(label, operation, kills // len(operations), work))
    print_table(results)
    if any(cell["differ"] or cell["leave_temporary_files"] for cell in results.content["cells"].values()):
        raise SystemExit(1)


def save_digits(folder: Path, count: int, first: int) -> None:
    """Write some digits as an image folder with classes."""
    digits = open_dataset("digits")
    for row in range(first, first + count):
        example = digits.load(row)
        file = folder / str(example.label) / f"{row:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        example.image.save(file)


def index_again(path: Path) -> None:
    """Do what `carv-attrib index` does."""
    store = FeatureStore.open(path)
    with store.writing():
        build_index(FeatureStore.open(path))


def print_table(results: Results) -> None:
    """Print what was found of each operation."""
    table = Table("operation", "kills", "resumed runs", "differ", "leave files", "where the kills fell")
    for label, cell in results.content["cells"].items():
        where = ", ".join(f"{name}: {count}" for name, count in sorted(cell["phases"].items()))
        counts = (cell[name] for name in ("kills", "resumed_runs", "differ", "leave_temporary_files"))
        table.add_row(label, *map(str, counts), where)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
