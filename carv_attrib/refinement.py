"""More draws at query time, for the query and the candidates that matter (`docs/method.md`, eq. (11))."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from carv_attrib.batches import encode_batch, read_batch
from carv_attrib.config import DataConfig, FeaturizeConfig, check_at_least
from carv_attrib.data import open_dataset
from carv_attrib.errors import ArgumentError, StoreMismatchError
from carv_attrib.estimator import Encoded, Estimator, average_bands, check_finite
from carv_attrib.seeding import stream_key

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Refinement:
    """How many candidates get more draws, and when it is enough.

    Attributes:
        num_candidates: how many of the first examples.
        target_se: standard error that all returned examples are to have at most, or None.
        max_draws: draws of an example at most, those of the index among them.
    """

    num_candidates: int
    target_se: float | None
    max_draws: int

    def check(self, top_k: int, manifest: Mapping[str, Any]) -> None:
        """Check the numbers, and that an index can be refined.

        Raises:
            ArgumentError: if it cannot.
        """
        config = FeaturizeConfig.from_flat(manifest["config"]).estimator
        check_at_least("refine", self.num_candidates, top_k)
        check_at_least("max_draws", self.max_draws, 2 * config.num_draws)
        if self.target_se is not None and not self.target_se > 0:
            raise ArgumentError(
                f"`target_se` must be a positive number, got {self.target_se}; it has the score's unit."
            )
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


def encode_candidates(
    estimator: Estimator, manifest: Mapping[str, Any], dataset: str | Path | datasets.Dataset, ids: Sequence[int]
) -> Encoded:
    """Return the training examples with the given ids, read from their data set and encoded again.

    Raises:
        DataError: if the data set cannot be read.
        StoreMismatchError: if it is not the one that the index was made from.
    """
    config = manifest["config"]
    examples = open_dataset(dataset, **{name: config[name] for name in DataConfig.__dataclass_fields__})
    if examples.fingerprint != manifest["dataset"]["fingerprint"]:
        raise StoreMismatchError(
            f"the index was made from another data set ({manifest['dataset']['source']}), not from {examples.source}; "
            "their fingerprints differ. Give the first as `dataset`."
        )
    rows = {int(i): row for row, i in enumerate(examples.ids)}
    batch = read_batch(examples, [rows[i] for i in ids], estimator.teacher, skip_bad=False)
    return encode_batch(estimator, batch)


def more_replicates(
    estimator: Estimator, encoded: Encoded, ids: Sequence[int], number: int
) -> Float[Tensor, "batch bands replicates proj_dim"]:
    """Return banded features of fresh draws, independent of those of the index and of any other round.

    Args:
        estimator: of the index.
        encoded: examples or queries.
        ids: theirs, for draws that are not shared.
        number: of the round.

    Raises:
        NonFiniteGradientError: for a gradient with NaN or infinity.
    """
    config = estimator.config
    seed = stream_key(config.seed, "refinement", number) % 2**63
    fresh = replace(estimator, config=replace(config, seed=seed))
    draws = fresh.draws(ids)
    features = fresh.features(encoded, draws)
    check_finite(features, [f"number {i}" for i in ids])
    return average_bands(features, draws, config)
