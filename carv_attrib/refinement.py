"""More draws at query time, for the query and the candidates that matter (`docs/method.md`, eq. (11))."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from carv_attrib.batches import encode_batch, read_batch
from carv_attrib.config import DataConfig, FeaturizeConfig, check_at_least
from carv_attrib.data import ExampleDataset, JoinedExamples, open_dataset
from carv_attrib.errors import ArgumentError, StoreMismatchError
from carv_attrib.estimator import Encoded, Estimator, average_bands, check_finite
from carv_attrib.kernel import KernelKind
from carv_attrib.scores import BandScores
from carv_attrib.seeding import stream_key

if TYPE_CHECKING:
    import datasets

DatasetLike: TypeAlias = "str | Path | datasets.Dataset"

MAX_DRAWS = 64
"""Draws of an example, if no other number is given."""


@dataclass(frozen=True)
class Refinement:
    """How many candidates get more draws, and when it is enough.

    Attributes:
        num_candidates: how many of the first examples.
        target_se: standard error that all returned examples are to have at most, or None.
        max_draws: draws of an example at most, those of the index among them.
        top_k: examples that are returned.
        opponents: whether as many with the smallest scores are returned too.
    """

    num_candidates: int
    target_se: float | None
    max_draws: int
    top_k: int
    opponents: bool

    def check(self, kernel: KernelKind, manifest: Mapping[str, Any]) -> None:
        """Check the numbers, and that an index can be refined.

        Raises:
            ArgumentError: if it cannot.
        """
        config = FeaturizeConfig.from_flat(manifest["config"]).estimator
        check_at_least("refine", self.num_candidates, self.top_k, "all that are returned")
        check_at_least("max_draws", self.max_draws, 2 * config.num_draws, "those of the index and as many more")
        if self.target_se is not None and not self.target_se > 0:
            raise ArgumentError(
                f"`target_se` must be a positive number, got {self.target_se}; it has the score's unit."
            )
        if kernel != "bands":
            raise ArgumentError(f"`refine` needs `kernel` bands, got {kernel}; give the first.")
        if config.every_draw_a_band and config.proposal != "uniform":
            raise ArgumentError(
                "`refine` needs means over draws, but this index keeps every draw with the root of its weight; "
                "featurize with fewer `num_bands`."
            )
        if config.scheme in ("iid", "grid"):
            raise ArgumentError(
                f"`refine` needs strata, whose draws can be added to, this index has `scheme` {config.scheme}; "
                "featurize with the scheme stratified."
            )

    def is_enough(self, found: BandScores) -> bool:
        """Return whether the standard errors of the examples that are returned for the (one) query are small enough."""
        count = min(self.top_k, found.scores.shape[1])
        ends = [found.scores[0].topk(count, largest=largest).indices for largest in (True, False)]
        shown = torch.cat(ends) if self.opponents else ends[0]
        return self.target_se is not None and bool(found.standard_errors[0, shown].max() <= self.target_se)


def reopen_dataset(
    dataset: DatasetLike | Sequence[DatasetLike] | None, manifest: Mapping[str, Any]
) -> ExampleDataset | JoinedExamples:
    """Return the data set that an index was made from, with those that were appended.

    Args:
        dataset: where it lies now; a list, if data sets were appended and moved; None: where they were.
        manifest: of the index.

    Raises:
        ArgumentError: for more data sets than there are.
        DataError: if it cannot be read.
        StoreMismatchError: if it is another.
    """
    config, entries = manifest["config"], [manifest["dataset"], *manifest.get("appended", ())]
    given = dataset if isinstance(dataset, list | tuple) else [dataset]
    if len(given) > len(entries):
        raise ArgumentError(f"`dataset` must be at most as many as the index has (={len(entries)}), got {len(given)}.")
    found = []
    for entry, source in zip_longest(entries, given):
        data = entry.get("data") or {name: config[name] for name in DataConfig.__dataclass_fields__}
        where = entry["source"] if source is None else source
        classes = entries[0]["label_names"]
        examples = open_dataset(where, first_id=entry.get("first_id", 0), label_names=classes, **data)
        if examples.fingerprint != entry["fingerprint"]:
            raise StoreMismatchError(
                f"the index was made from another data set ({entry['source']}), not from {examples.source}; "
                "their fingerprints differ. Give the first as `dataset`."
            )
        found.append(examples)
    return found[0] if len(found) == 1 else JoinedExamples(found)


def encode_examples(estimator: Estimator, examples: ExampleDataset | JoinedExamples, ids: Sequence[int]) -> Encoded:
    """Return the training examples with the given ids, read and encoded again.

    Raises:
        BadImageError: if one cannot be read any more.
    """
    rows = {int(i): row for row, i in enumerate(examples.ids)}
    batch = read_batch(examples, [rows[i] for i in ids], estimator.teacher, skip_bad=False)
    return encode_batch(estimator, batch)


def fresh_estimator(estimator: Estimator, number: int) -> Estimator:
    """Return an estimator with the draws of a round: independent of the index's and of other rounds'."""
    seed = stream_key(estimator.config.seed, "refinement", number) % 2**63
    return replace(estimator, config=replace(estimator.config, seed=seed))


def two_halves(
    replicates: Float[Tensor, "examples bands replicates proj_dim"],
) -> Float[Tensor, "examples bands 2 proj_dim"]:
    """Return means of alternate replicates, of those of the index and of all rounds in a row: halves, as an index has.

    The kernel is made of these, and so scores must be: it lacks the noise of single rounds, and would let it through.
    """
    return torch.stack([replicates[:, :, half::2].mean(2) for half in range(2)], dim=2)


def fresh_draws(
    estimator: Estimator, encoded: Encoded, ids: Sequence[int], number: int
) -> Float[Tensor, "batch bands replicates proj_dim"]:
    """Return banded features of the draws of a round.

    Args:
        estimator: of the index.
        encoded: examples or queries.
        ids: theirs, for draws that are not shared.
        number: of the round.

    Raises:
        NonFiniteGradientError: for a gradient with NaN or infinity.
    """
    fresh = fresh_estimator(estimator, number)
    draws = fresh.draws(ids)
    features = fresh.features(encoded, draws)
    check_finite(features, [f"number {i}" for i in ids])
    return average_bands(features, draws, estimator.config)
