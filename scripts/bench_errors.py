"""Do the errors say how wrong scores are? Coverage of intervals, reliability of top-10 probabilities, and refining.

Command:  python scripts/bench_errors.py --teacher demo     (then --teacher demo-pixels; --part refine for the last)
Hardware: 2 CPU cores; about half an hour a teacher, and 40 minutes for refining
Writes:   docs/benchmarks/errors.json, docs/images/reliability.png; a killed run goes on

Indexes of 600 digits are made again and again with another seed, so with other draws and another projection, all else
alike, and queried with 40 other digits. The long-run score of a pair, at the same settings, is its mean over the other
runs; its own error is in the comparison (`1 + 1 / others` times the variance). An interval of a run should hold it in
90 % of cases: overall, among the 100 examples of a query with the largest long-run scores, and among the 100 with the
largest scores in that run, which it chose by its own noise too. Probabilities of the top 10 are compared with who is in
the top 10 by the long-run score. Standard errors are over runs. Beside them: the reported variance over that between
runs, means over pairs, and the share of it that is reported for the projection.

Refining: the top 10 of an index with 8 draws, of the same after `refine=50` to 64 draws, and of one with 64 draws,
against one with 256 other draws; overlap of the top 10, with standard errors over queries. Refined scores of the 50
are also compared with those of the index with 64 draws: the ratio of their sums, and how often intervals of refined
scores, widened by the other's, hold them.
"""

from __future__ import annotations

import io
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
from benchmark import Results
from PIL import Image
from rich.console import Console
from rich.table import Table

from carv_attrib import Attributor, featurize, load_teacher
from carv_attrib.data.sources import open_digits
from carv_attrib.files import atomic_file
from carv_attrib.metrics import top_k_overlap
from carv_attrib.teacher import Teacher

WORK = Path("build/errors")
OUTPUT = Path("docs/benchmarks/errors.json")
NUM_TRAIN, NUM_QUERIES, NUM_RUNS, TOP_K, NUM_FIRST = 600, 40, 12, 10, 100
EDGES = (0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0)
NUM_DRAWS = (4, 8, 16, 64)
FIRST_SEED = 8000
"""Not 1000 to 4000: what errors and intervals are was chosen when runs of these were known."""


@dataclass(frozen=True)
class Runs:
    """What indexes of the same settings and other draws say, each (runs, queries, train)."""

    scores: np.ndarray
    standard_errors: np.ndarray
    projection_errors: np.ndarray
    half_widths: np.ndarray
    probabilities: np.ndarray

    @property
    def long_run(self) -> np.ndarray:
        """For each run, the mean score over the others."""
        others = len(self.scores) - 1
        return (self.scores.sum(0) - self.scores) / others


def queries(teacher: Teacher) -> tuple[list[Image.Image], list[int] | None]:
    """Return the digits that are asked about, and their classes if the teacher takes them."""
    rows = open_digits().select(range(NUM_TRAIN, NUM_TRAIN + NUM_QUERIES))
    pictures = [Image.open(io.BytesIO(cell["bytes"])) for cell in rows.with_format(None)["image"]]
    return pictures, list(rows["label"]) if teacher.condition_kind == "label" else None


def make_index(name: str, teacher: Teacher, **settings: Any) -> Attributor:
    """Return an index of the first digits, made where it is missing."""
    folder = WORK / name / "-".join(f"{key}-{value}" for key, value in settings.items())
    digits = open_digits().select(range(NUM_TRAIN))
    featurize(teacher, digits, folder, latent_cache=str(WORK / name / "latents"), **settings)
    return Attributor.open(folder, teacher=teacher, dataset=digits)


def run_once(name: str, teacher: Teacher, num_draws: int, seed: int) -> tuple[np.ndarray, ...]:
    """Return the arrays of `Runs` for one index."""
    file = WORK / name / f"{num_draws}-{seed}.npz"
    if not file.is_file():
        pictures, labels = queries(teacher)
        found = make_index(name, teacher, num_draws=num_draws, seed=seed).band_scores(pictures, labels=labels)
        errors = (found.standard_errors, found.projection_errors, found.half_widths)
        arrays = (found.scores, *errors, found.top_probabilities(TOP_K))
        with atomic_file(file) as temporary, temporary.open("wb") as opened:
            np.savez(opened, *(values.numpy().astype(np.float32) for values in arrays))
    with np.load(file) as content:
        return tuple(content[key] for key in content.files)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Return the mean of values, one for each run, and the standard error."""
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def coverage(runs: Runs) -> dict[str, tuple[float, float]]:
    """Return how often intervals hold the long-run score: of all pairs, and of the largest of each query."""
    widened = runs.half_widths * (1 + 1 / (len(runs.scores) - 1)) ** 0.5
    inside = np.abs(runs.scores - runs.long_run) <= widened
    found = {"all": mean_and_error(inside.mean((1, 2)))}
    for label, order in {"long-run": runs.long_run, "its own": runs.scores}.items():
        first = np.argsort(-order, axis=2)[:, :, :NUM_FIRST]
        largest = np.take_along_axis(inside, first, axis=2)
        found[f"top {NUM_FIRST}, {label}"] = mean_and_error(largest.mean((1, 2)))
    return found


def variance(runs: Runs) -> dict[str, dict[str, float]]:
    """Return the reported variance over that between runs, and what share of it is of the projection."""
    between = runs.scores.var(0, ddof=1)
    reported, projection = ((errors**2).mean(0) for errors in (runs.standard_errors, runs.projection_errors))
    first = np.argsort(-runs.scores.mean(0), axis=1)[:, :NUM_FIRST]
    found = {}
    for label, order in {"all": np.argsort(between, axis=1), f"top {NUM_FIRST}, long-run": first}.items():
        means = [float(np.take_along_axis(values, order, axis=1).mean()) for values in (reported, between, projection)]
        found[label] = {"reported_over_true": means[0] / means[1], "projection_over_reported": means[2] / means[0]}
    return found


def reliability(runs: Runs) -> list[dict[str, float]]:
    """Return, for probabilities in each interval of `EDGES`, their mean and how often they came true."""
    best = np.argsort(-runs.long_run, axis=2)[:, :, :TOP_K]
    true = np.zeros_like(runs.scores)
    np.put_along_axis(true, best, 1.0, axis=2)
    rows = []
    for low, high in pairwise(EDGES):
        chosen = (runs.probabilities >= low) & (runs.probabilities < (high if high < 1 else 2))
        by_run = np.array([t[c].mean() for t, c in zip(true, chosen, strict=True) if c.any()])
        if len(by_run) > 1:
            _, error = mean_and_error(by_run)
            rows.append(
                {
                    "predicted": float(runs.probabilities[chosen].mean()),
                    "observed": float(true[chosen].mean()),
                    "standard_error": error,
                    "cases": int(chosen.sum()),
                }
            )
    return rows


def measure(name: str, results: Results) -> None:
    """Measure coverage and reliability at several numbers of draws."""
    teacher = load_teacher(name, device="cpu")
    for num_draws in NUM_DRAWS:
        if (key := f"coverage/{name}, {num_draws} draws") in results:
            continue
        arrays = [run_once(name, teacher, num_draws, FIRST_SEED + run) for run in range(NUM_RUNS)]
        runs = Runs(*(np.stack(column).astype(np.float64) for column in zip(*arrays, strict=True)))
        results.add(key, {"coverage": coverage(runs), "variance": variance(runs), "reliability": reliability(runs)})


def refine(name: str, results: Results) -> None:
    """Measure what refining 50 candidates does to the top 10, and to scores and their intervals."""
    if (key := f"refine/{name}") in results:
        return
    teacher = load_teacher(name, device="cpu")
    pictures, labels = queries(teacher)
    reference = make_index(name, teacher, num_draws=256, seed=5000).scores(pictures, labels=labels)
    full = make_index(name, teacher, num_draws=64, seed=6000).band_scores(pictures, labels=labels)
    full_scores, full_widths = full.scores.numpy(), full.half_widths.numpy()
    index = make_index(name, teacher, num_draws=8, seed=7000)
    shutil.rmtree(index.store.path / "references", ignore_errors=True)  # so that the first query draws them
    refined, scales, held, evaluations = np.full_like(full_scores, -np.inf), [], [], []
    for row, picture in enumerate(pictures):
        result = index.query(picture, label=labels[row] if labels else None, refine=50, top_k=50)
        refined[row, result.ids] = result.scores
        expected, width = full_scores[row, result.ids], full_widths[row, result.ids]
        scales.append(result.scores.sum() / expected.sum())
        reach = np.hypot([(match.high - match.low) / 2 for match in result.proponents], width)
        held.append((np.abs(result.scores - expected) <= reach).mean())
        evaluations.append(int(result.cost["network_evaluations"]))
    found = {"8 draws": index.scores(pictures, labels=labels), "8 draws, 50 refined to 64": refined}
    found |= {"64 draws": full_scores}
    overlaps = {label: top_k_overlap(scores, reference, TOP_K) for label, scores in found.items()}
    results.add(
        key,
        {
            "overlap_with_256_draws": {label: mean_and_error(values) for label, values in overlaps.items()},
            "refined_less_full": mean_and_error(overlaps["8 draws, 50 refined to 64"] - overlaps["64 draws"]),
            "refined_over_full": mean_and_error(np.array(scales)),
            "intervals_of_refined_hold_full": mean_and_error(np.array(held)),
            "evaluations_first_query": evaluations[0],
            "evaluations_later_query": float(np.mean(evaluations[1:])),
            "evaluations_64_draws_of_all": 64 * NUM_TRAIN,
        },
    )


def save_plot(results: Results, path: Path) -> None:
    """Draw observed against predicted probabilities."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for label, cell in results.of_part("coverage").items():
        rows = cell["reliability"]
        predicted, observed, errors = ([row[k] for row in rows] for k in ("predicted", "observed", "standard_error"))
        axes.errorbar(predicted, observed, yerr=errors, marker="o", markersize=3, linewidth=1, label=label)
    axes.set(xlabel=f"probability of the top {TOP_K}", ylabel="share that is in it", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def print_tables(results: Results) -> None:
    """Print coverage, and the overlaps of refining."""
    first = (f"among the top {NUM_FIRST}, {label}" for label in ("long-run", "its own"))
    table = Table("index", "coverage of 90 % intervals", *first, "reported / true variance", "of the projection")
    for label, cell in results.of_part("coverage").items():
        coverages = ("{:.3f} ± {:.3f}".format(*pair) for pair in cell["coverage"].values())
        variances = (f"{value:.2f}" for value in cell["variance"]["all"].values())
        table.add_row(label, *coverages, *variances)
    Console().print(table)
    for name, cell in results.of_part("refine").items():
        table = Table(name, f"overlap of the top {TOP_K} with 256 draws")
        for label, pair in cell["overlap_with_256_draws"].items():
            table.add_row(label, "{:.3f} ± {:.3f}".format(*pair))
        Console().print(table, {k: v for k, v in cell.items() if not k.startswith("overlap")})


@click.command()
@click.option("--teacher", type=click.Choice(["demo", "demo-pixels"]), default="demo", show_default=True)
@click.option("--part", type=click.Choice(["coverage", "refine"]), default="coverage", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, show_default=True)
@click.option("--fresh", is_flag=True, help="Measure everything again.")
def main(teacher: str, part: str, output: Path, fresh: bool) -> None:
    """Measure what is missing, print the tables and draw the plot."""
    results = Results(output, "python scripts/bench_errors.py", fresh=fresh)
    (measure if part == "coverage" else refine)(teacher, results)
    print_tables(results)
    save_plot(results, Path("docs/images/reliability.png"))


if __name__ == "__main__":
    main()
