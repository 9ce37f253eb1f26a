"""Some examples of an index, which stand for the others: fresh draws of theirs feed refined scores (eq. (11))."""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from carv_attrib.data import ExampleDataset, JoinedExamples
from carv_attrib.estimator import Encoded, Estimator
from carv_attrib.parts import PartFeatures, read_tensors, write_tensors
from carv_attrib.refinement import encode_examples, fresh_draws
from carv_attrib.seeding import choose_positions, stream_key
from carv_attrib.store import FeatureStore

NUM_REFERENCES = 100
"""Examples whose fresh draws feed the kernel of a refined score, besides those of the candidates."""


class References:
    """References of a store, chosen by a hash, and their fresh draws: the same for all queries, and kept in the store.

    Attributes:
        ids: theirs.
    """

    def __init__(self, store: FeatureStore) -> None:
        ids = torch.from_numpy(store.ids)
        key = stream_key(store.manifest["config"]["seed"], "kernel")
        self.ids: list[int] = ids[choose_positions(key, ids, NUM_REFERENCES)].tolist()
        self._store = store
        self._encoded: Encoded | None = None
        self._rounds: dict[int, Tensor] = {}

    @cached_property
    def features(self) -> Float[Tensor, "references bands replicates proj_dim"]:
        """Their features in the index."""
        rows = {int(i): row for row, i in enumerate(self._store.ids)}
        return self._store.read_features([rows[i] for i in self.ids])

    def draw(self, number: int, estimator: Estimator, examples: ExampleDataset | JoinedExamples) -> int:
        """Take the draws of a round, unless they are known; return how many network evaluations it took.

        Raises:
            BadImageError: if an example cannot be read any more.
            NonFiniteGradientError: for a gradient with NaN or infinity.
            StoreCorruptError: if the file that keeps them is damaged.
        """
        if number in self._rounds:
            return 0
        file = self._store.references_path(number)
        known = self._read(file)
        if known is not None:
            self._rounds[number] = known
            return 0
        if self._encoded is None:
            self._encoded = encode_examples(estimator, examples, self.ids)
        fresh = PartFeatures(torch.tensor(self.ids), fresh_draws(estimator, self._encoded, self.ids, number))
        self._rounds[number] = self._keep(file, fresh)
        return estimator.config.draws_per_example * len(self.ids)

    def mean(self, num_rounds: int) -> Float[Tensor, "references bands replicates proj_dim"]:
        """Return the mean of the features in the index and of those of the first rounds, which were drawn."""
        return torch.stack([self.features, *(self._rounds[number] for number in range(num_rounds))]).mean(0)

    def _read(self, file: Path) -> Tensor | None:
        """Return the draws that are kept in the store; None if there are none, or of other references."""
        if not file.is_file():
            return None
        found = PartFeatures.unpacked(read_tensors(file, self._store.feature_shape))
        return found.features if found.ids.tolist() == self.ids else None

    def _keep(self, file: Path, fresh: PartFeatures) -> Tensor:
        """Keep draws in the store, if its folder can be written; return them as they are read again."""
        tensors = fresh.packed(float16=self._store.manifest["config"]["feature_dtype"] == "float16")
        with suppress(OSError, SafetensorError):
            file.parent.mkdir(exist_ok=True)
            write_tensors(file, tensors)
        return PartFeatures.unpacked(tensors).features
