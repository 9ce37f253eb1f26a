"""What became of the losses of queries when the examples with the largest scores were removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from carv_attrib.errors import DataError
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
        losses: of each query under the models that were trained without the examples that were chosen for it.
        full_losses: of each query under the models of the same seeds that were trained on everything.
    """

    methods: Sequence[str]
    fractions: Sequence[float]
    losses: Float[np.ndarray, "methods fractions queries seeds"]
    full_losses: Float[np.ndarray, "queries seeds"]

    @staticmethod
    def load(path: str | Path) -> Counterfactuals:
        """Return what is in an npz file, whose layout `docs/evaluation.md` has; never a pickle.

        Queries that lack a model are left out.

        Raises:
            DataError: if the file cannot be read, or lacks something.
        """
        arrays = read_arrays(path, "results", _ARRAYS)
        losses, full_losses = (arrays[name].astype(np.float64) for name in ("losses", "full_losses"))
        if np.isinf(losses).any() or np.isinf(full_losses).any():
            raise DataError(f"`results` {path} must have finite losses, NaN for no model; train those again.")
        whole = ~(np.isnan(losses).any((0, 1, 3)) | np.isnan(full_losses).any(1))
        if losses.size == 0 or whole.sum() < 2:
            raise DataError(
                f"`results` {path} must have at least 2 queries with the models of all methods, fractions and seeds, "
                f"has {whole.sum() if losses.size else 0}; train more."
            )
        return Counterfactuals(
            methods=arrays["methods"].tolist(),
            fractions=arrays["fractions"].tolist(),
            losses=losses[:, :, whole],
            full_losses=full_losses[whole],
        )


def counterfactual(results: Counterfactuals) -> Measures:
    """Return, for each fraction, the mean rise of the loss by each method, and what others rise more than the first.

    The rise of a query is the mean over seeds of its loss after removal, less that of models trained on everything.
    Standard errors are from a bootstrap over queries; those of differences are paired. What all queries share by the
    luck of the models that were trained on everything is not in them; differences do not contain it.
    """
    first = results.methods[0]
    table: Measures = {}
    full = results.full_losses.mean(1)
    for number, fraction in enumerate(results.fractions):
        rises = {name: results.losses[row, number].mean(1) - full for row, name in enumerate(results.methods)}
        resampled = resampled_means(rises)
        differences = {f"{name} less {first}": resampled[name] - resampled[first] for name in results.methods[1:]}
        table[f"{100 * fraction:g} %"] = {name: measured(values) for name, values in (resampled | differences).items()}
    return table
