"""What are the first examples of a query worth? By the losses of the models that were trained on random subsets.

Command:  python scripts/bench_first_examples.py     (needs bench_lds.py of both tasks before, whose scores it takes)
Hardware: 2 CPU cores, 5 minutes
Writes:   docs/benchmarks/lds/first-examples.json, and the tables that it prints

Removing the first examples and training again costs a model for each query and method. The models of the ground truth
say the same without training: where a subset happens to hold more of the first 1, 5 or 10 %, the loss of the query is
less. Reported is the slope of that regression times the number of examples, the rise of the loss by losing all of them
if it were linear, beside as many others from a random half: mean over the queries, on the odd subsets. Ours are at
`auto` damping; that of every other method is the best of the grid on the even subsets, for each share. Standard errors
by a bootstrap over subsets and queries, of differences by the same resamples.
"""

from __future__ import annotations

import json
from dataclasses import astuple
from typing import Any

import click
import numpy as np
from bench_lds import Ours, baselines, best, methods
from benchmark import describe_machine
from lds_inputs import DAMPINGS, Inputs
from make_lds_ground_truth import FOLDER, TASKS
from rich.console import Console
from rich.table import Table

from carv_attrib import load_teacher
from carv_attrib.evaluation import GroundTruth
from carv_attrib.files import atomic_file
from carv_attrib.metrics import measured, resamples, top_k_effect

SHARES = (0.01, 0.05, 0.1)
REFERENCE = "D-TRAK, 10 draws"
METHODS = [
    "ours, 4 draws",
    "ours, 8 draws",
    "ours, 16 draws",
    "ours, 16 draws, 8 bands",
    "ours, 16 draws, 16 bands",
    REFERENCE,
]
AT_DAMPINGS = "ours, 16 draws, 8 bands"
NUM_BOOTSTRAP = 200


def all_scores(task: str, truth: GroundTruth) -> dict[str, dict[str, np.ndarray]]:
    """Return the scores of each row of the table at the dampings that it may have."""
    inputs = Inputs(task, load_teacher(FOLDER / task / "teacher", device="cpu"), truth)
    known, found = methods(), {}
    for name in METHODS:
        own = known[name].scores(inputs)
        found[name] = {"auto": own["auto"]} if isinstance(known[name], Ours) else own
        if name == AT_DAMPINGS:
            found |= {f"{name}, damping {damping}": {"": own[str(damping)]} for damping in DAMPINGS}
    return found | {name: {"": own} for name, own in baselines(task, truth).items()}


def effects(
    scores: dict[str, dict[str, np.ndarray]], truth: GroundTruth, top_k: int
) -> dict[str, dict[str, tuple[float, float]]]:
    """Return the effect of the first examples of each method, and that less the reference's, with errors."""
    losses, subsets = truth.losses.mean((1, 3)), np.arange(len(truth.masks))
    even, odd = subsets[::2], subsets[1::2]
    chosen = {}
    for name, own in scores.items():
        on_even = {key: float(top_k_effect(s, truth.masks[even], losses[even], top_k).mean()) for key, s in own.items()}
        chosen[name] = own[best(on_even)]
    means: dict[str, list[float]] = {name: [] for name in chosen}
    for rows, queries in resamples(len(odd), losses.shape[1], num_bootstrap=NUM_BOOTSTRAP):
        for name, own in chosen.items():
            found = top_k_effect(own, truth.masks[odd[rows]], losses[odd[rows]], top_k)
            means[name].append(float(found[queries].mean()))
    reference = np.array(means[REFERENCE])
    return {
        name: {
            "effect": astuple(measured(np.array(own))),
            "less_reference": astuple(measured(np.array(own) - reference)),
        }
        for name, own in means.items()
    }


def print_table(result: dict[str, Any]) -> None:
    """Print the effects, with a column for each task and share."""
    columns = [(task, share) for task, shares in result.items() for share in shares]
    table = Table("first examples of", *(f"{task}: {float(share):.0%}" for task, share in columns))
    for name in result[columns[0][0]][columns[0][1]]:
        cells = [result[task][share][name] for task, share in columns]
        table.add_row(
            name,
            *("{:.4f} ± {:.4f} ({:+.4f} ± {:.4f})".format(*cell["effect"], *cell["less_reference"]) for cell in cells),
        )
    Console(width=240).print(table)


@click.command()
def main() -> None:
    """Measure both tasks."""
    result: dict[str, Any] = {}
    for task in TASKS:
        truth = GroundTruth.load(FOLDER / task / "ground-truth.npz")
        scores = all_scores(task, truth)
        counts = {share: round(share * len(truth.train_ids)) for share in SHARES}
        result[task] = {str(share): effects(scores, truth, count) for share, count in counts.items()}
    content = {"command": "python scripts/bench_first_examples.py", "machine": describe_machine(), "tasks": result}
    with atomic_file(FOLDER / "first-examples.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    print_table(result)


if __name__ == "__main__":
    main()
