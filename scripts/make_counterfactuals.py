"""Retrain without the examples with the largest scores for a query, and keep its loss, for `evaluate counterfactual`.

Command:  python scripts/make_counterfactuals.py --task demo --scores scores.npz --processes 2
          (needs make_lds_ground_truth.py before)
Hardware: 7 minutes of one CPU core for a model of `demo`, 10 for one of `pixels`; for M methods, 20 queries, 3
          fractions and 3 seeds these are 180 M + 12 models
Writes:   docs/benchmarks/lds/TASK/counterfactual.npz after every model, or counterfactual-E-epochs.npz with --epochs E;
          a killed run goes on, and more methods, queries, fractions or seeds are added to what is there

The file of scores has an array (queries, train) for each method, under its name, for the queries and the training
examples of the task's `ground-truth.npz`, such as `GroundTruth.scores` returns, or `bench_lds.py --scores` writes. For
queries chosen by a hash, the 1, 5 and 10 % of the training examples with the largest scores of each method are removed,
and models trained on the others by the recipe of the ground truth; kept is the query's loss, as the ground truth has
it, over all timesteps. Beside them are models that lack as many random examples, others for each seed but the same for
all queries, and models trained on everything. All models of one seed begin with the same weights.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from make_lds_ground_truth import (
    EPOCHS,
    FOLDER,
    SEED,
    TASKS,
    in_processes,
    load_digits,
    one_thread,
    query_losses,
    save,
    train_on,
)

from carv_attrib.seeding import choose_positions, stream_key

RANDOM = "random"
ALL_QUERIES = -1


@dataclass(frozen=True)
class Model:
    """A model to train.

    Attributes:
        method: what chooses the examples that are removed; "" for none.
        fraction: share of the training examples that are removed.
        query: what they are chosen for, or ALL_QUERIES.
        seed: of weights, order and noise.
    """

    method: str
    fraction: float
    query: int
    seed: int


def all_models(
    methods: Sequence[str], fractions: Sequence[float], queries: Sequence[int], seeds: Sequence[int]
) -> Iterator[Model]:
    """Yield the models for all queries, then those of one query after the other."""
    for seed in seeds:
        yield Model("", 0.0, ALL_QUERIES, seed)
        yield from (Model(RANDOM, fraction, ALL_QUERIES, seed) for fraction in fractions)
    for query in queries:
        for fraction in fractions:
            yield from (Model(method, fraction, query, seed) for method in methods for seed in seeds)


def removed(model: Model, scores: dict[str, np.ndarray], num_train: int) -> np.ndarray:
    """Return the positions of the examples that a model is trained without; a larger part holds a smaller one."""
    count = round(model.fraction * num_train)
    if model.method in ("", RANDOM):
        key = stream_key(SEED, "removed", model.seed)
        return choose_positions(key, torch.arange(num_train), count).numpy()
    return np.argsort(-scores[model.method][model.query], kind="stable")[:count]


def losses_without(name: str, folder: Path, positions: np.ndarray, seed: int, epochs: float) -> np.ndarray:
    """Return the losses of all queries under a model that is trained without some examples."""
    kept = np.delete(load_digits(name).train_ids.numpy(), positions)
    denoiser = train_on(name, torch.from_numpy(kept), name, "counterfactual", seed, epochs=epochs)
    with np.load(folder / "ground-truth.npz") as file:
        return query_losses(name, denoiser, file["query_images"], file["query_labels"]).mean(1)


def read_scores(path: Path, num_queries: int, num_train: int) -> dict[str, np.ndarray]:
    """Return the scores of each method.

    Raises:
        click.UsageError: for a reserved name, a wrong shape or a score that is not finite.
    """
    with np.load(path) as file:
        scores = {method: file[method] for method in file.files}
    for method, own in scores.items():
        if method in ("", RANDOM):
            raise click.UsageError(f"`scores` {path} must not have the name {method!r}, which is taken; rename it.")
        if own.shape != (num_queries, num_train) or not np.isfinite(own).all():
            raise click.UsageError(
                f"`scores` {path} must have finite arrays (queries, train) = ({num_queries}, {num_train}), {method} is "
                f"{own.shape}; score all queries of the ground truth."
            )
    return scores


def grow(arrays: dict[str, np.ndarray], wanted: dict[str, Sequence[object]]) -> dict[str, np.ndarray]:
    """Return the results with room for more methods, fractions and seeds; NaN is no model."""
    axes = {name: np.array(list(dict.fromkeys([*arrays[name].tolist(), *own]))) for name, own in wanted.items()}
    methods, fractions, seeds = ((0, len(own) - len(arrays[name])) for name, own in axes.items())
    losses = np.pad(arrays["losses"], (methods, fractions, (0, 0), seeds), constant_values=np.nan)
    full_losses = np.pad(arrays["full_losses"], ((0, 0), seeds), constant_values=np.nan)
    return arrays | axes | {"losses": losses, "full_losses": full_losses}


def digests(scores: dict[str, np.ndarray]) -> dict[str, str]:
    """Return a name for the content of each method's scores."""
    content = {method: np.ascontiguousarray(own, np.float64).tobytes() for method, own in scores.items()}
    return {method: hashlib.sha256(own).hexdigest() for method, own in content.items()}


def open_results(
    path: Path, scores: dict[str, np.ndarray], fractions: Sequence[float], seeds: int, num_queries: int
) -> dict[str, np.ndarray]:
    """Return the results at `path`, or none yet, with room for what is asked for.

    Raises:
        click.UsageError: if models there were trained by other scores of the same name.
    """
    arrays = {
        "methods": np.array([], str),
        "score_sha256": np.array([], str),
        "fractions": np.array([]),
        "seeds": np.array([], int),
        "losses": np.zeros((0, 0, num_queries, 0)),
        "full_losses": np.zeros((num_queries, 0)),
    }
    if path.is_file():
        with np.load(path) as file:
            arrays = dict(file)
    known = dict(zip(arrays["methods"].tolist(), arrays["score_sha256"].tolist(), strict=True))
    new = digests(scores) | {RANDOM: ""}
    if changed := [method for method, digest in new.items() if known.get(method, digest) != digest]:
        raise click.UsageError(f"{path} has models by other scores that are called {changed[0]}; rename these.")
    arrays = grow(arrays, {"methods": list(new), "fractions": fractions, "seeds": range(seeds)})
    return arrays | {"score_sha256": np.array([(new | known)[method] for method in arrays["methods"].tolist()])}


def place(arrays: dict[str, np.ndarray], model: Model) -> np.ndarray:
    """Return a view of where the losses of a model belong: of one query, or of all."""
    seed = int(np.flatnonzero(arrays["seeds"] == model.seed)[0])
    if not model.method:
        return arrays["full_losses"][:, seed]
    method, fraction = arrays["methods"] == model.method, arrays["fractions"] == model.fraction
    own = arrays["losses"][int(np.flatnonzero(method)[0]), int(np.flatnonzero(fraction)[0]), :, seed]
    return own if model.query == ALL_QUERIES else own[model.query : model.query + 1]


def add_losses(arrays: dict[str, np.ndarray], model: Model, losses: np.ndarray) -> None:
    """Put the losses of all queries under a model where they belong.

    Raises:
        click.ClickException: if one is not finite.
    """
    if not np.isfinite(losses).all():
        raise click.ClickException(f"{model} has losses that are not finite: its training diverged.")
    place(arrays, model)[:] = losses if model.query == ALL_QUERIES else losses[model.query]


@click.command()
@click.option("--task", "name", type=click.Choice(list(TASKS)), required=True)
@click.option("--scores", "scores_path", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=True)
@click.option("--queries", default=20, show_default=True, help="How many of the ground truth's, chosen by a hash.")
@click.option(
    "--fraction",
    "fractions",
    type=click.FloatRange(0, 1, True, True),
    multiple=True,
    default=(0.01, 0.05, 0.1),
    show_default=True,
)
@click.option("--seeds", default=3, show_default=True)
@click.option("--processes", default=os.cpu_count() or 1, show_default=True)
@click.option(
    "--epochs", default=float(EPOCHS), show_default=True, help="Fewer take less time, and have a file of their own."
)
@click.option("--folder", type=click.Path(path_type=Path), default=FOLDER, show_default=True)
def main(
    name: str,
    scores_path: Path,
    queries: int,
    fractions: Sequence[float],
    seeds: int,
    processes: int,
    epochs: float,
    folder: Path,
) -> None:
    """Train every model that is missing."""
    folder = folder / name
    path = folder / ("counterfactual.npz" if epochs == EPOCHS else f"counterfactual-{epochs:g}-epochs.npz")
    one_thread()
    if not (folder / "ground-truth.npz").is_file():
        raise click.UsageError(f"{folder} has no ground-truth.npz; run make_lds_ground_truth.py, or name its --folder.")
    with np.load(folder / "ground-truth.npz") as file:
        num_queries, num_train = len(file["query_labels"]), len(file["train_ids"])
    scores = read_scores(scores_path, num_queries, num_train)
    arrays = open_results(path, scores, fractions, seeds, num_queries)
    chosen = choose_positions(stream_key(SEED, "counterfactual"), torch.arange(num_queries), queries).tolist()
    models = list(all_models(list(scores), fractions, chosen, range(seeds)))
    missing = [model for model in models if np.isnan(place(arrays, model)).any()]
    arguments = {m: (name, folder, removed(m, scores, num_train), m.seed, epochs) for m in missing}
    started = time.monotonic()
    with closing(in_processes(losses_without, arguments, processes)) as results:
        for number, (model, losses) in enumerate(results, 1):
            add_losses(arrays, model, losses)
            save(path, arrays)
            left = (time.monotonic() - started) / number * (len(missing) - number)
            done = len(models) - len(missing) + number
            click.echo(f"{name}: {done} of {len(models)} models, {model}; {left / 60:.0f} minutes left")


if __name__ == "__main__":
    main()
