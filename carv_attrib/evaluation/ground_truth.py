"""Scores against the losses of models that were retrained on subsets: the LDS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image

from carv_attrib.attributor import Attributor
from carv_attrib.errors import DataError
from carv_attrib.evaluation.arrays import read_arrays
from carv_attrib.evaluation.queries import Queries
from carv_attrib.metrics import linear_datamodeling_score, predicted_losses, seed_ceiling
from carv_attrib.report.measures import Measures

_ARRAYS = {
    "masks": ("models", "train"),
    "losses": ("models", "queries", "strata"),
    "subsets": ("models",),
    "seeds": ("models",),
    "train_ids": ("train",),
    "query_images": ("queries",),  # then height, width and perhaps channels
    "query_labels": ("queries",),
    "query_kinds": ("queries",),
}


@dataclass(frozen=True)
class GroundTruth:
    """Losses of models that were retrained on subsets of the training examples.

    Attributes:
        masks: which training examples each subset holds.
        losses: of each query under the models of each subset, one for each seed, in strata of timesteps of equal mass.
        train_ids: ids of the training examples, the columns of `masks`.
        query_images: pixels from 0 to 255, grey or RGB.
        query_labels: classes; -1 is none.
        query_kinds: such as held-out or generated.
    """

    masks: Bool[np.ndarray, "subsets train"]
    losses: Float[np.ndarray, "subsets seeds queries strata"]
    train_ids: Int64[np.ndarray, " train"]
    query_images: UInt8[np.ndarray, "queries ..."]
    query_labels: Int64[np.ndarray, " queries"]
    query_kinds: np.ndarray

    @staticmethod
    def load(path: str | Path) -> GroundTruth:
        """Return the ground truth in an npz file, whose layout `docs/evaluation.md` has; never a pickle.

        Subsets that do not have a model of every seed yet are left out.

        Raises:
            DataError: if the file cannot be read, or lacks something.
        """
        arrays = read_arrays(path, "ground_truth", _ARRAYS)
        if not np.isfinite(arrays["losses"]).all():
            raise DataError(f"`ground_truth` {path} must have finite losses; train the models that failed again.")
        images = arrays["query_images"]
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)):
            raise DataError(
                f"`ground_truth` {path} must have query_images (queries, height, width) or (queries, height, width, 3) "
                f"in uint8, they are {images.shape} in {images.dtype}."
            )
        models, num_seeds = [], len(np.unique(arrays["seeds"]))
        for subset in np.unique(arrays["subsets"]):
            own = np.flatnonzero(arrays["subsets"] == subset)
            own = own[np.argsort(arrays["seeds"][own], kind="stable")]
            if (np.diff(arrays["seeds"][own]) == 0).any() or (arrays["masks"][own] != arrays["masks"][own[0]]).any():
                raise DataError(
                    f"`ground_truth` {path} must have one mask for a subset and one model for each of its seeds, "
                    f"subset {subset} has several."
                )
            if len(own) == num_seeds:
                models.append(own)
        if len(models) < 3:
            raise DataError(f"`ground_truth` {path} must have at least 3 whole subsets, has {len(models)}.")
        return GroundTruth(
            masks=arrays["masks"][[own[0] for own in models]].astype(bool),
            losses=arrays["losses"][models].astype(np.float64),
            **{name: arrays[name] for name in ("train_ids", "query_images", "query_labels", "query_kinds")},
        )

    @property
    def queries(self) -> Queries:
        """The queries, to ask an index about."""
        return Queries(
            images=[Image.fromarray(pixels) for pixels in self.query_images],
            labels=self.query_labels.tolist() if (self.query_labels >= 0).all() else None,
            kinds=self.query_kinds.tolist(),
        )

    def scores(self, attributor: Attributor, **choice: Any) -> Float[np.ndarray, "queries train"]:
        """Return an index's scores of the queries; keywords are those of `Attributor.scores`.

        Raises:
            DataError: if the index is not of these training examples, or its teacher needs more than the queries have.
        """
        if not np.array_equal(attributor.ids, self.train_ids):
            if np.array_equal(attributor.ids, np.sort(self.train_ids)):
                raise DataError("the `train_ids` of the ground truth must be increasing; sort them, and `masks` alike.")
            first = np.setxor1d(attributor.ids, self.train_ids)[0]
            raise DataError(
                f"the ids of the index (={len(attributor.ids)}) are not the `train_ids` of the ground truth "
                f"(={len(self.train_ids)}), {first} is in one of them only; featurize those examples, with their "
                "`id_column`."
            )
        return self.queries.scores(attributor, **choice)


def lds(truth: GroundTruth, scores: Mapping[str, Float[np.ndarray, "queries train"]]) -> Measures:
    """Return the LDS of several scores, and the ceiling, for each kind of query."""
    table: Measures = {}
    for kind in dict.fromkeys(truth.query_kinds.tolist()):
        queries = np.flatnonzero(truth.query_kinds == kind)
        losses = truth.losses[:, :, queries].mean(3)
        predicted = {name: predicted_losses(own[queries], truth.masks) for name, own in scores.items()}
        table[kind] = linear_datamodeling_score(predicted, losses.mean(1))
        if losses.shape[1] > 1:
            table[kind]["seed to seed"], table[kind]["ceiling"] = seed_ceiling(losses)
    return table
