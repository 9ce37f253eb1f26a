"""What became of the losses of queries when the examples with the largest scores were removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from carv_attrib.errors import ArgumentError, DataError
from carv_attrib.evaluation.arrays import read_arrays
from carv_attrib.metrics import measured, resampled_means
from carv_attrib.report.measures import Measures

_ARRAYS = {
    "methods": ("methods",),
    "fractions": ("fractions",),
    "seeds": ("seeds",),
    "losses": ("methods", "fractions", "queries", "seeds"),
    "full_losses": ("queries", "seeds"),
}


@dataclass(frozen=True)
class Counterfactuals:
    """Losses of queries under models that were retrained without some training examples, and without none.

    Attributes:
        methods: what chose the examples that were removed.
        fractions: shares of the training examples that were removed.
        losses: of each query under the models that were trained without the examples that were chosen for it; NaN
            where there is no model.
        full_losses: of each query under the models of the same seeds that were trained on everything.
    """

    methods: Sequence[str]
    fractions: Sequence[float]
    losses: Float[np.ndarray, "methods fractions queries seeds"]
    full_losses: Float[np.ndarray, "queries seeds"]

    @cached_property
    def whole(self) -> Bool[np.ndarray, "fractions queries seeds"]:
        """Whether a query has the models of all methods, of each seed."""
        whole: Bool[np.ndarray, "fractions queries seeds"] = ~np.isnan(self.losses + self.full_losses).any(0)
        return whole

    @staticmethod
    def load(path: str | Path) -> Counterfactuals:
        """Return what is in an npz file, whose layout `docs/evaluation.md` has; never a pickle.

        Raises:
            DataError: if the file cannot be read, or lacks something.
        """
        arrays = read_arrays(path, "results", _ARRAYS)
        losses, full_losses = (arrays[name].astype(np.float64) for name in ("losses", "full_losses"))
        if np.isinf(losses).any() or np.isinf(full_losses).any():
            raise DataError(f"`results` {path} must have finite losses, NaN for no model; train those again.")
        found = Counterfactuals(arrays["methods"].tolist(), arrays["fractions"].tolist(), losses, full_losses)
        num_queries = max(found.whole.any(2).sum(1), default=0) if losses.size else 0
        if num_queries < 2:
            raise DataError(
                f"`results` {path} must have at least 2 queries with the models of all methods, "
                f"has {num_queries}; train more."
            )
        return found


def counterfactual(results: Counterfactuals, against: str | None = None) -> Measures:
    """Return the mean rise of the loss by each method, and what others rise more than one of them, at each fraction.

    Fractions are in increasing order. The rise of a query is the mean over seeds of its loss after removal, less that
    of models trained on everything, over the seeds of which it has the models of all methods. Queries without such a
    seed are left out of a fraction, and fractions with fewer than two queries altogether. Standard errors are from a
    bootstrap over queries; those of differences are paired. What all queries share by the luck of the models that were
    trained on everything is not in them; differences do not contain it.

    Args:
        results: the losses.
        against: the method that the others are compared with; the first by default.

    Raises:
        ArgumentError: if there is no such method.
    """
    reference = against or results.methods[0]
    if reference not in results.methods:
        raise ArgumentError(f"`against` must be one of {', '.join(map(repr, results.methods))}, got {reference!r}.")
    others = [name for name in results.methods if name != reference]
    table: Measures = {}
    for row in np.argsort(results.fractions):
        fraction, whole = results.fractions[row], results.whole[row]
        asked = whole.any(1)
        if asked.sum() < 2:
            continue
        rises = (results.losses[:, row] - results.full_losses)[:, asked].mean(2, where=whole[asked])
        resampled = resampled_means(dict(zip(results.methods, rises, strict=True)))
        differences = {f"{name} less {reference}": resampled[name] - resampled[reference] for name in others}
        found = {name: measured(values) for name, values in (resampled | differences).items()}
        table[f"{100 * fraction:g} %, {asked.sum()} queries"] = found
    return table
