"""What `plan` foretold against what `featurize` then took and had, on the digits with the packaged teacher.

Command:  python scripts/check_plan.py
Hardware: 2 CPU cores, about 10 minutes
Writes:   docs/benchmarks/plan.json and the tables that it prints

Full run: plan with a budget, featurize with what it recommends in a fresh process, then on 64 examples that were not in
the pilot replicates of their features and scores, with other draws at the same settings. Random encoding: with flipped
pictures and one band, variance times seconds at several K, against what the plan says of them.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import click
import torch
from benchmark import describe_machine
from rich.console import Console
from rich.table import Table
from torch import Tensor

from carv_attrib import load_teacher
from carv_attrib.batches import Batch, encode_batch, read_batch
from carv_attrib.config import FeaturizeConfig
from carv_attrib.data import open_dataset
from carv_attrib.estimator import PILOT_EXAMPLES, Estimator, average_bands, build_estimator
from carv_attrib.kernel import load_kernel
from carv_attrib.manifest import pilot_rows, restore_estimator
from carv_attrib.planning import Plan, plan
from carv_attrib.planning.forecast import jackknife_error, mean_product, sampling_variance
from carv_attrib.planning.pilot import pilot_scores
from carv_attrib.planning.report import save_plot
from carv_attrib.store import FeatureStore
from carv_attrib.teacher import Teacher
from carv_attrib.variance import Measured

NUM_EXAMPLES = 64
REPLICATES = 24
ENCODING_REPLICATES = 8
NUM_DRAWS = (1, 2, 4, 8, 16)
CHILD = """
import json, pathlib, re, sys, time
from carv_attrib import featurize, load_teacher
teacher = load_teacher("demo")
started = time.perf_counter()
featurize(teacher, "digits", sys.argv[1], **json.loads(sys.argv[2]))
seconds = time.perf_counter() - started
peak = re.search(r"VmHWM:\\s*(\\d+) kB", pathlib.Path("/proc/self/status").read_text())  # ru_maxrss has the parent's
print(json.dumps([seconds, 1024 * int(peak[1])]))
"""


def other_examples(teacher: Teacher, config: FeaturizeConfig) -> Batch:
    """Return examples that are not in the pilot."""
    examples = open_dataset("digits")
    rows = pilot_rows(examples, config, PILOT_EXAMPLES + NUM_EXAMPLES)[PILOT_EXAMPLES:]
    return read_batch(examples, rows, teacher, skip_bad=False)


def replicate(estimator: Estimator, batch: Batch, seed: int) -> tuple[Tensor, Tensor]:
    """Return features and bands with the encodings and draws of another seed, and the same projection."""
    reseeded = replace(estimator, config=replace(estimator.config, seed=1_000_000 + seed))
    draws = reseeded.draws(batch.ids.tolist())
    features = reseeded.features(encode_batch(reseeded, batch), draws)
    return features.mean(1), average_bands(features, draws, reseeded.config)


def feature_error(features: Tensor) -> float:
    """Return the Monte-Carlo error of replicated features over their norm."""
    return math.sqrt(sampling_variance(features) * features.shape[1] / mean_product(features, features))


def score_snr(scores: Tensor) -> float:
    """Return the spread of expected scores over examples, over the standard error of a score."""
    centred = scores.double() - scores.double().mean(2, keepdim=True)
    spread = mean_product(centred, centred) / (scores.shape[1] * (scores.shape[2] - 1))
    return math.sqrt(max(spread, 0) / sampling_variance(scores[..., None]))


def over_replicates(quantity, replicates: Tensor) -> Measured:
    """Return a quantity with its jackknife error over replicates."""
    rows = torch.arange(len(replicates))
    return Measured(quantity(replicates), jackknife_error([quantity(replicates[rows != m]) for m in rows]))


def row(name: str, predicted: Measured, measured: Measured) -> dict[str, object]:
    """Return predicted and measured figures and their ratio, with standard errors (0 where there is none)."""
    relative = [x.standard_error / x.value for x in (predicted, measured)]
    ratio = measured.value / predicted.value
    return {
        "quantity": name,
        "predicted": asdict(predicted),
        "measured": asdict(measured),
        "ratio": asdict(Measured(ratio, ratio * math.hypot(*relative))),
    }


def full_run(teacher: Teacher, budget: str, plot: Path) -> tuple[Plan, list[dict[str, object]]]:
    """Return a plan, and what came of it."""
    made = plan(teacher, "digits", budget=budget)
    save_plot(made, plot)
    best = made.recommended
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-c", CHILD, folder, json.dumps(made.settings)]
        output = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        seconds, memory = json.loads(output.splitlines()[-1])
        store = FeatureStore.open(folder)
        disk = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        kernel = load_kernel(Path(folder) / "kernel.safetensors")
        estimator = restore_estimator(teacher, store.manifest)
    batch = other_examples(teacher, FeaturizeConfig.from_flat(made.settings))
    found = [replicate(estimator, batch, m) for m in range(REPLICATES)]
    features = torch.stack([one for one, _ in found])
    scores = torch.stack([pilot_scores(kernel, bands) for _, bands in found])
    return made, [
        row("seconds", best.seconds, Measured(seconds, 0.0)),
        row("feature error", best.feature_error, over_replicates(feature_error, features)),
        row("score SNR", best.score_snr, over_replicates(score_snr, scores)),
        row("disk bytes", Measured(best.disk_bytes, 0.0), Measured(disk, 0.0)),
        row("memory bytes", Measured(best.memory_bytes, 0.0), Measured(memory, 0.0)),
    ]


def random_encoding(teacher: Teacher) -> dict[str, object]:
    """Return variance times seconds at several K, foretold and measured, where pictures are flipped at random."""
    settings = {"augmentation": "flip", "num_bands": 1, "scheme": "stratified", "micro_batch": NUM_EXAMPLES}
    made = plan(teacher, "digits", budget="1h", **settings)
    (candidate,) = made.candidates
    batch = other_examples(teacher, FeaturizeConfig.from_flat({**settings, "num_draws": 1}))
    profile, best = made.profile, made.best_num_draws
    rows = []
    for num_draws in sorted({*NUM_DRAWS, best}):
        config = FeaturizeConfig.from_flat({**settings, "num_draws": num_draws})
        estimator = build_estimator(teacher, config, NUM_EXAMPLES, profile)
        replicate(estimator, batch, 99)
        seconds, found = [], []
        for m in range(ENCODING_REPLICATES):
            started = time.perf_counter()
            found.append(replicate(estimator, batch, m)[0])
            seconds.append((time.perf_counter() - started) / NUM_EXAMPLES)
        variance = over_replicates(sampling_variance, torch.stack(found))
        cost = float(torch.tensor(seconds).median())
        draw = made.costs.units.draw.value
        expected_cost = made.costs.upstream_seconds(estimator.examples_per_call) + num_draws * draw
        rows.append(
            {
                "num_draws": num_draws,
                "predicted_variance": candidate.moments.feature_variance(1, num_draws),
                "variance": asdict(variance),
                "predicted_seconds": expected_cost,
                "seconds": cost,
                "predicted_product": candidate.moments.feature_variance(1, num_draws) * expected_cost,
                "product": asdict(Measured(variance.value * cost, variance.standard_error * cost)),
            }
        )
    least = min(rows, key=lambda r: r["product"]["value"])
    at_best = next(r for r in rows if r["num_draws"] == best)
    return {
        "predicted_best": best,
        "measured_best": least["num_draws"],
        "loss_at_predicted_best": at_best["product"]["value"] / least["product"]["value"],
        "rows": rows,
    }


def print_tables(runs: Sequence[list[dict]], encoding: dict) -> None:
    """Print what is written."""
    console = Console(width=110)
    for run in runs:
        table = Table("quantity", "predicted", "measured", "measured / predicted")
        for one in run:
            cells = ["{value:.4g} ± {standard_error:.2g}".format(**one[k]) for k in ("predicted", "measured", "ratio")]
            table.add_row(one["quantity"], *cells)
        console.print(table)
    table = Table("K", "variance", "predicted", "ms", "predicted", "product", "predicted")
    for one in encoding["rows"]:
        table.add_row(
            str(one["num_draws"]),
            "{value:.4g} ± {standard_error:.2g}".format(**one["variance"]),
            f"{one['predicted_variance']:.4g}",
            f"{1e3 * one['seconds']:.3g}",
            f"{1e3 * one['predicted_seconds']:.3g}",
            "{value:.4g} ± {standard_error:.2g}".format(**one["product"]),
            f"{one['predicted_product']:.4g}",
        )
    console.print(table)
    words = "predicted K* {predicted_best}, measured {measured_best}; variance x time at the predicted over the least"
    console.print((words + ": {loss_at_predicted_best:.3f}").format(**encoding))


@click.command()
@click.option("--budget", multiple=True, default=("70s", "2m"), show_default=True, help="Each gets a full run.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("docs/benchmarks/plan.json"))
@click.option("--plot", type=click.Path(path_type=Path), default=Path("docs/images/plan.png"))
def main(budget: tuple[str, ...], output: Path, plot: Path) -> None:
    """Compare plans with what came of them."""
    teacher = load_teacher("demo")
    made, runs = zip(*(full_run(teacher, one, plot) for one in budget), strict=True)
    encoding = random_encoding(teacher)
    result = {
        "command": "python scripts/check_plan.py",
        "machine": describe_machine(),
        "runs": [
            {"budget": one, "recommended": p.to_dict()["recommended"], "pilot_seconds": p.pilot_seconds, "rows": rows}
            for one, p, rows in zip(budget, made, runs, strict=True)
        ],
        "random_encoding": encoding,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print_tables(runs, encoding)


if __name__ == "__main__":
    main()
