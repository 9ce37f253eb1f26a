"""How accurate a projection is, and what it costs: inner products and scores against those of whole gradients.

Command:  python scripts/bench_projection.py
Hardware: 2 CPU cores, 5 GB of memory, about 15 minutes
Writes:   docs/benchmarks/projection.json after every projection, so that a killed run goes on, and a table

160 digits at 4 shared draws, for both packaged teachers; 32 of them are queries, the others training examples. The
gradients of all (example, draw) are written out once; their inner products are the truth. Each projection is drawn
anew with each of several seeds.

Error: root mean square, over pairs of different examples at the same draw, of the error of their inner product over
the product of their norms. Agreement: Spearman correlation, over the training examples, of preconditioned scores
(kernel over draws, every draw a band) from projected and from whole gradients, mean over queries. The damping is the
same for all: a tenth of the mean eigenvalue of 512 dimensions. Both with standard errors over seeds, which leave out
that the digits are a sample. Time: of features over that of hooks that project nothing, median over repetitions in
which they take turns.

Beside what the package offers stand two designs that it does not use: `independent` has independent entries for
every patch of a convolution, where ours mixes channels first; `one rank` has the same rank on both sides of every
layer, however short the other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from benchmark import Results, quartiles
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor

from carv_attrib import load_teacher
from carv_attrib.batches import encode_batch, read_batch
from carv_attrib.config import FeaturizeConfig
from carv_attrib.data import open_dataset
from carv_attrib.estimator import Encoded, Estimator, build_estimator
from carv_attrib.projection import Layer, build_projector, weight_gradient
from carv_attrib.projection.kronecker import random_matrix, ranks
from carv_attrib.sampling import Draws
from carv_attrib.seeding import random_signs, stream_key
from carv_attrib.teacher import placement
from carv_attrib.variance import mean_and_error

COMMAND = "python scripts/bench_projection.py"
NUM_EXAMPLES, NUM_QUERIES, NUM_DRAWS = 160, 32, 4
DAMPING, DAMPING_DIM = 0.1, 512
KRONECKER = [(rank, proj_dim) for rank in (4, 8, 16, 32) for proj_dim in (256, 512, 2048)]
DESIGNS = {"independent": True, "one rank": False}


class WholeGradients:
    """A projector that projects nothing: it collects every layer's weight gradients, row by row."""

    proj_dim = 1
    families = torch.full((1, 1), -1)

    def __init__(self) -> None:
        self.gradients: dict[str, list[Tensor]] = {}

    def keep(self, layer: Layer, inputs: Tensor) -> Tensor:
        """Return a copy of the inputs: the network may change its own in place."""
        return inputs.clone()

    def block(self, layer: Layer, kept: Tensor, output_gradients: Tensor) -> Tensor:
        """Note the gradients."""
        self.gradients.setdefault(layer.name, []).append(weight_gradient(layer, kept, output_gradients))
        return kept.new_zeros(len(kept), 1)

    def combine(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Return nothing of interest."""
        return next(iter(blocks.values()))


class Nothing(WholeGradients):
    """Hooks that look at every layer and compute nothing: what is left is the network."""

    def keep(self, layer: Layer, inputs: Tensor) -> Tensor:
        """Return one number for each row."""
        return inputs.new_zeros(len(inputs), 1)

    def block(self, layer: Layer, kept: Tensor, output_gradients: Tensor) -> Tensor:
        """Return it again."""
        return kept


def read_digits(estimator: Estimator) -> tuple[Encoded, Draws]:
    """Return evenly chosen digits, encoded, and their shared draws."""
    examples = open_dataset("digits")
    rows = np.linspace(0, len(examples) - 1, NUM_EXAMPLES).astype(int).tolist()
    batch = read_batch(examples, rows, estimator.teacher, skip_bad=False)
    return encode_batch(estimator, batch), estimator.draws(batch.ids.tolist())


def whole_gradients(estimator: Estimator, encoded: Encoded, draws: Draws) -> dict[str, Tensor]:
    """Return the gradient of every (example, draw) by layer, over the rms norm at its draw (balanced weighting)."""
    collector = WholeGradients()
    replace(estimator, projector=collector).features(encoded, draws)
    rows = NUM_EXAMPLES * NUM_DRAWS
    gradients = {name: torch.cat(pieces)[:rows] for name, pieces in collector.gradients.items()}
    squares = sum(g.square().sum(1) for g in gradients.values()).view(NUM_EXAMPLES, NUM_DRAWS)
    scale = squares.mean(0).rsqrt().repeat(NUM_EXAMPLES)[:, None]
    return {name: g.mul_(scale) for name, g in gradients.items()}, scale


def score_matrix(gram: Tensor) -> Tensor:
    """Return preconditioned scores (queries, train) from inner products alone, by the identity of Woodbury.

    `q^T (H + lambda I)^{-1} x = (q^T x - k_q^T (n lambda I + K)^{-1} k_x) / lambda`, H over the n training vectors.
    """
    first = NUM_QUERIES * NUM_DRAWS
    kernel = gram[first:, first:]
    count = len(kernel)
    damping = DAMPING * float(kernel.trace()) / count / DAMPING_DIM
    inverse_times_cross = torch.linalg.solve(kernel + count * damping * torch.eye(count).double(), gram[first:, :])
    scores = (gram[:first, first:] - gram[:first, first:] @ inverse_times_cross[:, first:]) / damping
    by_draw = scores.view(NUM_QUERIES, NUM_DRAWS, -1, NUM_DRAWS)
    return by_draw.diagonal(dim1=1, dim2=3).mean(-1)


def same_draw_error(gram: Tensor, truth: Tensor) -> float:
    """Return the rms error of inner products of different examples at the same draw, over their norms."""
    norms = truth.diagonal().sqrt()
    errors = ((gram - truth) / norms[:, None] / norms).view(NUM_EXAMPLES, NUM_DRAWS, NUM_EXAMPLES, NUM_DRAWS)
    same_draw = errors.diagonal(dim1=1, dim2=3)  # examples examples draws
    different = ~torch.eye(NUM_EXAMPLES, dtype=torch.bool)
    return float(same_draw[different].square().mean().sqrt())


def agreement(gram: Tensor, exact_scores: Tensor) -> float:
    """Return the mean over queries of the rank correlation of scores."""
    pairs = zip(score_matrix(gram), exact_scores, strict=True)
    return float(np.mean([spearmanr(ours, exact).statistic for ours, exact in pairs]))


def designed(
    layers: list[Layer], gradients: dict[str, Tensor], rank: int, proj_dim: int, seed: int, fit: bool
) -> Tensor:
    """Return features with independent entries, the ranks of the package or (without `fit`) the same on both sides."""
    blocks = []
    for layer in layers:
        shape = (len(gradients[layer.name]), layer.groups, layer.out_dim, layer.in_dim)
        r_in, r_out = ranks(layer, rank) if fit else (min(rank, layer.in_dim), min(rank, layer.out_dim))
        p_in, p_out = (
            torch.stack([random_matrix(stream_key(seed, layer.name, side, g), dim, r) for g in range(layer.groups)])
            for side, dim, r in (("in", layer.in_dim, r_in), ("out", layer.out_dim, r_out))
        )
        block = torch.einsum("ngoi,gor,gis->nrs", gradients[layer.name].view(shape), p_out, p_in)
        blocks.append(block.flatten(1))
    flat = torch.cat(blocks, dim=1)
    depth = math.ceil(flat.shape[1] / proj_dim)
    signs = random_signs(stream_key(seed, "fold"), 0, flat.shape[1])
    padded = torch.nn.functional.pad(flat * signs, (0, depth * proj_dim - flat.shape[1]))
    return padded.view(len(flat), depth, proj_dim).sum(1)


def time_ratio(estimator: Estimator, encoded: Encoded, draws: Draws, repetitions: int) -> list[float]:
    """Return quartiles of the time of features over that of hooks that project nothing."""
    nothing = replace(estimator, projector=Nothing())
    ratios = []
    for _ in range(repetitions + 1):
        times = []
        for each in (nothing, estimator):
            started = time.perf_counter()
            each.features(encoded, draws)
            times.append(time.perf_counter() - started)
        ratios.append(times[1] / times[0])
    return quartiles(ratios[1:])


def measure_teacher(name: str, seeds: int, repetitions: int, results: Results) -> None:
    """Keep a cell for each projection that is missing."""
    kinds = [("kronecker", *pair) for pair in KRONECKER] + [("rademacher", None, 512), ("rademacher", None, 2048)]
    kinds = [kind for kind in kinds if cell_key(name, seeds, *kind) not in results]
    designs = [(label, rank, 512) for label in DESIGNS for rank in (8, 16)]
    designs = [design for design in designs if cell_key(name, seeds, *design) not in results]
    if not kinds and not designs:
        return
    teacher = load_teacher(name)
    config = FeaturizeConfig.from_flat({"num_draws": NUM_DRAWS, "weighting": "uniform", "micro_batch": 64})
    base = build_estimator(teacher, config, 64, profile=None)
    encoded, draws = read_digits(base)
    gradients, scale = whole_gradients(base, encoded, draws)
    layers = [layer for layer in base.layers if layer.name in gradients]
    truth = sum((g @ g.T).double() for g in gradients.values())
    exact_scores = score_matrix(truth)
    device, dtype = placement(teacher)

    def add(label: str, rank: int | None, proj_dim: int, feature: Callable[[int], Tensor], ratio: object) -> None:
        grams = [(f @ f.T) for f in (feature(seed).double() for seed in range(seeds))]
        error = mean_and_error([same_draw_error(gram, truth) for gram in grams])
        agreed = mean_and_error([agreement(gram, exact_scores) for gram in grams])
        cells = {"error": [error.value, error.standard_error], "agreement": [agreed.value, agreed.standard_error]}
        cell = {"teacher": name, "kind": label, "rank": rank, "proj_dim": proj_dim, **cells, "time": ratio}
        results.add(cell_key(name, seeds, label, rank, proj_dim), cell)
        print(cell, flush=True)

    for kind, rank, proj_dim in kinds:
        settings = replace(config.projection, projection=kind, rank=rank or 1, proj_dim=proj_dim)

        def features(seed: int, settings: object = settings) -> Tensor:
            projector = build_projector(settings, base.layers, seed=seed, device=device, dtype=dtype)
            return replace(base, projector=projector).features(encoded, draws).flatten(0, 1) * scale

        projector = build_projector(settings, base.layers, seed=0, device=device, dtype=dtype)
        ratio = time_ratio(replace(base, projector=projector), encoded, draws, repetitions if rank else 1)
        add(kind, rank, proj_dim, features, ratio)
    for label, rank, proj_dim in designs:

        def alternative(seed: int, label: str = label, rank: int = rank, proj_dim: int = proj_dim) -> Tensor:
            return designed(layers, gradients, rank, proj_dim, seed, DESIGNS[label])

        add(label, rank, proj_dim, alternative, None)


def cell_key(teacher: str, seeds: int, kind: str, rank: int | None, proj_dim: int) -> str:
    """Return the key of a projection's cell."""
    return f"{teacher}/{seeds} seeds/{kind}/rank {rank}/{proj_dim} dims"


@click.command()
@click.option("--teacher", "teachers", multiple=True, default=("demo", "demo-pixels"), show_default=True)
@click.option("--seeds", default=8, show_default=True)
@click.option("--repetitions", default=7, show_default=True)
@click.option("--fresh", is_flag=True, help="Forget what an earlier run measured.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("docs/benchmarks/projection.json"))
def main(teachers: tuple[str, ...], seeds: int, repetitions: int, fresh: bool, output: Path) -> None:
    """Measure every projection that is missing, with both teachers, and print one table."""
    results = Results(output, COMMAND, fresh=fresh)
    for name in teachers:
        measure_teacher(name, seeds, repetitions, results)
    table = Table("teacher", "projection", "rank", "dims", "error", "agreement", "time", title="mean ± standard error")
    for row in results.content["cells"].values():
        shown = ["{:.3f} ± {:.3f}".format(*row[name]) for name in ("error", "agreement")]
        ratio = "{1:.2f} [{0:.2f}, {2:.2f}]".format(*row["time"]) if row["time"] else ""
        table.add_row(row["teacher"], row["kind"], str(row["rank"] or ""), str(row["proj_dim"]), *shown, ratio)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
