"""What a precision costs in accuracy and saves in time: features and scores against those in float64.

Command:  python scripts/bench_precision.py
Hardware: 2 CPU cores, about 6 minutes
Writes:   docs/benchmarks/precision.json and the table that it prints

200 training digits and 40 held-out queries (other digits), 8 draws, defaults otherwise, for both packaged teachers.
Draws, weighting and projection are the same in all rows. Relative error: of a feature, over its norm. Agreement:
Spearman correlation, over the training digits, of preconditioned scores with those in float64. Means and standard
errors over examples and over queries. Time: of features over that in float32, median and quartiles over repetitions
in which all take turns; on a processor without bfloat16 instructions the low precisions are emulated, and slow.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from benchmark import describe_machine, quartiles
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor

from carv_attrib import load_teacher
from carv_attrib.batches import encode_batch, read_batch
from carv_attrib.config import EstimatorConfig, FeaturizeConfig, ProjectionConfig
from carv_attrib.data import open_dataset
from carv_attrib.estimator import Encoded, Estimator, average_bands, build_estimator
from carv_attrib.kernel import DEFAULT_DAMPING, kernel_of
from carv_attrib.manifest import run_pilot
from carv_attrib.memory import less_memory
from carv_attrib.sampling import Draws
from carv_attrib.scores import score_bands
from carv_attrib.variance import mean_and_error

NUM_TRAIN, NUM_QUERIES = 200, 40
REFERENCE = "float64"
SETTINGS: dict[str, dict[str, Any]] = {
    REFERENCE: {"dtype": "float64"},
    "float32": {},
    "float32, channels_last": {"channels_last": True},
    "float32, gradient_checkpointing": {"gradient_checkpointing": True},
    "bfloat16 autocast": {"autocast": True},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
}


def prepare(name: str, settings: dict[str, Any], profile: Any) -> tuple[Estimator, Encoded]:
    """Return an estimator and the encoded digits, training examples first."""
    config = FeaturizeConfig.from_flat({"device": "cuda" if torch.cuda.is_available() else "cpu", **settings})
    teacher = load_teacher(name, device=config.execution.device, dtype=config.storage.dtype)
    estimator = build_estimator(teacher, config, 64, profile)
    examples = open_dataset("digits")
    rows = np.linspace(0, len(examples) - 1, NUM_TRAIN + NUM_QUERIES).astype(int)
    queries = rows[:: (NUM_TRAIN + NUM_QUERIES) // NUM_QUERIES]
    order = [*np.setdiff1d(rows, queries).tolist(), *queries.tolist()]
    return estimator, encode_batch(estimator, read_batch(examples, order, teacher, skip_bad=False))


def scores(features: Tensor, draws: Draws, config: EstimatorConfig) -> Tensor:
    """Return preconditioned scores (queries, train), kernel over the bands of the training digits."""
    bands = average_bands(features, draws, config)
    kernel = kernel_of(bands[:-NUM_QUERIES], ProjectionConfig().block_size(bands.shape[-1]))
    bands = kernel.banded(bands)
    inverse = kernel.inverse("preconditioned", DEFAULT_DAMPING)
    return score_bands(bands[-NUM_QUERIES:], bands[:-NUM_QUERIES], inverse).scores


def measure_teacher(name: str, repetitions: int) -> list[dict[str, Any]]:
    """Return a row for each setting."""
    pilot = FeaturizeConfig.from_flat({})
    profile = run_pilot(load_teacher(name, device="cpu"), open_dataset("digits"), pilot, 64)
    prepared = {label: prepare(name, settings, profile) for label, settings in SETTINGS.items()}
    reference = prepared[REFERENCE][0]
    draws, config = reference.draws([0]), reference.config
    features: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {label: [] for label in prepared}
    for _ in range(repetitions + 1):
        for label, (estimator, encoded) in prepared.items():
            savers = FeaturizeConfig.from_flat(SETTINGS[label]).execution.memory_savers
            with less_memory(estimator.teacher.denoiser, **savers):
                started = time.perf_counter()
                features[label] = estimator.features(encoded, draws)
                seconds[label].append(time.perf_counter() - started)
    exact, exact_scores = features[REFERENCE].double().flatten(1), scores(features[REFERENCE], draws, config)
    rows = []
    for label in SETTINGS:
        errors = (features[label].double().flatten(1) - exact).norm(dim=1) / exact.norm(dim=1)
        pairs = zip(scores(features[label], draws, config), exact_scores, strict=True)
        agreement = mean_and_error([spearmanr(ours, exact_row).statistic for ours, exact_row in pairs])
        error = mean_and_error(errors.tolist())
        ratios = np.array(seconds[label][1:]) / np.array(seconds["float32"][1:])
        rows.append(
            {
                "teacher": name,
                "setting": label,
                "relative_error": [error.value, error.standard_error],
                "agreement": [agreement.value, agreement.standard_error],
                "time": quartiles(ratios),
            }
        )
    return rows


@click.command()
@click.option("--teacher", "teachers", multiple=True, default=("demo", "demo-pixels"), show_default=True)
@click.option("--repetitions", default=3, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("docs/benchmarks/precision.json"))
def main(teachers: tuple[str, ...], repetitions: int, output: Path) -> None:
    """Measure every setting with both teachers, and print one table."""
    rows = [row for name in teachers for row in measure_teacher(name, repetitions)]
    result = {"command": "python scripts/bench_precision.py", "machine": describe_machine(), "rows": rows}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    table = Table("teacher", "setting", "relative error", "agreement", "time")
    for row in rows:
        error, agreement = row["relative_error"], row["agreement"]
        shown = [f"{error[0]:.1e} ± {error[1]:.0e}", f"{agreement[0]:.5f} ± {agreement[1]:.5f}"]
        table.add_row(row["teacher"], row["setting"], *shown, "{1:.2f} [{0:.2f}, {2:.2f}]".format(*row["time"]))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
