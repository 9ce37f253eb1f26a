"""What a query costs, once the teacher is loaded: from picture to ranking, in batches, in FAISS, and opening an index.

Command:  python scripts/bench_query.py
Hardware: 2 CPU cores, about 3 minutes
Writes:   docs/benchmarks/query.json and the tables that it prints

The digits are featurized into a temporary folder with the packaged teacher at the defaults (8 draws, 4 bands, 4,096
dimensions). Queries are digits that the teacher generated, with their labels. Medians and quartiles over repetitions:

- one query: `Attributor.query`, from a picture to ten matches with standard errors, records and thumbnails.
- batch: one `Attributor.scores` of 100 pictures, which gives the exact score of every example of the index for each,
  reads all features from the store, and does not use FAISS; so it is not 100 times `query`.
- network: the part of one query that makes its features, `Estimator.features` of 8 draws.
- FAISS: the search alone, for one whitened query and for 100, ten neighbours of each.
- open: `Attributor.open`, which reads the manifest, the ids, and the kernel for its checksum, but no features, and
  compares the size of the search index, which is memory-mapped. Also `open, first query`: what the first query does
  beyond a later one (the kernel and the index are loaded, the projection and the draws are made again).

Opening against size: the same parts, linked so many times over as parts of one store (their ids repeat, and nothing
but opening is timed), with an index and a kernel of that size.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from benchmark import describe_machine, quartiles
from PIL import Image
from rich.console import Console
from rich.table import Table

from carv_attrib import Attributor, featurize, load_teacher
from carv_attrib.data.sources import open_digits
from carv_attrib.demo import generate
from carv_attrib.estimator import Encoded
from carv_attrib.pipeline import build_index
from carv_attrib.store import FeatureStore
from carv_attrib.teacher import Teacher

COMMAND = "python scripts/bench_query.py"
TOP_K = 10


def milliseconds(work: Callable[[], object], repetitions: int) -> list[float]:
    """Return the quartiles of the milliseconds that `work` takes, after one call that is not counted."""
    work()
    return quartiles([timed(work) for _ in range(repetitions)])


def timed(work: Callable[[], object]) -> float:
    """Return the milliseconds of one call."""
    started = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - started)


def measure_queries(
    path: Path, teacher: Teacher, images: Sequence[Image.Image], labels: Sequence[int], repetitions: int
) -> dict[str, Any]:
    """Return the quartiles of everything that is asked of an open index."""
    attributor = Attributor.open(path, teacher=teacher)
    turn = iter(range(10**9))

    def one_query() -> None:
        i = next(turn) % len(images)  # a picture after another: nothing of a query is kept for the next
        attributor.query(images[i], label=labels[i], top_k=TOP_K)

    few = max(2, repetitions // 5)
    return {
        "one query": milliseconds(one_query, repetitions),
        f"batch of {len(images)}": milliseconds(lambda: attributor.scores(images, labels=labels), few),
        "network part of one query": milliseconds(network_part(attributor), repetitions),
        **measure_faiss(path, len(images), repetitions),
    }


def network_part(attributor: Attributor) -> Callable[[], object]:
    """Return what makes the features of one encoded picture."""
    estimator = attributor.estimator
    latents = torch.randn(1, 1, *estimator.teacher.latent_shape)
    encoded, draws = Encoded(latents, estimator.teacher.condition([3], None)), estimator.draws([-1])
    return lambda: estimator.features(encoded, draws)


def measure_faiss(path: Path, batch: int, repetitions: int) -> dict[str, list[float]]:
    """Return the quartiles of searches in the FAISS index of a folder, its own vectors being the queries."""
    import faiss

    index = faiss.read_index(str(path / "index-00000.faiss"))
    vectors = index.reconstruct_n(0, min(batch, index.ntotal))
    return {
        "FAISS alone, one": milliseconds(lambda: index.search(vectors[:1], TOP_K), repetitions),
        f"FAISS alone, {len(vectors)}": milliseconds(lambda: index.search(vectors, TOP_K), repetitions),
    }


def measure_opening(
    path: Path, teacher: Teacher, image: Image.Image, label: int, repetitions: int
) -> dict[str, list[float]]:
    """Return the quartiles of opening an index, and of what the first query costs more than the second."""
    opened, extra = [], []
    for repetition in range(repetitions + 1):
        started = time.perf_counter()
        attributor = Attributor.open(path, teacher=teacher)
        taken = 1e3 * (time.perf_counter() - started)
        first, second = (timed(lambda a=attributor: a.query(image, label=label, top_k=TOP_K)) for _ in range(2))
        if repetition:
            opened.append(taken)
            extra.append(first - second)
    return {"open": quartiles(opened), "open, first query": quartiles(extra)}


def enlarge(source: Path, target: Path, times: int) -> Path:
    """Write an index whose parts are links to those of another, so many times over; its ids repeat."""
    old = FeatureStore.open(source)
    config, dataset = old.manifest["config"], old.manifest["dataset"]
    whole = dataset["num_examples"] // config["part_size"]
    num_examples = whole * config["part_size"] * times
    new = FeatureStore.create(target, {**old.manifest, "dataset": {**dataset, "num_examples": num_examples}})
    for part in range(whole * times):
        new.features_path(part).hardlink_to(old.features_path(part % whole))
        new.examples_path(part).hardlink_to(old.examples_path(part % whole))
    build_index(new)
    return target


def measure_sizes(path: Path, teacher: Teacher, times: Sequence[int], repetitions: int) -> list[dict[str, Any]]:
    """Return the milliseconds of opening indexes of several sizes, and their bytes."""
    rows = []
    for factor in times:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            larger = enlarge(path, Path(folder) / "index", factor)
            rows.append(
                {
                    "examples": FeatureStore.open(larger).manifest["dataset"]["num_examples"],
                    "feature_bytes": total_bytes(larger / "features"),
                    "index_bytes": sum(f.stat().st_size for f in larger.iterdir() if f.is_file()),
                    "open_ms": milliseconds(
                        lambda larger=larger: Attributor.open(larger, teacher=teacher), repetitions
                    ),
                }
            )
    return rows


def total_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def measure(num_examples: int | None, num_queries: int, repetitions: int, times: Sequence[int]) -> dict[str, Any]:
    """Make an index and return all that is measured on it."""
    teacher, digits = load_teacher("demo"), open_digits()
    digits = digits if num_examples is None else digits.select(range(num_examples))
    labels = [i % 10 for i in range(num_queries)]
    images = generate(labels)
    work = Path(tempfile.mkdtemp())
    try:
        featurize(teacher, digits, work / "index")
        return {
            "examples": len(digits),
            "queries": num_queries,
            "repetitions": repetitions,
            "bytes": {"features": total_bytes(work / "index" / "features"), "all": total_bytes(work / "index")},
            "milliseconds": {
                **measure_queries(work / "index", teacher, images, labels, repetitions),
                **measure_opening(work / "index", teacher, images[0], labels[0], max(2, repetitions // 5)),
            },
            "sizes": measure_sizes(work / "index", teacher, times, max(2, repetitions // 5)),
        }
    finally:
        shutil.rmtree(work)


def spread(values: Sequence[float]) -> str:
    """Return the median and the quartiles."""
    low, middle, high = (f"{value:,.2f}" for value in values)
    return f"{middle} [{low}, {high}]"


def print_tables(result: dict[str, Any]) -> None:
    """Print what was measured."""
    console = Console(width=120)
    table = Table("", "ms: median \\[quartiles]", title=f"{result['examples']} digits, {result['threads']} threads")
    for name, values in result["milliseconds"].items():
        table.add_row(name, spread(values))
    console.print(table)
    sizes = Table("examples", "features, MB", "index and kernel, MB", "Attributor.open, ms")
    for row in result["sizes"]:
        megabytes = (f"{row[name] / 1e6:.0f}" for name in ("feature_bytes", "index_bytes"))
        sizes.add_row(str(row["examples"]), *megabytes, spread(row["open_ms"]))
    console.print(sizes)


@click.command()
@click.option("--examples", type=int, help="Digits of the index, in place of all; for a trial.")
@click.option("--queries", default=100, show_default=True, help="Generated pictures, the size of the batch.")
@click.option("--repetitions", default=25, show_default=True, help="A fifth of them for what is slow.")
@click.option("--times", multiple=True, type=int, default=(1, 4, 16), show_default=True, help="Sizes of larger stores.")
@click.option("--num-threads", default=2, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("docs/benchmarks/query.json"))
def main(
    examples: int | None, queries: int, repetitions: int, times: tuple[int, ...], num_threads: int, output: Path
) -> None:
    """Measure, write and print."""
    torch.set_num_threads(num_threads)
    result = {"command": COMMAND, "machine": describe_machine(), "threads": num_threads}
    result |= measure(examples, queries, repetitions, times)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print_tables(result)


if __name__ == "__main__":
    main()
