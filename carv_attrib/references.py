"""Some examples of an index, which stand for the others: fresh draws of theirs feed refined scores (eq. (11))."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from carv_attrib.data import ExampleDataset, JoinedExamples
from carv_attrib.errors import StoreCorruptError, StoreError
from carv_attrib.estimator import Encoded, Estimator
from carv_attrib.parts import PartFeatures, read_tensors, write_tensors
from carv_attrib.refinement import encode_examples, fresh_draws, fresh_estimator, two_halves
from carv_attrib.seeding import choose_positions, stream_key
from carv_attrib.store import FeatureStore
from carv_attrib.teacher import placement

NUM_REFERENCES = 100
"""Examples whose fresh draws feed the kernel of a refined score, besides those of the candidates."""


class References:
    """References of a store, and their fresh draws: the same for all queries, and kept in the store.

    Attributes:
        ids: of the references, chosen by a hash, and in its order.
    """

    def __init__(self, store: FeatureStore) -> None:
        ids = torch.from_numpy(store.ids)
        key = stream_key(store.manifest["config"]["seed"], "kernel")
        self.ids: list[int] = ids[choose_positions(key, ids, NUM_REFERENCES)].tolist()
        self._store = store
        self._encoded: Encoded | None = None
        self._rounds: dict[int, Float[Tensor, "references bands replicates proj_dim"]] = {}

    @cached_property
    def features(self) -> Float[Tensor, "references bands replicates proj_dim"]:
        """Their features in the index."""
        rows = {int(i): row for row, i in enumerate(self._store.ids)}
        return self._store.read_features([rows[i] for i in self.ids])

    def draw(self, number: int, estimator: Estimator, examples: ExampleDataset | JoinedExamples) -> int:
        """Take the draws of a round, unless they are known; return how many network evaluations it took.

        Args:
            number: of the round.
            estimator: of the index, with its `micro_batch`.
            examples: of the index.

        Raises:
            BadImageError: if an example cannot be read any more.
            NonFiniteGradientError: for a gradient with NaN or infinity.
        """
        if number in self._rounds:
            return 0
        file = self._file(number, estimator)
        kept = self._read(file)
        if kept is not None:
            self._rounds[number] = kept
            return 0
        if self._encoded is None:
            self._encoded = encode_examples(estimator, examples, self.ids)
        fresh = PartFeatures(torch.tensor(self.ids), fresh_draws(estimator, self._encoded, self.ids, number))
        tensors = fresh.packed(self._store.manifest["config"]["feature_dtype"])
        self._rounds[number] = PartFeatures.unpacked(tensors).features  # as they are read again
        self._keep(file, tensors)
        return estimator.config.draws_per_example * len(self.ids)

    def halves(self, num_rounds: int) -> Float[Tensor, "references bands 2 proj_dim"]:
        """Return halves of the draws in the index and of the first rounds, which must have been drawn."""
        return two_halves(torch.cat([self.features, *(self._rounds[number] for number in range(num_rounds))], dim=2))

    def _file(self, number: int, estimator: Estimator) -> Path:
        """Return where the draws of a round are kept, under a name that says what they depend on."""
        draws = fresh_estimator(estimator, number).draws_fingerprint()
        what = json.dumps([self.ids, draws, str(placement(estimator.teacher)[1])])
        return self._store.references_path(number, hashlib.sha256(what.encode()).hexdigest()[:16])

    def _read(self, file: Path) -> Float[Tensor, "references bands replicates proj_dim"] | None:
        """Return the draws that are kept in a file; None if there are none, or it is damaged."""
        try:
            found = PartFeatures.unpacked(read_tensors(file, self._store.feature_shape))
        except StoreCorruptError:
            return None
        return found.features if found.features.isfinite().all() else None

    def _keep(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        """Keep draws in the store in place of older ones of that round, if its folder can be written."""
        folder, path = file.parent, self._store.path
        with suppress(OSError, SafetensorError, StoreError):
            if not folder.is_dir():
                folder.mkdir()
                folder.chmod(path.stat().st_mode & 0o777)
            for old in folder.glob(file.name.rpartition("-")[0] + "-*"):
                old.unlink(missing_ok=True)
            write_tensors(file, tensors)
            if not FeatureStore.open(path).removed.isdisjoint(self.ids):  # since this store was opened
                file.unlink()
