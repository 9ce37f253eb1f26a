"""Does the ranking find what it must: degraded copies of training digits, and the class of generated digits?

Command:  python scripts/bench_retrieval.py
Hardware: 2 CPU cores, about 3 minutes
Writes:   docs/benchmarks/retrieval.json and the table that it prints

Degraded copies: 200 training digits as the teacher sees them (32 x 32), with noise (sigma 0.1, pixels in [-1, 1]), as a
JPEG of quality 30, or shifted two pixels to the right and down; queried with their own label. Counted: is the original
first, is it among the first ten. Generated: ten digits of each class from the packaged teacher; counted: the share of
the first ten training digits that have the class that was asked for. Standard errors are over queries.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import click
import numpy as np
import torch
from benchmark import describe_machine
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from carv_attrib import Attributor, featurize, load_teacher
from carv_attrib.data import from_pixels, open_dataset, to_pixels
from carv_attrib.demo import generate
from carv_attrib.metrics import ranks
from carv_attrib.variance import mean_and_error

METHODS = {
    "ours: preconditioned (default)": {},
    "ours: preconditioned, kernel means": {"kernel": "means"},
    "ours: preconditioned-cosine": {"score": "preconditioned-cosine"},
    "ours: cosine": {"score": "cosine"},
    "ours: dot": {"score": "dot"},
}
PIXELS = "pixel cosine"


def add_noise(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Return pixels with Gaussian noise of standard deviation 0.1."""
    return pixels + 0.1 * torch.randn(pixels.shape, generator=generator)


def as_jpeg(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Return pixels after a JPEG of quality 30."""
    file = io.BytesIO()
    from_pixels(pixels).save(file, "JPEG", quality=30)
    return torch.from_numpy(np.asarray(Image.open(file), np.float32) / 127.5 - 1)[None]


def shift(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Return pixels moved two to the right and two down, black where nothing was."""
    return torch.nn.functional.pad(pixels[:, :-2, :-2], (2, 0, 2, 0), value=-1.0)


DEGRADATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "noise 0.1": add_noise,
    "JPEG 30": as_jpeg,
    "shift 2 px": shift,
}


def pixel_cosine(queries: list[Image.Image], train: Tensor) -> np.ndarray:
    """Return the cosine similarity of pixels in [0, 1], (queries, train)."""
    flat = torch.stack([torch.from_numpy(np.asarray(q, np.float32) / 255).flatten() for q in queries])
    unit = torch.nn.functional.normalize
    return (unit(flat, dim=1) @ unit((train.flatten(1) + 1) / 2, dim=1).T).numpy()


def all_scores(
    attributor: Attributor, queries: list[Image.Image], labels: list[int], train: Tensor
) -> dict[str, np.ndarray]:
    """Return the (queries, train) scores of every method."""
    scores = {name: attributor.scores(queries, labels=labels, **options) for name, options in METHODS.items()}
    return scores | {PIXELS: pixel_cosine(queries, train)}


@click.command()
@click.option("--num-copies", default=200, show_default=True)
@click.option("--per-class", default=10, show_default=True, help="Generated digits of each class.")
@click.option("--num-draws", default=8, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("docs/benchmarks/retrieval.json"))
def main(num_copies: int, per_class: int, num_draws: int, output: Path) -> None:
    """Run both tests and print one table."""
    dataset, teacher = open_dataset("digits"), load_teacher("demo")
    examples = [dataset.load(row) for row in range(len(dataset))]
    train = torch.stack([to_pixels(x.image, teacher.pixel_spec) for x in examples])
    classes = np.array([x.label for x in examples])
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(train), generator=generator)[:num_copies].numpy()
    rows: dict[str, dict[str, tuple[float, float]]] = {name: {} for name in (*METHODS, PIXELS)}
    with tempfile.TemporaryDirectory() as folder:
        featurize(teacher, "digits", folder, num_draws=num_draws)
        attributor = Attributor.open(folder, teacher=teacher)
        for degradation, degrade in DEGRADATIONS.items():
            queries = [from_pixels(degrade(train[i], generator)) for i in chosen]
            for name, scores in all_scores(attributor, queries, classes[chosen].tolist(), train).items():
                rank = ranks(scores, chosen)
                rows[name][f"{degradation}: first"] = astuple(mean_and_error(rank == 1))
                rows[name][f"{degradation}: top 10"] = astuple(mean_and_error(rank <= 10))
        labels = np.repeat(np.arange(10), per_class)
        for name, scores in all_scores(attributor, generate(labels.tolist(), seed=1), labels.tolist(), train).items():
            top = np.argsort(-scores, axis=1)[:, :10]
            shares = (classes[top] == labels[:, None]).mean(1)
            rows[name]["generated: class share of top 10"] = astuple(mean_and_error(shares))
    table = Table("method", *next(iter(rows.values())), title=f"{num_draws} draws, mean ± standard error over queries")
    for name, cells in rows.items():
        table.add_row(name, *(f"{mean:.3f} ± {error:.3f}" for mean, error in cells.values()))
    Console(width=200).print(table)
    result = {
        "command": "python scripts/bench_retrieval.py",
        "machine": describe_machine(),
        "num_draws": num_draws,
        "rows": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
