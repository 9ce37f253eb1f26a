"""Do scores predict what retraining does? LDS of ours, of the recipes of TRAK and D-TRAK, and of baselines.

Command:  python scripts/bench_lds.py --task demo     (then --task pixels; needs make_lds_ground_truth.py before)
Hardware: 2 CPU cores
Writes:   docs/benchmarks/lds/TASK/lds.json, and the table that it prints; scores are kept in build/lds/TASK, so that a
          killed run goes on, and a larger ground truth needs no new features

Methods are settings of `featurize` and of the query. Each is scored at every damping of a grid; the damping is chosen
on the even subsets, and the odd ones are reported, for all methods alike. The recipes of TRAK and D-TRAK have their
draws, objective, weighting and kernel, but the projection of this package. Mean over queries of the rank correlation
over subsets; standard errors by a bootstrap over subsets and queries, and of the difference to the default by the same
resamples.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from benchmark import describe_machine
from make_lds_ground_truth import FOLDER, TASKS, load_digits, query_pixels
from rich.console import Console
from rich.table import Table

from carv_attrib import featurize, load_teacher
from carv_attrib.data.sources import open_digits
from carv_attrib.estimator import Estimator, average_bands
from carv_attrib.evaluation import GroundTruth
from carv_attrib.kernel import KernelKind, ScoreKind, fit_kernel, similarity
from carv_attrib.manifest import restore_estimator
from carv_attrib.metrics import measured, predicted_losses, resampled_lds, seed_ceiling, spearman
from carv_attrib.seeding import stream
from carv_attrib.store import FeatureStore, atomic_file
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
        kernel: over draws or means.
        score: of the query.
    """

    settings: dict[str, Any]
    kernel: KernelKind = "draws"
    score: ScoreKind = "preconditioned"


def methods() -> dict[str, Method]:
    """Return the methods by name, the quick ones first."""
    found = {f"ours, {k} draws": Method({"num_draws": k}) for k in (1, 2, 4, 8, 16, 64)}
    for bands in (1, 2, 8, 16):
        found[f"ours, 16 draws, {bands} bands"] = Method({"num_draws": 16, "num_bands": bands})
    for k in (4, 16):
        found[f"ours, {k} draws, kernel means"] = Method({"num_draws": k}, "means")
        found[f"ours, {k} draws, cosine"] = Method({"num_draws": k}, score="preconditioned-cosine")
    for objective in ("squared-norm", "mean"):
        found[f"ours, 16 draws, {objective}"] = Method({"num_draws": 16, "objective": objective})
    found["ours, 16 draws, uniform weighting"] = Method({"num_draws": 16, "weighting": "uniform"})
    found["ours, 16 draws, independent noise"] = Method({"num_draws": 16, "noise": "independent"})
    found["ours, 16 draws, antithetic"] = Method({"num_draws": 16, "scheme": "antithetic"})
    found |= {f"ours, 4 draws, {d} dims": Method({"num_draws": 4, "proj_dim": d}) for d in (128, 256, 1024, 2048)}
    found |= {f"ours, 4 draws, rank {r}": Method({"num_draws": 4, "rank": r}) for r in (4, 16)}
    found |= {f"TRAK, {k} draws": Method({**TRAK, "num_draws": k}, "means") for k in (4, 16, 64)}
    found |= {f"D-TRAK, {k} draws": Method({**DTRAK, "num_draws": k}, "means") for k in (10, 100)}
    return dict(sorted(found.items(), key=lambda pair: pair[1].settings["num_draws"]))


def score(method: Method, task: str, teacher: Teacher, truth: GroundTruth) -> dict[str, np.ndarray]:
    """Return the scores of a method at every damping; they and the index are made where they are missing."""
    settings = {"num_bands": min(4, method.settings["num_draws"]), **method.settings}
    folder = WORK / task / named(settings, teacher.fingerprint)
    file = folder.with_suffix(f".{method.kernel}.{method.score}.npz")
    if not file.is_file():
        digits = open_digits().select(truth.train_ids).add_column("id", truth.train_ids.tolist())
        latents = str(WORK / task / "latents")
        store = featurize(teacher, digits, folder, id_column="id", latent_cache=latents, **settings)
        scores = score_at_dampings(restore_estimator(teacher, store.manifest), store, method, truth)
        with atomic_file(file) as temporary, temporary.open("wb") as opened:
            np.savez(opened, **scores)
    with np.load(file) as content:
        return dict(content)


def named(settings: dict[str, Any], fingerprint: str) -> str:
    """Return a name for what was made with some settings and a teacher."""
    return hashlib.sha256(json.dumps([settings, fingerprint], sort_keys=True).encode()).hexdigest()[:24]


def score_at_dampings(
    estimator: Estimator, store: FeatureStore, method: Method, truth: GroundTruth
) -> dict[str, np.ndarray]:
    """Return the scores of all queries, whose features are made once, at every damping."""
    labels = truth.query_labels.tolist()
    pixels = query_pixels(estimator.teacher, truth.query_images)
    ids = [-1 - row for row in range(len(pixels))]
    draws = estimator.draws(ids)
    encoded = estimator.encode(pixels, None if min(labels) < 0 else labels, None, ids)
    kernel = fit_kernel(store, method.kernel)
    query = kernel.banded(average_bands(estimator.features(encoded, draws), draws, estimator.config))
    train = torch.cat([kernel.banded(store.read_part(part).features) for part in store.parts])
    normalise = method.score.endswith("cosine")
    return {
        str(damping): similarity(query, train, kernel.inverse(method.score, damping), normalise=normalise)[0]
        .float()
        .numpy()
        for damping in DAMPINGS
    }


def baselines(task: str, truth: GroundTruth) -> dict[str, np.ndarray]:
    """Return random scores, and cosines of pixels and of latents."""
    digits = load_digits(task)
    queries = query_pixels(digits.teacher, truth.query_images)
    pairs = {
        "pixel cosine": ((queries + 1) / 2, (digits.images + 1) / 2),
        "latent cosine": (digits.teacher.encode(queries), digits.latents),
    }
    found = {"random": stream(0, "random scores").standard_normal((len(queries), len(truth.train_ids)))}
    for name, sides in pairs.items():
        query, example = (torch.nn.functional.normalize(side.flatten(1), dim=1) for side in sides)
        found[name] = (query @ example[digits.train_ids].T).numpy()
    return found


def by_damping(
    scores: dict[str, np.ndarray], truth: GroundTruth, queries: np.ndarray, even: np.ndarray
) -> dict[str, float]:
    """Return the LDS on the even subsets at each damping."""
    losses = truth.losses[even][:, :, queries].mean((1, 3))
    return {
        damping: float(spearman(predicted_losses(own[queries], truth.masks[even]), losses).mean())
        for damping, own in scores.items()
    }


def evaluate(scores: dict[str, dict[str, np.ndarray]], truth: GroundTruth) -> dict[str, Any]:
    """Return, for each kind of query, the LDS of every method on the odd subsets, and the ceiling there."""
    subsets = np.arange(len(truth.masks))
    even, odd = subsets[::2], subsets[1::2]
    result: dict[str, Any] = {}
    for kind in dict.fromkeys(truth.query_kinds.tolist()):
        queries = np.flatnonzero(truth.query_kinds == kind)
        losses = truth.losses[odd][:, :, queries].mean(3)
        chosen_on = {name: by_damping(own, truth, queries, even) for name, own in scores.items()}
        best = {name: max(found, key=lambda damping: found[damping]) for name, found in chosen_on.items()}
        predicted = {name: predicted_losses(own[best[name]][queries], truth.masks[odd]) for name, own in scores.items()}
        resampled = resampled_lds(predicted, losses.mean(1))
        default = resampled.get(DEFAULT)
        rows = {
            name: {
                "lds": astuple(measured(resampled[name])),
                "less_default": None if default is None else astuple(measured(resampled[name] - default)),
                "damping": best[name],
                "by_damping_even": chosen_on[name],
            }
            for name in scores
        }
        ceilings = zip(("seed_to_seed", "ceiling"), seed_ceiling(losses), strict=True)
        result[kind] = {"rows": rows, **{name: astuple(each) for name, each in ceilings}}
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
@click.option("--only", default="", help="Only print, and only methods whose names hold this text.")
@click.option("--most-draws", default=100, show_default=True, help="Leave out methods with more.")
def main(task: str, only: str, most_draws: int) -> None:
    """Score every method that is missing, and print the table."""
    folder = FOLDER / task
    truth = GroundTruth.load(folder / "ground-truth.npz")
    teacher = load_teacher(folder / "teacher", device="cpu")
    scores = {name: {"": own} for name, own in baselines(task, truth).items()}
    for name, method in methods().items():
        if only in name and method.settings["num_draws"] <= most_draws:
            print(time.strftime("%H:%M:%S"), name, flush=True)
            scores[name] = score(method, task, teacher, truth)
    result = {
        "command": f"python scripts/bench_lds.py --task {task} --most-draws {most_draws}",
        "machine": describe_machine(),
        "subsets": len(truth.masks),
        "seeds": truth.losses.shape[1],
        "queries": evaluate(scores, truth),
    }
    if not only:
        with atomic_file(folder / "lds.json") as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
    print_table(result["queries"])


if __name__ == "__main__":
    main()
