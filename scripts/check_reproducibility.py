"""Are features the same whatever the batches, the order and the interruptions?

Command:  python scripts/check_reproducibility.py
Hardware: 2 CPU cores, about 4 minutes
Writes:   docs/benchmarks/reproducibility.json and the table that it prints

The packaged teacher and 96 digits for batch sizes, micro-batches, threads and order, in float32; all 1,797 for
`kill -9`: the command line is killed at five random moments and started again until it ends, and every file is
compared with that of an uninterrupted run. Reported: whether all bits agree, and the largest relative difference of an
example's features.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import datasets
import torch
from benchmark import describe_machine
from rich.console import Console
from rich.table import Table

from carv_attrib import featurize, load_teacher
from carv_attrib.data import open_dataset
from carv_attrib.store import FeatureStore

KILLS = 5


def digits_with_ids(num_examples: int) -> datasets.Dataset:
    """Return the first digits as a dataset with an id column."""
    digits = open_dataset("digits")
    examples = [digits.load(row) for row in range(num_examples)]
    content = {
        "image": [x.image for x in examples],
        "label": [x.label for x in examples],
        "id": list(range(num_examples)),
    }
    return datasets.Dataset.from_dict(content).cast_column("image", datasets.Image())


def features(dataset: datasets.Dataset, **settings: Any) -> torch.Tensor:
    """Return the features of a dataset in the order of ids, computed with a freshly loaded teacher."""
    with tempfile.TemporaryDirectory() as folder:
        store = featurize(load_teacher("demo"), dataset, folder, id_column="id", feature_dtype="float32", **settings)
        return store.read_features(store.ids.argsort().tolist())


def compare(reference: torch.Tensor, other: torch.Tensor) -> dict[str, bool | float]:
    """Return whether all bits agree, and the largest relative difference of an example."""
    difference = (other - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
    return {"same bits": torch.equal(reference, other), "largest relative difference": float(difference.max())}


def in_one_process(num_examples: int) -> dict[str, dict[str, bool | float]]:
    """Return the comparisons of batch sizes, micro-batches, threads and order."""
    dataset = digits_with_ids(num_examples)
    reference = features(dataset)
    rows = {"again, teacher loaded anew": compare(reference, features(dataset))}
    for batch_size in (1, 7, 32):
        rows[f"batch size {batch_size}"] = compare(reference, features(dataset, batch_size=batch_size))
    for noise in ("shared", "independent"):
        ordered = reference if noise == "shared" else features(dataset, noise=noise)
        rows[f"shuffled rows, {noise} noise"] = compare(ordered, features(dataset.shuffle(seed=0), noise=noise))
    for micro_batch in (1, 5, num_examples * 8):
        rows[f"micro-batch {micro_batch} instead of 256"] = compare(
            reference, features(dataset, micro_batch=micro_batch)
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    rows[f"{torch.get_num_threads()} thread(s) instead of {threads}"] = compare(reference, features(dataset))
    torch.set_num_threads(threads)
    return rows


def featurize_command(output: Path, kill_after: float | None = None) -> bool:
    """Run `carv-attrib featurize`, killed after some seconds; return whether it ended by itself."""
    program = Path(sys.executable).with_name("carv-attrib")
    flags = ["--teacher", "demo", "--dataset", "digits", "--output", str(output), "--part-size", "32"]
    with subprocess.Popen([program, "featurize", *flags], stdout=subprocess.DEVNULL) as process:
        try:
            return process.wait(kill_after) == 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            return False


def killed_and_resumed() -> dict[str, dict[str, bool | float]]:
    """Return the comparison of a run that was killed several times with one that was not."""
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        started = time.monotonic()
        if not featurize_command(whole):
            raise click.ClickException("the uninterrupted run failed.")
        duration = time.monotonic() - started
        moments = random.Random(0)
        progress = []
        for _ in range(KILLS):
            featurize_command(killed, kill_after=moments.uniform(0.1, 0.4) * duration)
            progress.append(len(list(killed.glob("features/part-*"))))
        if not featurize_command(killed):
            raise click.ClickException("the last run failed.")
        files = {path.relative_to(root) for root in (whole, killed) for path in root.rglob("*") if path.is_file()}
        different = [str(f) for f in sorted(files) if not same_bytes(whole / f, killed / f)]
        stores = [FeatureStore.open(path) for path in (whole, killed)]
        result = compare(*(store.read_features(range(len(store.ids))) for store in stores))
        name = f"kill -9 at {KILLS} moments, with {progress} of {stores[0].num_parts} parts done"
        name += f"; files that differ, of {len(files)}: {', '.join(different) or 'none'}"
        return {name: result | {"same bits": not different}}


def same_bytes(first: Path, second: Path) -> bool:
    """Return whether both files exist and are equal."""
    return first.is_file() and second.is_file() and first.read_bytes() == second.read_bytes()


@click.command()
@click.option("--num-examples", default=96, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("docs/benchmarks/reproducibility.json"))
def main(num_examples: int, output: Path) -> None:
    """Run all comparisons and print one table."""
    rows = in_one_process(num_examples) | killed_and_resumed()
    table = Table("changed", "same bits", "largest relative difference")
    for name, row in rows.items():
        table.add_row(name, "yes" if row["same bits"] else "no", f"{row['largest relative difference']:.1e}")
    Console(width=140).print(table)
    result = {"command": "python scripts/check_reproducibility.py", "machine": describe_machine(), "rows": rows}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
