"""Do scores predict what retraining does? LDS of ours, of the recipes of TRAK and D-TRAK, and of baselines.

Command:  python scripts/bench_lds.py --task demo     (then --task pixels; needs make_lds_ground_truth.py before)
Hardware: 2 CPU cores; 1.5 minutes for 1,897 images at 16 draws, in proportion for other numbers
Writes:   docs/benchmarks/lds/TASK/lds.json after every method, and the table that it prints; scores are kept in
          build/lds/TASK, so that a killed run goes on and a larger ground truth needs no new features

Methods are settings of `featurize` and of the query. Each is scored at every damping of a grid; the damping is chosen
on the even subsets, and the odd ones are reported, for all methods alike. The recipes of TRAK and D-TRAK have their
draws, objective, weighting and kernel, but the projection of this package. Mean over queries of the rank correlation
over subsets; standard errors by a bootstrap over subsets and queries, and of the difference to the default by the same
resamples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from benchmark import describe_machine
from make_lds_ground_truth import FOLDER, TASKS
from PIL import Image
from rich.console import Console
from rich.table import Table

from carv_attrib import Attributor, featurize, load_teacher
from carv_attrib.data import to_pixels
from carv_attrib.data.sources import open_digits
from carv_attrib.evaluation import GroundTruth
from carv_attrib.metrics import paired_differences, predicted_losses, seed_ceiling, spearman
from carv_attrib.seeding import stream
from carv_attrib.teacher import Teacher

WORK = Path("build/lds")
DAMPINGS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
DEFAULT = "ours, 4 draws"
TRAK = {"scheme": "iid", "noise": "independent", "weighting": "uniform", "num_bands": 1}
DTRAK = {"scheme": "grid", "objective": "squared-norm", "weighting": "uniform", "num_bands": 1}


@dataclass(frozen=True)
class Method:
    """Settings of an index, and of its queries.

    Attributes:
        settings: of `featurize`.
        choice: of `Attributor.scores`, but for the damping.
    """

    settings: dict[str, Any]
    choice: dict[str, Any] = field(default_factory=dict)


def methods() -> dict[str, Method]:
    """Return the methods by name, the quick ones first."""
    found = {f"ours, {k} draws": Method({"num_draws": k, "num_bands": min(k, 4)}) for k in (1, 2, 4, 8, 16, 64)}
    found |= {
        f"ours, 16 draws, {bands} bands": Method({"num_draws": 16, "num_bands": bands}) for bands in (1, 2, 8, 16)
    }
    found |= {f"ours, {k} draws, kernel means": Method({"num_draws": k}, {"kernel": "means"}) for k in (4, 16)}
    found |= {f"ours, {k} draws, cosine": Method({"num_draws": k}, {"score": "preconditioned-cosine"}) for k in (4, 16)}
    found |= {
        f"ours, 16 draws, {name}": Method({"num_draws": 16, "objective": name}) for name in ("squared-norm", "mean")
    }
    found["ours, 16 draws, uniform weighting"] = Method({"num_draws": 16, "weighting": "uniform"})
    found["ours, 16 draws, independent noise"] = Method({"num_draws": 16, "noise": "independent"})
    found["ours, 16 draws, antithetic"] = Method({"num_draws": 16, "scheme": "antithetic"})
    found |= {f"ours, 4 draws, {d} dims": Method({"num_draws": 4, "proj_dim": d}) for d in (128, 256, 1024, 2048)}
    found |= {f"ours, 4 draws, rank {r}": Method({"num_draws": 4, "rank": r}) for r in (4, 16)}
    found |= {f"TRAK, {k} draws": Method({**TRAK, "num_draws": k}, {"kernel": "means"}) for k in (4, 16, 64)}
    found |= {f"D-TRAK, {k} draws": Method({**DTRAK, "num_draws": k}, {"kernel": "means"}) for k in (10, 100)}
    return dict(sorted(found.items(), key=lambda pair: pair[1].settings["num_draws"]))


def score(name: str, method: Method, task: str, teacher: Teacher, truth: GroundTruth) -> dict[str, np.ndarray]:
    """Return the scores of a method at every damping; they and the index are made where they are missing."""
    file = WORK / task / f"{name}.npz"
    if file.is_file():
        with np.load(file) as content:
            return dict(content)
    slug = "-".join(f"{key}={value}" for key, value in sorted(method.settings.items()))
    digits = open_digits().select(truth.train_ids).add_column("id", truth.train_ids.tolist())
    settings = {"num_bands": min(4, method.settings["num_draws"]), **method.settings}
    featurize(
        teacher, digits, WORK / task / slug, id_column="id", latent_cache=str(WORK / task / "latents"), **settings
    )
    attributor = Attributor.open(WORK / task / slug, teacher=teacher)
    scores = {str(d): truth.scores(attributor, damping=d, **method.choice).astype(np.float32) for d in DAMPINGS}
    np.savez(file, **scores)
    return scores


def baselines(teacher: Teacher, truth: GroundTruth) -> dict[str, np.ndarray]:
    """Return random scores, and cosines of pixels and of latents."""
    digits = open_digits().select(truth.train_ids)
    train = [Image.frombytes("L", (8, 8), cell["bytes"][-64:]) for cell in digits["image"]]
    sides = [
        torch.stack([to_pixels(picture, teacher.pixel_spec) for picture in pictures])
        for pictures in ([Image.fromarray(x) for x in truth.query_images], train)
    ]
    found = {"random": stream(0, "random scores").standard_normal((len(truth.query_images), len(train)))}
    for name, encode in (("pixel cosine", lambda x: (x + 1) / 2), ("latent cosine", teacher.encode)):
        query, example = (torch.nn.functional.normalize(encode(side).flatten(1), dim=1) for side in sides)
        found[name] = (query @ example.T).numpy()
    return found


def chosen(
    scores: dict[str, np.ndarray], truth: GroundTruth, queries: np.ndarray, even: np.ndarray
) -> Iterator[tuple[str, float]]:
    """Yield each damping and its LDS on the even subsets."""
    losses = truth.losses[even][:, :, queries].mean((1, 3))
    for damping, own in scores.items():
        yield damping, float(spearman(predicted_losses(own[queries], truth.masks[even]), losses).mean())


def evaluate(scores: dict[str, dict[str, np.ndarray]], truth: GroundTruth) -> dict[str, Any]:
    """Return, for each kind of query, the LDS of every method on the odd subsets, and the ceiling there."""
    subsets = np.arange(len(truth.masks))
    even, odd = subsets[::2], subsets[1::2]
    result: dict[str, Any] = {}
    for kind in dict.fromkeys(truth.query_kinds.tolist()):
        queries = np.flatnonzero(truth.query_kinds == kind)
        losses = truth.losses[odd][:, :, queries].mean(3)
        best = {name: max(chosen(own, truth, queries, even), key=lambda pair: pair[1]) for name, own in scores.items()}
        predicted = {
            name: predicted_losses(own[best[name][0]][queries], truth.masks[odd]) for name, own in scores.items()
        }
        random = {"nothing": np.zeros_like(next(iter(predicted.values())))}
        values = paired_differences(predicted | random, losses.mean(1), "nothing")
        differences = paired_differences(predicted, losses.mean(1), DEFAULT) if DEFAULT in predicted else {}
        rows = {
            name: {
                "lds": [values[name].value, values[name].standard_error],
                "less_default": [differences[name].value, differences[name].standard_error] if differences else None,
                "damping": best[name][0],
                "by_damping_even": dict(chosen(scores[name], truth, queries, even)),
            }
            for name in scores
        }
        both = seed_ceiling(losses)
        result[kind] = {
            "seed_to_seed": list(vars(both[0]).values()),
            "ceiling": list(vars(both[1]).values()),
            "rows": rows,
        }
    return result


def print_table(result: dict[str, Any]) -> None:
    """Print the LDS of every method for each kind of query."""
    table = Table("method", *(f"{kind}: {column}" for kind in result for column in ("LDS", "less default", "damping")))
    for name in next(iter(result.values()))["rows"]:
        cells = []
        for kind in result:
            row = result[kind]["rows"][name]
            less = row["less_default"]
            cells += [
                "{:.3f} ± {:.3f}".format(*row["lds"]),
                "{:+.3f} ± {:.3f}".format(*less) if less else "",
                row["damping"],
            ]
        table.add_row(name, *cells)
    for label in ("seed_to_seed", "ceiling"):
        cells = [cell for kind in result for cell in ("{:.3f} ± {:.3f}".format(*result[kind][label]), "", "")]
        table.add_row(label.replace("_", " "), *cells)
    Console(width=140).print(table)


@click.command()
@click.option("--task", type=click.Choice(list(TASKS)), required=True)
@click.option("--only", default="", help="Measure only methods whose names hold this text.")
@click.option("--most-draws", default=100, show_default=True)
def main(task: str, only: str, most_draws: int) -> None:
    """Score every method that is missing, and print the table."""
    folder = FOLDER / task
    truth = GroundTruth.load(folder / "ground-truth.npz")
    teacher = load_teacher(folder / "teacher", device="cpu")
    scores = {name: {"": own} for name, own in baselines(teacher, truth).items()}
    for name, method in methods().items():
        if only in name and method.settings["num_draws"] <= most_draws:
            print(name, flush=True)
            scores[name] = score(name, method, task, teacher, truth)
    result = {
        "command": f"python scripts/bench_lds.py --task {task}",
        "machine": describe_machine(),
        "subsets": len(truth.masks),
        "seeds": truth.losses.shape[1],
        "queries": evaluate(scores, truth),
    }
    (folder / "lds.json").write_text(json.dumps(result, indent=1) + "\n")
    print_table(result["queries"])


if __name__ == "__main__":
    main()
