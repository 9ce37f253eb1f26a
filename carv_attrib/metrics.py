"""How well scores predict what retraining does (`docs/evaluation.md`)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float
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
    generator = stream(0, "bootstrap of subsets and queries")
    means: dict[str, list[float]] = {name: [] for name in predicted}
    rows: np.ndarray = np.arange(num_subsets)
    columns: np.ndarray = np.arange(num_queries)
    for _ in range(num_bootstrap + 1):
        true_ranks = _centred_ranks(losses[rows])
        for name, own in predicted.items():
            means[name].append(float(_correlations(_centred_ranks(own[rows]), true_ranks)[columns].mean()))
        rows = generator.integers(num_subsets, size=(num_subsets,))
        columns = generator.integers(num_queries, size=(num_queries,))
    return {name: np.array(values) for name, values in means.items()}


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
