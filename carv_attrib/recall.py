"""How a compressed index is searched: parameters that find what exact search finds, chosen by measuring."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from carv_attrib.batches import encode_batch, read_batch
from carv_attrib.data import open_dataset
from carv_attrib.errors import ArgumentError
from carv_attrib.estimator import average_bands, check_finite
from carv_attrib.index import NUM_CANDIDATES, FeatureIndex, SearchSettings
from carv_attrib.kernel import Kernel
from carv_attrib.manifest import restore_estimator
from carv_attrib.seeding import choose_positions, stream_key
from carv_attrib.store import FeatureStore
from carv_attrib.teachers import load_teacher

TOP_K = 10
"""Recall is of so many of the largest scores."""
NUM_QUERIES = 200
_CANDIDATES = tuple(round(NUM_CANDIDATES * 2 ** (i / 2)) for i in range(9))


@dataclass(frozen=True)
class Sample:
    """Queries whose exact answers are known.

    Attributes:
        features: in the kernel's eigenbasis.
        exact: positions of the examples with the largest scores; of `TOP_K`, without the query itself.
        own: position of the query among the examples, or -1.
    """

    features: Float[Tensor, "queries bands replicates d"]
    exact: Int64[np.ndarray, "queries top_k"]
    own: Int64[np.ndarray, " queries"]


def choose_search(
    index: FeatureIndex, store: FeatureStore, kernel: Kernel, target_recall: float, queries: Tensor | None
) -> SearchSettings:
    """Return the fastest parameters whose recall is at least `target_recall`, or else those with the best recall.

    They are chosen on one half of the queries; recall and time are those of the other half.

    Args:
        index: to search.
        store: of its features.
        kernel: of the index.
        target_recall: mean share of the ten largest scores that are among the candidates.
        queries: features of queries; None: of examples of the index, each of which is not asked for itself.
    """
    sample = _sample(index, store, kernel, queries)
    halves = (slice(0, None, 2), slice(1, None, 2))
    parameters = index.parameter_choices()
    tried: list[tuple[bool, float, SearchSettings]] = []
    for candidates in _CANDIDATES:
        if candidates > max(NUM_CANDIDATES, len(index)):
            break
        for number, chosen in enumerate(parameters):
            settings = SearchSettings(index.settings.search.factory, chosen, candidates)
            recall, _, milliseconds = _measure(index.searched(settings), store, sample, halves[0])
            if recall >= target_recall:
                tried.append((True, -milliseconds, settings))
                parameters = parameters[:number]  # more candidates pay only where fewer lists do then
                break
            tried.append((False, recall, settings))
    _, _, best = max(tried, key=lambda row: row[:2])
    recall, error, milliseconds = _measure(index.searched(best), store, sample, halves[1])
    return replace(best, recall=round(recall, 4), recall_error=round(error, 4), milliseconds=round(milliseconds, 2))


def check_target(target_recall: float, store: FeatureStore, queries: Tensor | None) -> None:
    """Check that a recall can be aimed at, and measured.

    Raises:
        ArgumentError: if it cannot.
    """
    if not 0 < target_recall <= 1:
        raise ArgumentError(f"`target_recall` must be above 0 and at most 1, got {target_recall}; 0.99 is usual.")
    num_examples = len(store.ids)
    num_queries = num_examples if queries is None else len(queries)
    if num_queries < 4 or num_examples <= TOP_K:
        raise ArgumentError(
            f"`target_recall` needs four queries and more than {TOP_K} examples to measure recall, got {num_queries} "
            f"and {num_examples}; leave it out."
        )


def query_features(store: FeatureStore, dataset: str | Path, teacher: str | Path | None, device: str) -> Tensor:
    """Return banded features of up to `NUM_QUERIES` pictures of a data set, chosen by a hash, as those of queries.

    Raises:
        DataError: if the data set or a picture cannot be read.
        TeacherError: if the teacher cannot be loaded.
        StoreMismatchError: if it is not the one that made the index.
    """
    manifest = store.manifest
    loaded = load_teacher(teacher or manifest["teacher"]["source"], device=device, dtype=manifest["config"]["dtype"])
    estimator = restore_estimator(loaded, manifest)
    examples = open_dataset(dataset)
    ids = torch.from_numpy(examples.ids)
    rows = choose_positions(stream_key(0, "queries"), ids, NUM_QUERIES).tolist()
    batch = read_batch(examples, rows, loaded, skip_bad=False)
    draws = estimator.draws([-1 - i for i in batch.ids.tolist()])
    features = estimator.features(encode_batch(estimator, batch), draws)
    check_finite(features, batch.keys)
    return average_bands(features, draws, estimator.config)


def _sample(index: FeatureIndex, store: FeatureStore, kernel: Kernel, queries: Tensor | None) -> Sample:
    """Return queries with the positions of the examples that exact search finds: one pass over the store."""
    own = np.full(0 if queries is None else len(queries), -1)
    if queries is None:
        own = choose_positions(stream_key(0, "queries"), torch.from_numpy(store.ids), NUM_QUERIES).numpy()
        queries = store.read_features(own.tolist())
    rotated, settings = kernel.banded(queries), index.settings
    best_scores, best = torch.empty(len(own), 0), torch.empty(len(own), 0, dtype=torch.int64)
    first = 0
    for part in store.read_parts():
        scores = torch.from_numpy(
            index.inner_products(rotated, part.features, score=settings.score, damping=settings.damping)
        )
        positions = first + torch.arange(scores.shape[1])
        scores[torch.from_numpy(own)[:, None] == positions] = -torch.inf
        first += len(positions)
        scores = torch.cat([best_scores, scores], dim=1)
        best_scores, order = scores.topk(min(TOP_K, scores.shape[1]), dim=1)
        best = torch.cat([best, positions.expand(len(own), -1)], dim=1).gather(1, order)
    return Sample(rotated, best.numpy(), own)


def _measure(index: FeatureIndex, store: FeatureStore, sample: Sample, half: slice) -> tuple[float, float, float]:
    """Return recall, its standard error, and the median milliseconds of finding and reading candidates."""
    recalls, times = [], []
    settings = index.settings
    for features, exact, own in zip(sample.features[half], sample.exact[half], sample.own[half], strict=True):
        started = time.perf_counter()
        found = index.search(
            features[None], score=settings.score, damping=settings.damping, top_k=settings.search.candidates
        )[0]
        store.read_features(found[found >= 0].tolist())
        times.append(1e3 * (time.perf_counter() - started))
        recalls.append(len(np.intersect1d(exact, found[found != own])) / len(exact))
    return float(np.mean(recalls)), float(np.std(recalls, ddof=1) / len(recalls) ** 0.5), median(times)
