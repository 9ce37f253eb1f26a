"""Searching among up to a million examples: time, memory and size of building, recall and latency of a query.

Command:  python scripts/bench_index.py
Hardware: 2 CPU cores, 16 GB of disk; about 15 minutes for the real features, 20 for the rest
Writes:   docs/benchmarks/index.json and the tables that it prints; a killed run goes on

Features: 20,364 pictures, each digit that is not a query 12 times, turned, scaled and shifted at random, are featurized
with the packaged teacher (4 draws in one band, 1,024 dimensions, so that a vector is 1,024 long). The examples of a
store are drawn from these: `w g_1 + (1 - w) g_2` with w uniform, g_1 and g_2 two pictures of the same digit. Queries
are 200 turned, scaled and shifted pictures of the other 100 digits; their own features, not drawn.

Each store is indexed twice, in a process of its own: `Flat` (exact search), and with `target_recall=0.99`. `build` is
`build_index`: kernel, training, coding, choosing the parameters, writing. Peak memory is the process's largest resident
set, in which mapped files count too. A query is timed from its features to the scores of its candidates, with errors
of the draws but not of the projection; the files were read before (the page cache is warm). Recall: which of the exact
ten it finds, over the other half of the queries than that on which the parameters were chosen, with the standard error.
"""

from __future__ import annotations

import io
import resource
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from benchmark import Results, quartiles
from datasets import Dataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from carv_attrib import featurize, load_teacher
from carv_attrib.data.sources import open_digits
from carv_attrib.index import NUM_CANDIDATES
from carv_attrib.parts import PartFeatures
from carv_attrib.pipeline import build_index
from carv_attrib.records import Record
from carv_attrib.scorer import Choice, Scorer
from carv_attrib.seeding import stream
from carv_attrib.store import FeatureStore

COMMAND = "python scripts/bench_index.py"
WORK = Path("build/index")
NUM_COPIES, NUM_HELD_OUT, NUM_QUERIES = 12, 100, 200
PART_SIZE, TOP_K, TARGET = 10_000, 10, 0.99
SIZES = (10_000, 100_000, 1_000_000)
SETTINGS: dict[str, Any] = {"num_bands": 1, "num_draws": 4, "proj_dim": 1024}


def turned(digit: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Return a digit, turned, scaled and shifted a little."""
    angle, scale = np.deg2rad(generator.uniform(-15, 15)), generator.uniform(0.85, 1.15)
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    (width, height), shift = digit.size, generator.uniform(-0.08, 0.08, 2) * digit.size
    x, y = width / 2, height / 2
    matrix = (cos, sin, x - cos * x - sin * y + shift[0], -sin, cos, y + sin * x - cos * y + shift[1])
    return digit.transform(digit.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


def turned_digits(*, queries: bool) -> Dataset:
    """Return copies of the digits that are asked about, or of all others."""
    digits = open_digits()
    rows = range(NUM_HELD_OUT) if queries else range(NUM_HELD_OUT, len(digits))
    copies = NUM_QUERIES // NUM_HELD_OUT if queries else NUM_COPIES
    generator = stream(0, "turned digits", int(queries))
    images, labels = [], []
    for row in rows:
        digit = Image.open(io.BytesIO(digits[row]["image"]["bytes"])).resize((32, 32), Image.Resampling.BICUBIC)
        images += [turned(digit, generator) for _ in range(copies)]
        labels += [digits[row]["label"]] * copies
    return Dataset.from_dict({"image": images, "label": labels})


def real_features(name: str) -> tuple[FeatureStore, Tensor]:
    """Return a store of real features, made where it is missing, and its features."""
    store = featurize(load_teacher("demo"), turned_digits(queries=name == "queries"), WORK / name, **SETTINGS)
    return store, store.read_features(range(len(store.ids)))


def make_store(num_examples: int) -> FeatureStore:
    """Return a store of examples that are drawn from real features, made where it is missing."""
    real, features = real_features("real")
    path = WORK / str(num_examples)
    dataset = {"num_examples": num_examples, "label_names": None, "source": COMMAND, "columns": {}}
    config = real.manifest["config"] | {"part_size": PART_SIZE}
    if path.is_dir():
        store = FeatureStore.open(path)
    else:
        store = FeatureStore.create(path, {**real.manifest, "config": config, "dataset": dataset})
    for part in store.missing_parts():
        ids = torch.tensor(store.part_rows(part))
        generator = stream(0, "drawn examples", part)
        digit, first = (generator.integers(n, size=len(ids)) for n in (len(features) // NUM_COPIES, NUM_COPIES))
        second = (first + generator.integers(1, NUM_COPIES, size=len(ids))) % NUM_COPIES
        w = torch.from_numpy(generator.uniform(size=(len(ids), 1, 1, 1))).float()
        one, other = (features[digit * NUM_COPIES + copy] for copy in (first, second))
        records = [Record(i, str(i), None, None, b"") for i in ids.tolist()]
        store.write_part(part, PartFeatures(ids, w * one + (1 - w) * other), records)
    return FeatureStore.open(path)


def build(path: Path, *, target_recall: float | None) -> dict[str, Any]:
    """Return the seconds and the bytes of building an index of a store."""
    store = FeatureStore.open(path)
    _, queries = real_features("queries")
    started = time.perf_counter()
    index = build_index(store, target_recall=target_recall, queries=queries)
    return {
        "search": asdict(index.settings.search),
        "build_seconds": time.perf_counter() - started,
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "index_bytes": sum(file.stat().st_size for file in path.glob("index-*.faiss")),
        "feature_bytes": sum(file.stat().st_size for file in (path / "features").iterdir()),
    }


def ask(path: Path, exact: list[list[int]] | None) -> dict[str, Any]:
    """Return what is found for every other query, how long that takes, and the recall against exact search."""
    _, queries = real_features("queries")
    scorer = Scorer(FeatureStore.open(path), "demo", "cpu", None)
    choice, every = Choice("preconditioned", "bands", "auto"), slice(None)
    found, times = [], []
    for query in [queries[:1], *queries[1::2].split(1)]:  # the first once more, to open everything
        started = time.perf_counter()
        positions = scorer.candidates(query, choice, NUM_CANDIDATES, every, opponents=False)
        scores = scorer.candidate_scores(query, positions, choice, every, errors=False)
        times.append(1e3 * (time.perf_counter() - started))
        found.append(positions[scores.scores[0].topk(TOP_K).indices].tolist())
    exact = exact or found[1:]
    recalls = [len(set(own) & set(other)) / TOP_K for own, other in zip(found[1:], exact, strict=True)]
    return {
        "query_ms": quartiles(times[1:]),
        "recall": [float(np.mean(recalls)), float(np.std(recalls, ddof=1) / len(recalls) ** 0.5)],
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "found": found[1:],
    }


def in_a_process(function: Callable[..., dict[str, Any]], *arguments: Any, **settings: Any) -> dict[str, Any]:
    """Return what a function returns in a process of its own, whose memory is then its alone."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **settings).result()


def print_tables(results: Results) -> None:
    """Print what was measured."""
    table = Table(
        "examples", "index", "built in, s", "peak, GB", "index, MB", "recall@10", "query, ms \\[quartiles]", "peak, GB"
    )
    for key, cell in results.content["cells"].items():
        search, (low, middle, high) = cell["search"], cell["query_ms"]
        table.add_row(
            key.split("/")[0],
            f"{search['factory']} {search['parameters']}".strip(),
            f"{cell['build_seconds']:.1f}",
            f"{cell['peak_gigabytes']:.2f}",
            f"{cell['index_bytes'] / 1e6:,.0f}",
            "{:.4f} ± {:.4f}".format(*cell["recall"]),
            f"{middle:.1f} [{low:.1f}, {high:.1f}]",
            f"{cell['query_peak_gigabytes']:.2f}",
        )
    Console(width=160).print(table)


@click.command()
@click.option("--size", "sizes", multiple=True, type=int, default=SIZES, show_default=True, help="Examples.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("docs/benchmarks/index.json"))
@click.option("--fresh", is_flag=True, help="Measure everything again.")
def main(sizes: tuple[int, ...], output: Path, fresh: bool) -> None:
    """Measure what is missing, and print the table."""
    results = Results(output, COMMAND, fresh=fresh)
    for size in sizes:
        if f"{size}/compressed" in results:
            continue
        path, exact = make_store(size).path, None
        for name, target in (("exact", None), ("compressed", TARGET)):
            built = in_a_process(build, path, target_recall=target)
            asked = in_a_process(ask, path, exact)
            exact = exact or asked.pop("found")
            asked.pop("found", None)
            asked["query_peak_gigabytes"] = asked.pop("peak_gigabytes")
            results.add(f"{size}/{name}", built | asked)
        shutil.rmtree(path)
    print_tables(results)


if __name__ == "__main__":
    main()
