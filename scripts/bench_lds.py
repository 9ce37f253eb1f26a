"""Do scores predict what retraining does? LDS of ours, of the recipes of TRAK and D-TRAK, and of baselines.

Command:  python scripts/bench_lds.py --task demo     (then --task pixels; needs make_lds_ground_truth.py before)
Hardware: 2 CPU cores
Writes:   docs/benchmarks/lds/TASK/lds.json, and the table that it prints; scores are kept in build/lds/TASK, so that a
          killed run goes on, and a larger ground truth needs no new features

Methods are settings of `featurize` and of the query. Each is scored at every damping of a grid; the damping is chosen
on the even subsets, and the odd ones are reported, for all methods alike. TRAK and D-TRAK run the code of `trak`
(`lds_peers.py`; `check_dattri.py` compares the gradients of `dattri`); `lds_unprojected.py` has ours without a
projection. What is equal is the teacher, the queries and the number of draws. Dimensions are the defaults, 2,048 for
`trak` and 4,096 for ours, but for rows that say otherwise. Ours at 4 draws is measured with other seeds, and with other
projections of the same draws, too: how much of an LDS is their luck. Mean over queries of the rank correlation over
subsets; standard errors by a bootstrap over subsets and queries, and of the difference to the default by the same
resamples.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from benchmark import describe_machine
from lds_inputs import DAMPINGS, Inputs, index, kept
from lds_peers import Peer, dtrak_recipe, trak_recipe
from lds_unprojected import WithoutProjection, draw_gradients
from make_lds_ground_truth import FOLDER, TASKS, load_digits, query_pixels
from rich.console import Console
from rich.table import Table
from torch import Tensor

from carv_attrib import load_teacher
from carv_attrib.config import FeaturizeConfig
from carv_attrib.estimator import average_bands
from carv_attrib.evaluation import GroundTruth
from carv_attrib.files import atomic_file
from carv_attrib.kernel import Damping, Kernel, KernelKind, ScoreKind, fit_kernel, kernel_of
from carv_attrib.manifest import restore_estimator
from carv_attrib.metrics import measured, predicted_losses, resampled_lds, seed_ceiling, spearman
from carv_attrib.projection import build_projector
from carv_attrib.scores import score_bands
from carv_attrib.seeding import stream
from carv_attrib.store import FeatureStore

DEFAULT = "ours, 4 draws"
SEEDS = range(1, 6)
"""Of draws and projections other than those of the other rows, which have seed 0."""


@dataclass(frozen=True)
class Ours:
    """Settings of an index, and of its queries.

    Attributes:
        settings: of `featurize`.
        kernel: over draws or means.
        score: of the query.
    """

    settings: dict[str, Any]
    kernel: KernelKind = "bands"
    score: ScoreKind = "preconditioned"

    @property
    def num_draws(self) -> int:
        """Network evaluations for each example."""
        return int(self.settings["num_draws"])

    def scores(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """Return the scores of all queries at every damping; they and the index are made where they are missing."""
        settings = {"num_bands": min(4, self.num_draws), **self.settings}
        file = inputs.folder(settings).with_suffix(f".{self.kernel}.{self.score}.npz")
        return kept(file, lambda: score_at_dampings(inputs, index(inputs, settings), self))


@dataclass(frozen=True)
class OtherProjection:
    """Ours with as many bands as draws, and with another random projection of the same draws.

    Attributes:
        num_draws: K, network evaluations for each example.
        seed: of the projection.
    """

    num_draws: int
    seed: int

    def scores(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """Return the scores of all queries at every damping."""
        settings = {"num_draws": self.num_draws, "num_bands": self.num_draws}
        file = inputs.folder({"projection": self.seed, **settings}).with_suffix(".npz")
        return kept(file, lambda: self.scores_of(inputs, index(inputs, settings).manifest))

    def scores_of(self, inputs: Inputs, manifest: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return those of the draws of an index."""
        estimator = restore_estimator(inputs.teacher, manifest)
        projection = FeaturizeConfig.from_flat(manifest["config"]).projection
        other = build_projector(projection, estimator.layers, seed=self.seed, device="cpu", dtype=torch.float32)
        vectors = draw_gradients(replace(estimator, projector=other), inputs.encoded, inputs.ids)
        bands = vectors.view(len(inputs.ids), self.num_draws, 1, -1)
        kernel = kernel_of(bands[: inputs.num_train], projection.block_size(other.proj_dim))
        bands = kernel.banded(bands)
        return at_dampings(bands[inputs.num_train :], bands[: inputs.num_train], kernel, DAMPINGS)


Method = Ours | Peer | WithoutProjection | OtherProjection


def methods() -> dict[str, Method]:
    """Return the methods by name, the quick ones first."""
    found: dict[str, Method] = {f"ours, {k} draws": Ours({"num_draws": k}) for k in (1, 2, 4, 8, 16, 64)}
    for bands in (1, 2, 8, 16):
        found[f"ours, 16 draws, {bands} bands"] = Ours({"num_draws": 16, "num_bands": bands})
    for k in (4, 16):
        found[f"ours, {k} draws, kernel means"] = Ours({"num_draws": k}, "means")
        found[f"ours, {k} draws, cosine"] = Ours({"num_draws": k}, score="preconditioned-cosine")
    for objective in ("squared-norm", "mean"):
        found[f"ours, 16 draws, {objective}"] = Ours({"num_draws": 16, "objective": objective})
    found["ours, 16 draws, uniform weighting"] = Ours({"num_draws": 16, "weighting": "uniform"})
    found["ours, 16 draws, independent noise"] = Ours({"num_draws": 16, "noise": "independent"})
    found["ours, 16 draws, antithetic"] = Ours({"num_draws": 16, "scheme": "antithetic"})
    for dims in (128, 256, 512, 1024, 2048, 8192):
        found[f"ours, 4 draws, {dims} dims"] = Ours({"num_draws": 4, "proj_dim": dims})
    for rank, dims in ((8, 512), (8, 2048), (32, 4096)):
        found[f"ours, 4 draws, rank {rank}, {dims} dims"] = Ours({"num_draws": 4, "rank": rank, "proj_dim": dims})
    for k, bands in ((4, 4), (8, 4), (16, 8)):
        for size in (512, 2048):
            settings = {"num_draws": k, "num_bands": bands, "block_dim": size}
            found[f"ours, {k} draws, {bands} bands, blocks of {size}"] = Ours(settings)
    found["ours, 8 draws, float16"] = Ours({"num_draws": 8, "feature_dtype": "float16"})
    found["ours, 4 draws, unprojected"] = WithoutProjection(4)
    found |= {f"{DEFAULT}, seed {seed}": Ours({"num_draws": 4, "seed": seed}) for seed in SEEDS}
    found |= {f"{DEFAULT}, projection {seed}": OtherProjection(4, seed) for seed in SEEDS}
    found |= {f"TRAK, {k} draws": trak_recipe(k) for k in (4, 16, 64)}
    found |= {f"D-TRAK, {k} draws": dtrak_recipe(k) for k in (10, 100)}
    found["D-TRAK, 100 draws, 4096 dims"] = replace(dtrak_recipe(100), proj_dim=4096)
    return dict(sorted(found.items(), key=lambda pair: pair[1].num_draws))


def score_at_dampings(inputs: Inputs, store: FeatureStore, method: Ours) -> dict[str, np.ndarray]:
    """Return the scores of all queries, whose features are made once, at every damping."""
    estimator = restore_estimator(inputs.teacher, store.manifest)
    labels = inputs.truth.query_labels.tolist()
    pixels = query_pixels(inputs.teacher, inputs.truth.query_images)
    ids = inputs.ids[inputs.num_train :]
    draws = estimator.draws(ids)
    encoded = estimator.encode(pixels, None if min(labels) < 0 else labels, None, ids)
    kernel = fit_kernel(store, method.kernel)
    query = kernel.banded(average_bands(estimator.features(encoded, draws), draws, estimator.config))
    train = torch.cat([kernel.banded(part.features) for part in store.read_parts()])
    scores = at_dampings(query, train, kernel, (*DAMPINGS, "auto"), method.score)
    return scores | {"auto is": np.array(kernel.auto_damping)}


def at_dampings(
    query: Tensor, train: Tensor, kernel: Kernel, dampings: Sequence[Damping], score: ScoreKind = "preconditioned"
) -> dict[str, np.ndarray]:
    """Return the scores of features in the kernel's eigenbasis at every damping."""
    return {
        str(damping): score_bands(
            query, train, kernel.inverse(score, damping), normalise=score.endswith("cosine"), independent=False
        )
        .scores.float()
        .numpy()
        for damping in dampings
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
    scores: dict[str, np.ndarray], truth: GroundTruth, queries: np.ndarray, subsets: np.ndarray
) -> dict[str, float]:
    """Return the LDS on some subsets at each damping of the grid."""
    losses = truth.losses[subsets][:, :, queries].mean((1, 3))
    return {
        damping: float(spearman(predicted_losses(own[queries], truth.masks[subsets]), losses).mean())
        for damping, own in scores.items()
        if not damping.startswith("auto")
    }


def best(found: dict[str, float]) -> str:
    """Return the damping with the largest LDS."""
    return max(found, key=lambda damping: found[damping])


def final_scores(scores: dict[str, dict[str, np.ndarray]], truth: GroundTruth) -> dict[str, np.ndarray]:
    """Return the scores of each method at its automatic damping; without one, at the best of the even subsets."""
    final = {name: own["auto" if "auto" in own else next(iter(own))].copy() for name, own in scores.items()}
    for kind in dict.fromkeys(truth.query_kinds.tolist()):
        queries = np.flatnonzero(truth.query_kinds == kind)
        for name, own in scores.items():
            if "auto" not in own:
                damping = best(by_damping(own, truth, queries, np.arange(len(truth.masks))[::2]))
                final[name][queries] = own[damping][queries]
    return final


def scores_at(scores: dict[str, dict[str, np.ndarray]], damping: str) -> dict[str, np.ndarray]:
    """Return the scores at a damping of the grid of each method that has one, under a name with it."""
    return {f"{name}, damping {damping}": own[damping] for name, own in scores.items() if damping in own}


def evaluate(scores: dict[str, dict[str, np.ndarray]], truth: GroundTruth) -> dict[str, Any]:
    """Return, for each kind of query, the LDS of every method on the odd subsets, and the ceiling there."""
    subsets = np.arange(len(truth.masks))
    even, odd = subsets[::2], subsets[1::2]
    result: dict[str, Any] = {}
    for kind in dict.fromkeys(truth.query_kinds.tolist()):
        queries = np.flatnonzero(truth.query_kinds == kind)
        losses = truth.losses[odd][:, :, queries].mean(3)
        chosen_on = {name: by_damping(own, truth, queries, even) for name, own in scores.items()}
        chosen = {name: best(found) for name, found in chosen_on.items()}
        own_choice = {name: own[chosen[name]] for name, own in scores.items()}
        own_choice |= {f"{name}: auto": own["auto"] for name, own in scores.items() if "auto" in own}
        predicted = {name: predicted_losses(own[queries], truth.masks[odd]) for name, own in own_choice.items()}
        resampled = resampled_lds(predicted, losses.mean(1))
        default = resampled.get(DEFAULT)
        rows = {
            name: {
                "lds": astuple(measured(resampled[name])),
                "less_default": None if default is None else astuple(measured(resampled[name] - default)),
                "damping": chosen[name],
                "by_damping_even": chosen_on[name],
            }
            | automatic(name, scores[name], resampled, by_damping(scores[name], truth, queries, odd))
            for name in scores
        }
        ceilings = zip(("seed_to_seed", "ceiling"), seed_ceiling(losses), strict=True)
        result[kind] = {"rows": rows, **{name: astuple(each) for name, each in ceilings}}
    return result


def automatic(
    name: str, scores: dict[str, np.ndarray], resampled: dict[str, np.ndarray], hindsight: dict[str, float]
) -> dict[str, Any]:
    """Return the automatic damping, its LDS, and that over the best of the grid on the subsets that are reported."""
    if "auto" not in scores:
        return {}
    found = resampled[f"{name}: auto"]
    return {
        "auto_damping": float(scores["auto is"]),
        "lds_auto": astuple(measured(found)),
        "auto_over_hindsight": float(found[0]) / max(hindsight.values()),
    }


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return the old results with new rows.

    Raises:
        click.ClickException: if they are of another ground truth.
    """
    if any(old[name] != new[name] for name in ("subsets", "seeds")):
        raise click.ClickException("lds.json is of fewer retrained models; run all methods again, without --method.")
    for kind, found in old["queries"].items():
        rows = new["queries"][kind]["rows"]
        if json.loads(json.dumps(rows.get(DEFAULT))) != found["rows"].get(DEFAULT):  # which others are compared with
            for row in found["rows"].values():
                row["less_default"] = None
        found["rows"] |= rows
    return old


def print_table(result: dict[str, Any]) -> None:
    """Print the LDS of every method for each kind of query."""
    table = Table(
        "method", *(f"{kind}: {column}" for kind in result for column in ("LDS", "less default", "damping", "auto"))
    )
    for name in next(iter(result.values()))["rows"]:
        cells = []
        for kind in result:
            row = result[kind]["rows"][name]
            less = row["less_default"]
            cells += [
                "{:.3f} ± {:.3f}".format(*row["lds"]),
                "{:+.3f} ± {:.3f}".format(*less) if less else "",
                row["damping"],
                "{:.3f} ({:.3f} of best)".format(row["lds_auto"][0], row["auto_over_hindsight"])
                if "lds_auto" in row
                else "",
            ]
        table.add_row(name, *cells)
    for label in ("seed_to_seed", "ceiling"):
        cells = [cell for kind in result for cell in ("{:.3f} ± {:.3f}".format(*result[kind][label]), "", "", "")]
        table.add_row(label.replace("_", " "), *cells)
    Console(width=170).print(table)


@click.command()
@click.option("--task", type=click.Choice(list(TASKS)), required=True)
@click.option("--method", "names", multiple=True, help="Only those of these names; other rows of lds.json stay.")
@click.option("--most-draws", default=100, show_default=True, help="Leave out methods with more.")
@click.option(
    "--scores", "path", type=click.Path(path_type=Path), help="Where to keep scores for make_counterfactuals."
)
@click.option(
    "--damping",
    type=click.Choice([str(damping) for damping in DAMPINGS]),
    help="Of those scores, in place of the automatic one; it is added to their names.",
)
def main(task: str, names: tuple[str, ...], most_draws: int, path: Path | None, damping: str | None) -> None:
    """Score every method that is missing, and print the table."""
    folder = FOLDER / task
    truth = GroundTruth.load(folder / "ground-truth.npz")
    inputs = Inputs(task, load_teacher(folder / "teacher", device="cpu"), truth)
    scores = {name: {"": own} for name, own in baselines(task, truth).items() if not names or name in names}
    for name, method in methods().items():
        if name in (*names, DEFAULT) if names else method.num_draws <= most_draws:
            print(time.strftime("%H:%M:%S"), name, flush=True)
            scores[name] = method.scores(inputs)
    result = {
        "command": f"python scripts/bench_lds.py --task {task} --most-draws {most_draws}",
        "machine": describe_machine(),
        "subsets": len(truth.masks),
        "seeds": truth.losses.shape[1],
        "queries": evaluate(scores, truth),
    }
    if names:
        result = merged(json.loads((folder / "lds.json").read_text()), result)
    with atomic_file(folder / "lds.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    if path:
        wanted = {name: scores[name] for name in names or scores}
        np.savez(path, **(scores_at(wanted, damping) if damping else final_scores(wanted, truth)))
    print_table(result["queries"])


if __name__ == "__main__":
    main()
