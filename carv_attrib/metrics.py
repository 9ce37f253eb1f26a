"""How well scores predict what retraining does, agree with others, and find what they must (`docs/evaluation.md`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

from carv_attrib.errors import ArgumentError
from carv_attrib.seeding import stream
from carv_attrib.variance import Measured

NUM_BOOTSTRAP = 1000


def spearman(first: Float[np.ndarray, "rows columns"], second: Float[np.ndarray, "rows columns"]) -> np.ndarray:
    """Return the rank correlation of each pair of columns, ties at their mean rank; 0 where a column is constant.

    >>> spearman(np.array([[1.0], [2.0], [9.0]]), np.array([[3.0], [5.0], [6.0]]))
    array([1.])
    """
    return _correlations(_centred_ranks(first), _centred_ranks(second))


def _centred_ranks(values: np.ndarray) -> np.ndarray:
    ranks = rankdata(values, axis=0)
    centred: np.ndarray = ranks - ranks.mean(0)
    return centred


def _correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    norms = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    correlations: np.ndarray = np.divide((a * b).sum(0), norms, out=np.zeros(len(norms)), where=norms > 0)
    return correlations


def predicted_losses(
    scores: Float[np.ndarray, "queries train"], masks: Bool[np.ndarray, "subsets train"]
) -> Float[np.ndarray, "subsets queries"]:
    """Return minus the sum of the scores of the examples in each subset, up to a constant: what a score predicts."""
    kept: np.ndarray = masks.astype(np.float64) @ scores.T
    return -kept


def linear_datamodeling_score(
    predicted: Mapping[str, Float[np.ndarray, "subsets queries"]],
    losses: Float[np.ndarray, "subsets queries"],
    *,
    num_bootstrap: int = NUM_BOOTSTRAP,
) -> dict[str, Measured]:
    """Return the mean over queries of the rank correlation, over subsets, of predicted and true losses, of each method.

    The linear datamodeling score of TRAK (arXiv:2303.14186). Standard errors are from a bootstrap over both subsets and
    queries, which counts what is peculiar to a pair of them up to three times: they err upwards.

    Raises:
        ArgumentError: for fewer than three subsets.
    """
    resampled = resampled_lds(predicted, losses, num_bootstrap=num_bootstrap)
    return {name: measured(values) for name, values in resampled.items()}


def resampled_lds(
    predicted: Mapping[str, Float[np.ndarray, "subsets queries"]],
    losses: Float[np.ndarray, "subsets queries"],
    *,
    num_bootstrap: int = NUM_BOOTSTRAP,
) -> dict[str, Float[np.ndarray, " resamples"]]:
    """Return the LDS of each method on all subsets and queries, then on resamples of both, the same for all methods.

    `measured` of the difference of two of them is the difference of two methods, with the error of the difference.

    Raises:
        ArgumentError: for fewer than three subsets.
    """
    num_subsets, num_queries = losses.shape
    if num_subsets < 3:
        raise ArgumentError(f"a rank correlation over subsets needs at least 3 of them, got {num_subsets}.")
    means: dict[str, list[float]] = {name: [] for name in predicted}
    for rows, columns in resamples(num_subsets, num_queries, num_bootstrap=num_bootstrap):
        true_ranks = _centred_ranks(losses[rows])
        for name, own in predicted.items():
            means[name].append(float(_correlations(_centred_ranks(own[rows]), true_ranks)[columns].mean()))
    return {name: np.array(values) for name, values in means.items()}


def resampled_means(
    figures: Mapping[str, Float[np.ndarray, " queries"]], *, num_bootstrap: int = NUM_BOOTSTRAP
) -> dict[str, Float[np.ndarray, " resamples"]]:
    """Return the mean of each figure over all queries, then over resamples of them, the same for all figures.

    `measured` of the difference of two of them is the difference of two figures, with the error of the difference.

    Raises:
        ArgumentError: for fewer than two queries.
    """
    means: dict[str, list[float]] = {name: [] for name in figures}
    num_queries = min(map(len, figures.values()))
    if num_queries < 2:
        raise ArgumentError(f"a standard error over queries needs at least 2 of them, got {num_queries}; add some.")
    for (rows,) in resamples(num_queries, num_bootstrap=num_bootstrap):
        for name, own in figures.items():
            means[name].append(float(own[rows].mean()))
    return {name: np.array(values) for name, values in means.items()}


def resamples(*sizes: int, num_bootstrap: int = NUM_BOOTSTRAP) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield the positions of all units of each kind, then of as many drawn with replacement: the same every time."""
    generator = stream(0, "bootstrap of subsets and queries")
    yield tuple(np.arange(size) for size in sizes)
    for _ in range(num_bootstrap):
        yield tuple(generator.integers(size, size=(size,)) for size in sizes)


def measured(resampled: Float[np.ndarray, " resamples"]) -> Measured:
    """Return the first value, with the standard deviation of the others as its error."""
    return Measured(float(resampled[0]), float(np.std(resampled[1:], ddof=1)))


def seed_ceiling(losses: Float[np.ndarray, "subsets seeds queries"]) -> tuple[Measured, Measured]:
    """Return the seed-to-seed correlation of losses, and the LDS that knowing their expectation would have.

    With r the mean over queries of the rank correlation, over subsets, of the losses of two seeds, the mean over S
    seeds has the reliability `S r / (1 + (S - 1) r)` (Spearman and Brown, for Pearson's correlation; an approximation
    for ranks); its root is the correlation of that mean with what it estimates. Where r differs between queries it is
    an upper bound of their mean. Standard errors by a jackknife over subsets, with the queries taken as fixed.

    Raises:
        ArgumentError: for fewer than two seeds.
    """
    num_subsets, num_seeds, _ = losses.shape
    if num_seeds < 2:
        raise ArgumentError(f"a ceiling needs models of at least 2 seeds for each subset, got {num_seeds}.")

    def both(rows: np.ndarray) -> np.ndarray:
        pairs = [(a, b) for a in range(num_seeds) for b in range(a)]
        r = float(np.mean([spearman(losses[rows, a], losses[rows, b]).mean() for a, b in pairs]))
        positive = max(0.0, r)
        return np.array([r, (num_seeds * positive / (1 + (num_seeds - 1) * positive)) ** 0.5])

    every = np.arange(num_subsets)
    left_out = np.stack([both(np.delete(every, row)) for row in every])
    errors = np.sqrt((num_subsets - 1) / num_subsets * ((left_out - left_out.mean(0)) ** 2).sum(0))
    seed_to_seed, ceiling = both(every)
    return Measured(float(seed_to_seed), float(errors[0])), Measured(float(ceiling), float(errors[1]))


def top_k_overlap(
    first: Float[np.ndarray, "queries train"], second: Float[np.ndarray, "queries train"], top_k: int
) -> Float[np.ndarray, " queries"]:
    """Return the share of examples that two top k of each query have in common; of random scores it is k / train.

    >>> top_k_overlap(np.array([[3.0, 2.0, 1.0]]), np.array([[3.0, 1.0, 2.0]]), 2)
    array([0.5])

    Raises:
        ArgumentError: if k is not from 1 to the number of examples.
    """
    both = [_top(scores, top_k) for scores in (first, second)]
    shares: np.ndarray = (both[0] & both[1]).sum(1) / top_k
    return shares


def top_k_effect(
    scores: Float[np.ndarray, "queries train"],
    masks: Bool[np.ndarray, "subsets train"],
    losses: Float[np.ndarray, "subsets queries"],
    top_k: int,
) -> Float[np.ndarray, " queries"]:
    """Return by how much the loss of each query would rise without its top k, by linear regression over subsets.

    It is minus the slope of the loss in how many of the top k a model was trained on, times k: 0 where all subsets hold
    as many. With subsets of one size, others of the examples are in their place.

    >>> losses = np.array([[1.0], [2.0], [3.0]])
    >>> masks = np.array([[True, True, False], [True, False, True], [False, False, True]])
    >>> top_k_effect(np.array([[2.0, 1.0, 0.0]]), masks, losses, 2)
    array([2.])

    Raises:
        ArgumentError: if k is not from 1 to the number of examples.
    """
    counts = masks.astype(np.float64) @ _top(scores, top_k).T  # (subsets, queries)
    counts -= counts.mean(0)
    variances = (counts**2).sum(0)
    slopes = np.divide((counts * losses).sum(0), variances, out=np.zeros(len(variances)), where=variances > 0)
    effects: np.ndarray = -top_k * slopes
    return effects


def _top(scores: np.ndarray, top_k: int) -> np.ndarray:
    """Return which examples are in the top k of each query; of equal scores the earlier ones."""
    check_top_k(top_k, scores.shape[1])
    mask = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(mask, np.argsort(-scores, axis=1, kind="stable")[:, :top_k], True, axis=1)
    return mask


def check_top_k(top_k: int, num_train: int) -> None:
    """Check that a top k is a part of the examples.

    Raises:
        ArgumentError: if k is not from 1 to the number of examples.
    """
    if not 1 <= top_k <= num_train:
        raise ArgumentError(f"`top_k` must be from 1 to the number of training examples (={num_train}), got {top_k}.")


def ranks(
    scores: Float[np.ndarray, "queries train"], positions: Int[np.ndarray, " queries"]
) -> Int[np.ndarray, " queries"]:
    """Return the rank, from 1, of one example for each query; equal scores of others count against it.

    >>> ranks(np.array([[3.0, 9.0, 5.0, 5.0]]), np.array([2]))
    array([3])
    """
    own = np.take_along_axis(scores, positions[:, None], axis=1)
    found: np.ndarray = (scores >= own).sum(1)
    return found
