"""One index with its teacher: what a query needs of it to be scored (`docs/method.md`, eq. (9) and (11))."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from PIL import Image
from torch import Tensor

from carv_attrib.config import FeaturizeConfig
from carv_attrib.data import ExampleDataset, JoinedExamples, to_pixels
from carv_attrib.errors import ArgumentError, StoreCorruptError, StoreError
from carv_attrib.estimator import Encoded, Estimator, average_bands, check_finite
from carv_attrib.index import KERNEL_FILE, FeatureIndex, read_index_settings
from carv_attrib.kernel import Damping, Kernel, KernelKind, ScoreKind, fit_kernel, load_kernel
from carv_attrib.leave_out import LeaveOut
from carv_attrib.manifest import restore_estimator
from carv_attrib.references import References
from carv_attrib.refinement import DatasetLike, Refinement, encode_examples, fresh_draws, reopen_dataset, two_halves
from carv_attrib.scores import BandScores, score_bands
from carv_attrib.store import FeatureStore
from carv_attrib.teacher import Teacher
from carv_attrib.teachers import load_teacher


class Choice(NamedTuple):
    """What kind of score is asked for."""

    score: ScoreKind
    kernel: KernelKind
    damping: Damping


@dataclass(frozen=True)
class Asked:
    """Queries as examples are scored against them.

    Attributes:
        choice: of the score.
        kernel: of the scores.
        inverse: diagonal of the preconditioner that is still to be applied, in the kernel's eigenbasis.
        query: features in the eigenbasis for cosines, else preconditioned, in the basis of the examples.
        left_out: for errors from the projection, in the same basis; None: none.
        errors: whether any are wanted, and known.
    """

    choice: Choice
    kernel: Kernel
    inverse: Float64[Tensor, "bands d"]
    query: Float64[Tensor, "queries bands replicates d"]
    left_out: Float64[Tensor, "queries bands groups d"] | None
    errors: bool


@dataclass(frozen=True)
class Queries:
    """Pictures that are asked about, after the expensive upstream work.

    Attributes:
        pixels: in [-1, 1]; what a mask leaves out is faded, to be shown.
        ids: negative ids, unlike any example's.
        encoded: latents and conditions.
    """

    pixels: Float[Tensor, "queries channels height width"]
    ids: list[int]
    encoded: Encoded


class Scorer:
    """An index and its teacher, which is loaded with the first query."""

    def __init__(
        self,
        store: FeatureStore,
        teacher: Teacher | str | Path,
        device: str,
        dataset: DatasetLike | Sequence[DatasetLike] | None,
    ) -> None:
        self.store = store
        self.settings = read_index_settings(store)
        self._teacher = teacher
        self._device = device
        self._dataset = dataset
        self._kernels: dict[KernelKind, Kernel] = {}
        self._indexes: dict[Choice, FeatureIndex] = {}
        self._left_out: dict[Choice, LeaveOut] = {}

    @cached_property
    def estimator(self) -> Estimator:
        """The estimator of the index, with its teacher; a network call is about one picture, however many are asked.

        Raises:
            TeacherError: if the teacher cannot be loaded.
            StoreMismatchError: if it is not the one that made the index.
        """
        manifest, teacher = self.store.manifest, self._teacher
        if isinstance(teacher, str | Path):
            teacher = load_teacher(teacher, device=self._device, dtype=manifest["config"]["dtype"])
        one_picture = min(manifest["micro_batch"], manifest["draws_per_example"])
        return restore_estimator(teacher, manifest, micro_batch=one_picture)

    @cached_property
    def examples(self) -> ExampleDataset | JoinedExamples:
        """The training examples, read again from the data set.

        Raises:
            DataError: if it cannot be read.
            StoreMismatchError: if it is another.
        """
        return reopen_dataset(self._dataset, self.store.manifest)

    def kernel(self, kind: KernelKind) -> Kernel:
        """Return the stored kernel, or fit one of the other kind.

        Raises:
            StoreError: if the folder was indexed again.
        """
        if kind not in self._kernels:
            stored = kind == self.settings.kernel
            file = self.store.path / KERNEL_FILE
            self._kernels[kind] = load_kernel(file) if stored else fit_kernel(self.store, kind)
        if self._kernels[kind].kind != kind:
            raise StoreError(f"{self.store.path} was indexed again after it was opened; open it again.")
        num_bands = self.store.manifest["config"]["num_bands"] if kind == "bands" else 1
        num_dims = self.store.manifest["proj_dim"]
        size = FeaturizeConfig.from_flat(self.store.manifest["config"]).projection.block_size(num_dims)
        if self._kernels[kind].eigenvalues.shape != (num_bands, num_dims // size, size):
            raise StoreCorruptError(f"the kernel in {self.store.path} has another size than the features; index again.")
        return self._kernels[kind]

    def encode(
        self,
        pictures: Sequence[Image.Image],
        labels: Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
        mask: Image.Image | None = None,
    ) -> Queries:
        """Return pictures after the expensive upstream work; with a mask, about its white part.

        Raises:
            ArgumentError: for labels or prompts that do not fit the teacher, or a mask of which nothing is white.
        """
        spec = self.estimator.teacher.pixel_spec
        pixels = torch.stack([to_pixels(picture, spec) for picture in pictures])
        ids = [_query_id(row) for row in pixels]
        encoded = self.estimator.encode(pixels, labels, prompts, ids)
        if mask is not None:
            mask_pixels = to_pixels(mask, replace(spec, channels=1))
            weights = self.estimator.mask(mask_pixels[None], ids)
            if not weights.sum((2, 3)).all():
                raise ArgumentError(
                    "`mask` must be white where the image is asked about, it is all black in the part of it that the "
                    "teacher sees; paint that part white."
                )
            encoded = replace(encoded, mask=weights)
            brightness = (mask_pixels + 1) / 2
            pixels = pixels * (0.2 + 0.8 * brightness / brightness.max())
        return Queries(pixels, ids, encoded)

    def features(self, queries: Queries) -> Float[Tensor, "queries bands replicates proj_dim"]:
        """Return the banded features of queries, of the draws of the index."""
        draws = self.estimator.draws(queries.ids)
        features = self.estimator.features(queries.encoded, draws)
        check_finite(features, [f"query {i}" for i in range(len(queries.ids))])
        return average_bands(features, draws, self.estimator.config)

    def window(self, timesteps: tuple[int, int] | None, choice: Choice) -> slice:
        """Return which bands lie in a window of timesteps: bands are equal shares of them.

        Raises:
            ArgumentError: if there is none, or bands are not kept apart.
        """
        if timesteps is None:
            return slice(None)
        if timesteps[0] >= timesteps[1]:
            raise ArgumentError(
                f"`timesteps` must be FIRST:LAST with the first below the last, got {timesteps[0]}:{timesteps[1]}."
            )
        config = self.estimator.config
        if choice.kernel != "bands" or choice.score.endswith("cosine"):
            raise ArgumentError(
                f"`timesteps` needs `kernel` bands and no cosine, got {choice.kernel} and {choice.score}; change those."
            )
        if config.scheme == "iid" or (config.every_draw_a_band and config.proposal != "uniform"):
            raise ArgumentError(
                f"`timesteps` needs bands of equal shares of timesteps, those of this index (`scheme` {config.scheme}, "
                f"`proposal` {config.proposal}) are not; featurize with strata and fewer `num_bands`."
            )
        edges = self.band_edges
        inside = np.flatnonzero((edges[:-1] >= timesteps[0]) & (edges[1:] <= timesteps[1]))
        if len(inside) == 0:
            raise ArgumentError(
                f"`timesteps` must hold a whole band of this index, got {timesteps[0]}:{timesteps[1]}; bands begin and "
                f"end at {', '.join(f'{edge:g}' for edge in edges)}. Take those, or featurize with more `num_bands`."
            )
        return slice(int(inside[0]), int(inside[-1]) + 1)

    @property
    def band_edges(self) -> Float[np.ndarray, " edges"]:
        """Timesteps at which bands begin and end."""
        num_timesteps = self.estimator.teacher.noise_schedule.num_timesteps
        return np.linspace(0, num_timesteps, self.estimator.config.num_bands + 1)

    def candidates(
        self, query: Tensor, choice: Choice, number: int, window: slice, *, opponents: bool
    ) -> Int64[np.ndarray, " candidates"]:
        """Return the positions in the store of the examples with the largest (and the smallest) scores, increasing."""
        windowed = torch.zeros_like(query)
        windowed[:, window] = query[:, window]
        banded, index = self.kernel(choice.kernel).banded(windowed), self._index(choice)
        search = index.settings.search
        wanted = number if search.factory == "Flat" else max(number, search.candidates)
        found = []
        for sign in (1, -1) if opponents else (1,):
            positions = index.search(sign * banded, score=choice.score, damping=choice.damping, top_k=wanted)[0]
            positions = positions[positions >= 0]
            if len(positions) > number:
                train = self.store.read_features(positions.tolist())
                scores = index.inner_products(sign * banded, train, score=choice.score, damping=choice.damping)[0]
                positions = positions[np.argsort(-scores, kind="stable")[:number]]
            found.append(positions)
        return np.unique(np.concatenate(found))

    def prepare(
        self,
        query: Tensor,
        choice: Choice,
        window: slice = slice(None),
        *,
        errors: bool = True,
        refined: tuple[Kernel, Tensor] | None = None,
    ) -> Asked:
        """Return banded features of queries, ready to be scored.

        Args:
            query: of all bands.
            choice: of the score.
            window: of the bands that are asked about.
            errors: whether errors are wanted, which make scoring several times as dear.
            refined: another kernel than that of the index, and features of examples with the draws of the query.
        """
        whole = refined[0] if refined else self.kernel(choice.kernel)
        kernel = whole.within(window)
        inverse = kernel.inverse(choice.score, choice.damping)
        banded = kernel.banded(query[:, window])
        errors = errors and self._is_independent
        if choice.score.endswith("cosine"):  # without errors from the projection
            return Asked(choice, kernel, inverse, banded, None, errors)
        projection = errors and banded.shape[1] * banded.shape[2] > 1  # else n/a, as all are
        left_out = None
        if projection:
            left_out = kernel.restored(self._leave_out(choice, refined).of(banded.mean(2), window))
        query = kernel.restored(banded * inverse[:, None])  # coordinates of the examples, which stay as they are stored
        return Asked(choice, kernel, torch.ones_like(inverse), query, left_out, errors)

    def score(self, asked: Asked, train: Tensor) -> BandScores:
        """Return the scores of the banded features of examples."""
        is_cosine = asked.choice.score.endswith("cosine")
        train = asked.kernel.banded(train) if is_cosine else asked.kernel.averaged(train.double())
        return score_bands(
            asked.query, train, asked.inverse, asked.left_out, normalise=is_cosine, independent=asked.errors
        )

    def part_scores(
        self, query: Tensor, choice: Choice, window: slice = slice(None), *, errors: bool = True
    ) -> Iterator[BandScores]:
        """Yield the scores of all examples of each part, in the order of the store."""
        asked = self.prepare(query, choice, window, errors=errors)
        for part in self.store.read_parts():
            yield self.score(asked, part.features[:, window])

    def candidate_scores(
        self,
        query: Tensor,
        positions: Int64[np.ndarray, " candidates"],
        choice: Choice,
        window: slice,
        *,
        errors: bool = True,
    ) -> BandScores:
        """Return the scores of the examples at some positions in the store."""
        features = self.store.read_features(positions.tolist())
        return self.score(self.prepare(query, choice, window, errors=errors), features[:, window])

    def refined_scores(
        self,
        asked: Queries,
        query: Tensor,
        positions: Int64[np.ndarray, " candidates"],
        choice: Choice,
        window: slice,
        refinement: Refinement,
    ) -> Iterator[tuple[BandScores, int, int]]:
        """Yield scores with more draws of a query and of candidates, how many each has, and what they cost in all.

        After every round if there is a target, else after the last. The cost is in network evaluations.

        The draws are the same for the query, the candidates and the references, of whose draws the kernel is made too.
        """
        ids = self.store.ids[positions].tolist()
        estimator = replace(self.estimator, micro_batch=self.store.manifest["micro_batch"])
        preconditioned = choice.score.startswith("preconditioned")
        encoded = encode_examples(estimator, self.examples, ids)
        others = torch.tensor([i not in ids for i in self._references.ids])
        old = self.store.read_features(positions.tolist())
        kernel, train, evaluations = self.kernel(choice.kernel), old, 0
        rounds = refinement.max_draws // estimator.config.num_draws - 1
        for number in range(rounds):
            query = torch.cat([query, fresh_draws(estimator, asked.encoded, asked.ids, number)], dim=2)
            train = torch.cat([train, fresh_draws(estimator, encoded, ids, number)], dim=2)
            evaluations += estimator.config.draws_per_example * (1 + len(ids))
            if preconditioned:
                evaluations += self._references.draw(number, estimator, self.examples)
            if not refinement.target_se and number < rounds - 1:
                continue
            own = two_halves(train)
            if preconditioned:
                before = torch.cat([old, self._references.features[others]])
                after = torch.cat([own, self._references.halves(number + 1)[others]])
                kernel = self.kernel(choice.kernel).refined(before, after, num_candidates=len(ids))
            asked_again = self.prepare(two_halves(query), choice, window, refined=(kernel, own))
            found = self.score(asked_again, own[:, window])
            yield found, (2 + number) * estimator.config.num_draws, evaluations

    @property
    def _is_independent(self) -> bool:
        """Whether replicates and bands are of independent draws: those of sorted iid draws are not."""
        return bool(self.store.manifest["config"]["scheme"] != "iid")

    @cached_property
    def _references(self) -> References:
        return References(self.store)

    def _index(self, choice: Choice) -> FeatureIndex:
        """Return the stored index if it serves, else one built in memory for this score."""
        kernel = self.kernel(choice.kernel)
        if self.settings.serves(*choice):
            choice = Choice(self.settings.score, self.settings.kernel, self.settings.damping)
            if choice not in self._indexes:
                self._indexes[choice] = FeatureIndex.load(self.store, kernel)
        elif choice not in self._indexes:
            self._indexes[choice] = FeatureIndex.build(self.store, kernel, score=choice.score, damping=choice.damping)
        return self._indexes[choice]

    def _leave_out(self, choice: Choice, refined: tuple[Kernel, Tensor] | None) -> LeaveOut:
        """Return what errors from the projection are made of; that of the index is kept until another score comes."""
        if not refined and choice in self._left_out:
            return self._left_out[choice]
        kernel, examples = refined or (self.kernel(choice.kernel), self._references.features)
        inverse = kernel.inverse(choice.score, choice.damping)
        found = LeaveOut(kernel, inverse, self.estimator.projector.families, examples)
        if not refined:
            self._left_out = {choice: found}
        return found


def _query_id(pixels: Tensor) -> int:
    """Return a negative id, unlike any example's, from a picture's content: never from its place in a batch."""
    return -1 - int.from_bytes(hashlib.sha256(pixels.numpy().tobytes()).digest()[:7], "little")
