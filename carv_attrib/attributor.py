"""The public API for queries: which training examples made the model produce this, and how sure are we."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from PIL import Image
from torch import Tensor

from carv_attrib.config import FeaturizeConfig, check_at_least, check_choice
from carv_attrib.data import ExampleDataset, open_image, thumbnail, to_pixels
from carv_attrib.errors import ArgumentError, StoreError
from carv_attrib.estimator import Encoded, Estimator, average_bands, check_finite
from carv_attrib.index import FeatureIndex, IndexSettings, read_index_settings
from carv_attrib.kernel import Damping, Kernel, KernelKind, ScoreKind, fit_kernel, load_kernel
from carv_attrib.manifest import restore_estimator
from carv_attrib.refinement import Refinement, choose_references, encode_examples, fresh_draws, reopen_dataset
from carv_attrib.report import GroupScore, Match, QueryResult
from carv_attrib.scores import BandScores, join, score_bands
from carv_attrib.store import FeatureStore, Record, label_name
from carv_attrib.teacher import Teacher
from carv_attrib.teachers import load_teacher

if TYPE_CHECKING:
    import datasets

ImageLike = str | Path | Image.Image
GroupBy = Literal["label", "caption", "folder"]
Choice = tuple[ScoreKind, KernelKind, Damping]

NUM_CANDIDATES = 200
"""Examples from the index, at least, that are scored exactly and compete for the top."""


@dataclass(frozen=True)
class Queries:
    """Pictures that are asked about, after the expensive upstream work.

    Attributes:
        pixels: in [-1, 1].
        ids: negative ids, unlike any example's.
        encoded: latents and conditions.
    """

    pixels: Float[Tensor, "queries channels height width"]
    ids: list[int]
    encoded: Encoded


class Attributor:
    """An index that is open for queries.

    Attributes:
        ids: example ids, increasing: the columns of `scores`.
    """

    def __init__(
        self,
        store: FeatureStore,
        settings: IndexSettings,
        teacher: Teacher | str | Path,
        device: str,
        dataset: str | Path | datasets.Dataset,
    ) -> None:
        self.store = store
        self._settings = settings
        self._teacher = teacher
        self._device = device
        self._dataset = dataset
        self._kernels: dict[KernelKind, Kernel] = {}
        self._indexes: dict[Choice, FeatureIndex] = {}
        self._encoded_references: Encoded | None = None
        self._references: dict[int, Tensor] = {}
        self.ids: Int64[np.ndarray, " train"] = np.sort(store.ids)

    @staticmethod
    def open(
        path: str | Path,
        *,
        teacher: Teacher | str | Path | None = None,
        dataset: str | Path | datasets.Dataset | None = None,
        device: str = "auto",
    ) -> Attributor:
        """Return the index in a folder.

        Args:
            path: the folder that `featurize` wrote.
            teacher: a loaded teacher, or where it lies now; by default, where it was when the index was made.
            dataset: where the training examples lie now, for `refine`; by default, where they were.
            device: for a teacher that is not loaded yet; it is, with the first query.

        Raises:
            StoreError: if there is no index, or it is not complete.
            StoreCorruptError: if a file is damaged.
        """
        store = FeatureStore.open(path)
        return Attributor(
            store,
            read_index_settings(store),
            teacher or store.manifest["teacher"]["source"],
            device,
            store.manifest["dataset"]["source"] if dataset is None else dataset,
        )

    @cached_property
    def estimator(self) -> Estimator:
        """The estimator of the index, with its teacher; a network call is about one picture, however many are asked.

        Raises:
            TeacherError: if the teacher cannot be loaded.
            StoreMismatchError: if it is not the one that made the index.
        """
        teacher = self._teacher
        if isinstance(teacher, str | Path):
            teacher = load_teacher(teacher, device=self._device, dtype=self.store.manifest["config"]["dtype"])
        manifest = self.store.manifest
        one_picture = min(manifest["micro_batch"], manifest["draws_per_example"])
        return restore_estimator(teacher, manifest, micro_batch=one_picture)

    def query(
        self,
        image: ImageLike,
        *,
        prompt: str | None = None,
        label: int | None = None,
        top_k: int = 10,
        opponents: bool = False,
        timesteps: tuple[int, int] | None = None,
        group_by: GroupBy | None = None,
        refine: int | None = None,
        target_se: float | None = None,
        max_draws: int = 64,
        mask: ImageLike | None = None,
        score: ScoreKind | None = None,
        kernel: KernelKind | None = None,
        damping: Damping | None = None,
    ) -> QueryResult:
        """Return the training examples with the largest scores for an image, with standard errors.

        Args:
            image: a picture or its path.
            prompt: what a text-conditional teacher made it from.
            label: the class that a class-conditional teacher made it for.
            top_k: how many examples to return.
            opponents: also return those with the smallest scores.
            timesteps: score only bands of timesteps in [first, last).
            group_by: also return the sums of the scores of all examples with the same label or caption, or in the same
                folder.
            refine: take more draws of so many of the first examples (and of the query), and rank them again.
            target_se: stop refining when the standard errors of all that are returned are at most this.
            max_draws: stop refining at so many draws of an example, those of the index among them.
            mask: a grey picture or its path, white where the image is asked about: which examples made that part. It
                is fitted to the teacher as the image is.
            score: preconditioned (default), dot, cosine or preconditioned-cosine; None: what the index was built for.
            kernel: over draws (default) or means; None: what the index was built for.
            damping: lambda, relative to the mean eigenvalue, or auto; None: what the index was built for.

        Raises:
            ArgumentError: for a bad value, or a label or prompt that does not fit the teacher, or a black mask.
            DataError: if the image or the mask, or with `refine` the data set, cannot be read.
        """
        started = time.perf_counter()
        check_at_least("top_k", top_k, 1)
        choice = self._resolve(score, kernel, damping)
        if group_by is not None:
            check_choice("group_by", group_by, GroupBy)
        window = self._window(timesteps, choice)
        refinement = None if refine is None else Refinement(refine, target_se, max_draws)
        if refinement:
            refinement.check(top_k, choice[1], self.store.manifest)
        elif target_se is not None:
            raise ArgumentError("`target_se` is where refining stops; give `refine` too: how many examples to refine.")
        picture, name = _open(image)
        asked = self._encode([picture], None if label is None else [label], None if prompt is None else [prompt])
        mask_name = {}
        if mask is not None:
            asked, mask_name["mask"] = self._masked(asked, mask)
        query = self._features(asked)
        number = refine or max(NUM_CANDIDATES, 2 * top_k)
        positions = self._candidates(query, choice, number, window, opponents=opponents)
        query, train = query[:, window], self.store.read_features(positions.tolist())[:, window]
        groups = self._groups(query, choice, window, group_by) if group_by else ()
        evaluations, refined = self.estimator.config.draws_per_example, None
        if refinement:
            query, train, refined, more = self._refine(
                asked, positions, query, train, choice, refinement, window, top_k
            )
            evaluations += more
        found = self._score(query, train, choice, refined)
        return QueryResult(
            query=name,
            condition=_describe_condition(label, prompt, self.store.manifest["dataset"]["label_names"]),
            thumbnail=thumbnail(asked.pixels[0]),
            proponents=self._matches(found, positions, top_k),
            opponents=self._matches(found.negated(), positions, top_k, sign=-1) if opponents else (),
            groups=groups,
            settings=self._describe(*choice)
            | mask_name
            | ({"timesteps": f"{timesteps[0]}:{timesteps[1]}"} if timesteps else {})
            | ({"max_draws": max_draws, "refine": refine} if refine else {}),
            cost={
                "network_evaluations": evaluations,
                "examples_searched": len(self.ids),
                "seconds": round(time.perf_counter() - started, 3),
            },
        )

    def scores(
        self,
        images: Sequence[ImageLike],
        *,
        prompts: Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
        score: ScoreKind | None = None,
        kernel: KernelKind | None = None,
        damping: Damping | None = None,
    ) -> Float64[np.ndarray, "queries train"]:
        """Return the score of every training example for every image; columns are `ids`.

        Raises:
            ArgumentError: for a bad value, or labels or prompts that do not fit the teacher or the images.
            DataError: if an image cannot be read.
        """
        return self.scores_with_errors(
            images, prompts=prompts, labels=labels, score=score, kernel=kernel, damping=damping
        )[0]

    def scores_with_errors(
        self,
        images: Sequence[ImageLike],
        *,
        prompts: Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
        score: ScoreKind | None = None,
        kernel: KernelKind | None = None,
        damping: Damping | None = None,
    ) -> tuple[Float64[np.ndarray, "queries train"], Float64[np.ndarray, "queries train"]]:
        """Return scores as `scores` does, and their Monte-Carlo standard errors (NaN where one draw leaves none).

        Raises:
            ArgumentError: for a bad value, or labels or prompts that do not fit the teacher or the images.
            DataError: if an image cannot be read.
        """
        found = self.band_scores(images, prompts=prompts, labels=labels, score=score, kernel=kernel, damping=damping)
        return found.scores.numpy(), found.standard_errors.numpy()

    def band_scores(
        self,
        images: Sequence[ImageLike],
        *,
        prompts: Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
        score: ScoreKind | None = None,
        kernel: KernelKind | None = None,
        damping: Damping | None = None,
    ) -> BandScores:
        """Return scores as `scores` does, in each band of timesteps, with all that is known of their errors.

        Raises:
            ArgumentError: for a bad value, or labels or prompts that do not fit the teacher or the images.
            DataError: if an image cannot be read.
        """
        choice = self._resolve(score, kernel, damping)
        if isinstance(images, str | Path | Image.Image) or len(images) == 0:
            raise ArgumentError(f"`images` must be a list of at least one picture or path, got {images!r}.")
        for name, values in (("prompts", prompts), ("labels", labels)):
            if values is not None and len(values) != len(images):
                raise ArgumentError(f"`{name}` must be as many as images (={len(images)}), got {len(values)}.")
        query = self._features(self._encode([_open(image)[0] for image in images], labels, prompts))
        order = np.argsort(self.store.ids, kind="stable")
        parts = [self._score(query, self.store.read_part(part).features, choice) for part in self.store.parts]
        return join(parts).select(order)

    def _resolve(self, score: ScoreKind | None, kernel: KernelKind | None, damping: Damping | None) -> Choice:
        """Return the given settings, those of the index in place of None."""
        if score is not None:
            check_choice("score", score, ScoreKind)
        if kernel is not None:
            check_choice("kernel", kernel, KernelKind)
        choice = score or self._settings.score, kernel or self._settings.kernel
        chosen = self._settings.damping if damping is None else damping
        self._kernel(choice[1]).damping(chosen)
        return *choice, chosen

    def _kernel(self, kind: KernelKind) -> Kernel:
        """Return the stored kernel, or fit one of the other kind."""
        if kind not in self._kernels:
            stored = kind == self._settings.kernel
            file = self.store.path / "kernel.safetensors"
            self._kernels[kind] = load_kernel(file) if stored else fit_kernel(self.store, kind)
        if self._kernels[kind].kind != kind:
            raise StoreError(f"{self.store.path} was indexed again after it was opened; open it again.")
        return self._kernels[kind]

    def _index(self, choice: Choice) -> FeatureIndex:
        """Return the stored index if it serves, else one built in memory for this score."""
        score, kernel, damping = choice
        if self._settings.serves(*choice):
            choice = (self._settings.score, self._settings.kernel, self._settings.damping)
            if choice not in self._indexes:
                self._indexes[choice] = FeatureIndex.load(self.store, self._kernel(kernel))
        elif choice not in self._indexes:
            self._indexes[choice] = FeatureIndex.build(self.store, self._kernel(kernel), score=score, damping=damping)
        return self._indexes[choice]

    def _encode(
        self, pictures: Sequence[Image.Image], labels: Sequence[int] | None, prompts: Sequence[str] | None
    ) -> Queries:
        """Return pictures after the expensive upstream work."""
        pixels = torch.stack([to_pixels(picture, self.estimator.teacher.pixel_spec) for picture in pictures])
        ids = [_query_id(row) for row in pixels]
        return Queries(pixels, ids, self.estimator.encode(pixels, labels, prompts, ids))

    def _masked(self, queries: Queries, mask: ImageLike) -> tuple[Queries, str]:
        """Return a query about the white part of a mask, and the mask's name.

        Raises:
            ArgumentError: if nothing of it is white.
            DataError: if it cannot be read.
        """
        picture, name = _open(mask, "mask")
        pixels = to_pixels(picture, replace(self.estimator.teacher.pixel_spec, channels=1))
        weights = self.estimator.mask(pixels[None], queries.ids)
        if not weights.sum((2, 3)).all():
            raise ArgumentError(
                f"`mask` must be white where the image is asked about, {name} is all black in the part of it that the "
                "teacher sees; paint that part white."
            )
        return replace(queries, encoded=replace(queries.encoded, mask=weights)), name

    def _features(self, queries: Queries) -> Float[Tensor, "queries bands replicates proj_dim"]:
        """Return the banded features of queries, of the draws of the index."""
        draws = self.estimator.draws(queries.ids)
        features = self.estimator.features(queries.encoded, draws)
        check_finite(features, [f"query {i}" for i in range(len(queries.ids))])
        return average_bands(features, draws, self.estimator.config)

    def _candidates(
        self, query: Tensor, choice: Choice, number: int, window: slice, *, opponents: bool
    ) -> Int64[np.ndarray, " candidates"]:
        """Return the positions in the store of the examples with the largest (and the smallest) scores, increasing."""
        score, kernel, damping = choice
        windowed = torch.zeros_like(query)
        windowed[:, window] = query[:, window]
        banded, index = self._kernel(kernel).banded(windowed), self._index(choice)
        signs = (1, -1) if opponents else (1,)
        found = [index.search(sign * banded, score=score, damping=damping, top_k=number)[0] for sign in signs]
        return np.unique(np.concatenate(found))

    def _score(self, query: Tensor, train: Tensor, choice: Choice, kernel: Kernel | None = None) -> BandScores:
        """Return the scores of banded features, with the kernel of the index unless another is given."""
        score, kind, damping = choice
        kernel = kernel or self._kernel(kind)
        return score_bands(
            kernel.banded(query),
            kernel.banded(train),
            kernel.inverse(score, damping),
            normalise=score.endswith("cosine"),
            independent=self.store.manifest["config"]["scheme"] != "iid",  # sorted iid draws have no independent halves
        )

    def _window(self, timesteps: tuple[int, int] | None, choice: Choice) -> slice:
        """Return which bands lie in a window of timesteps: bands are equal shares of them."""
        if timesteps is None:
            return slice(None)
        score, kernel, _ = choice
        config = self.estimator.config
        if kernel != "draws" or score.endswith("cosine"):
            raise ArgumentError(
                f"`timesteps` needs `kernel` draws and no cosine, got {kernel} and {score}; change those."
            )
        if config.every_draw_a_band and config.proposal != "uniform":
            raise ArgumentError(
                f"`timesteps` needs bands of equal shares of timesteps, this index has a draw of `proposal` "
                f"{config.proposal} in each; featurize with fewer `num_bands`."
            )
        edges = np.linspace(0, self.estimator.teacher.noise_schedule.num_timesteps, config.num_bands + 1)
        inside = np.flatnonzero((edges[:-1] >= timesteps[0]) & (edges[1:] <= timesteps[1]))
        if len(inside) == 0:
            raise ArgumentError(
                f"`timesteps` must hold a whole band of this index, got {timesteps[0]}:{timesteps[1]}; bands begin and "
                f"end at {', '.join(f'{edge:g}' for edge in edges)}. Take those, or featurize with more `num_bands`."
            )
        return slice(int(inside[0]), int(inside[-1]) + 1)

    def _groups(self, query: Tensor, choice: Choice, window: slice, group_by: GroupBy) -> tuple[GroupScore, ...]:
        """Return the sums of the scores of each group, largest first, part by part."""
        numbers: dict[str, int] = {}
        counts: Counter[str] = Counter()
        total: BandScores | None = None
        for part in self.store.parts:
            features = self.store.read_part(part)
            names = {record.id: self._group(record, group_by) for record in self.store.read_records(part)}
            own = [names[i] for i in features.ids.tolist()]
            counts.update(own)
            groups = torch.tensor([numbers.setdefault(name, len(numbers)) for name in own])
            sums = self._score(query, features.features[:, window], choice).add_up(groups, len(numbers))
            total = sums if total is None else total.padded(len(numbers)) + sums
        if total is None:
            return ()
        known, names_of = total.degrees_of_freedom > 0, list(numbers)
        columns = zip(
            *(values[0].tolist() for values in (total.scores, total.standard_errors, total.half_widths)), strict=True
        )
        found = [
            GroupScore(name, counts[name], score, error if known else None, *_ends(score, reach, known))
            for name, (score, error, reach) in zip(names_of, columns, strict=True)
        ]
        return tuple(sorted(found, key=lambda group: -group.score))

    def _group(self, record: Record, group_by: GroupBy) -> str:
        """Return the name of the group that an example is in."""
        if group_by == "folder":
            return record.key.rpartition("/")[0]
        if group_by == "caption":
            return record.caption or ""
        return label_name(record.label, self.store.manifest["dataset"]["label_names"]) or ""

    def _refine(
        self,
        asked: Queries,
        positions: Int64[np.ndarray, " candidates"],
        query: Tensor,
        train: Tensor,
        choice: Choice,
        refinement: Refinement,
        window: slice,
        top_k: int,
    ) -> tuple[Tensor, Tensor, Kernel, int]:
        """Return features of a query and of candidates with more replicates, their kernel, and its network evaluations.

        The draws are the same for the query, the candidates and the references, whose draws the kernel is made of.
        """
        ids = self.store.ids[positions].tolist()
        estimator = replace(self.estimator, micro_batch=self.store.manifest["micro_batch"])
        preconditioned = choice[0].startswith("preconditioned")
        encoded = encode_examples(estimator, self._examples, ids)
        kernel, vectors, evaluations = self._kernel(choice[1]), [], 0
        rounds = refinement.max_draws // estimator.config.num_draws - 1
        for number in range(rounds):
            query = torch.cat([query, fresh_draws(estimator, asked.encoded, asked.ids, number)[0][:, window]], dim=2)
            train = torch.cat([train, fresh_draws(estimator, encoded, ids, number)[0][:, window]], dim=2)
            evaluations += estimator.config.draws_per_example * (1 + len(ids))
            if preconditioned:
                evaluations += self._draw_references(estimator, number)
                vectors.append(self._references[number])
            if preconditioned and (refinement.target_se or number == rounds - 1):
                kernel = self._kernel(choice[1]).refined(torch.cat(vectors, dim=1).double())
            found = self._score(query, train, choice, kernel)
            shown = found.scores[0].topk(min(top_k, len(ids))).indices
            if refinement.target_se and found.standard_errors[0, shown].max() <= refinement.target_se:
                break
        return query, train, kernel, evaluations

    def _draw_references(self, estimator: Estimator, number: int) -> int:
        """Keep the draws of a round of the references, the same for all queries; return the evaluations it took."""
        if number in self._references:
            return 0
        ids = choose_references(self.store)
        if self._encoded_references is None:
            self._encoded_references = encode_examples(estimator, self._examples, ids)
        _, self._references[number] = fresh_draws(estimator, self._encoded_references, ids, number)
        return estimator.config.draws_per_example * len(ids)

    @cached_property
    def _examples(self) -> ExampleDataset:
        """The training examples, for refining."""
        return reopen_dataset(self._dataset, self.store.manifest)

    def _matches(
        self, found: BandScores, positions: Int64[np.ndarray, " candidates"], top_k: int, sign: int = 1
    ) -> tuple[Match, ...]:
        """Return the first of the candidates, largest score (times `sign`) first."""
        probabilities = found.top_probabilities(top_k)[0].tolist()
        scores, errors, reach = (
            values[0].tolist() for values in (found.scores, found.standard_errors, found.half_widths)
        )
        best = np.argsort(-found.scores[0].numpy(), kind="stable")[:top_k]
        ids = self.store.ids[positions]
        records = self.store.find_records(ids[best].tolist())
        names = self.store.manifest["dataset"]["label_names"]
        known = found.degrees_of_freedom > 0
        bands = found.bands[:, 0].T.tolist()
        return tuple(
            Match(
                id=int(ids[i]),
                key=(record := records[int(ids[i])]).key,
                score=sign * scores[i],
                standard_error=errors[i] if known else None,
                low=(ends := _ends(sign * scores[i], reach[i], known))[0],
                high=ends[1],
                bands=tuple(sign * score for score in bands[i]),
                top_probability=probabilities[i] if known else None,
                label=label_name(record.label, names),
                caption=record.caption,
                thumbnail=record.thumbnail,
            )
            for i in best
        )

    def _describe(self, score: ScoreKind, kernel: KernelKind, damping: Damping) -> dict[str, Any]:
        """Return the settings that a reader of a result needs."""
        config = FeaturizeConfig.from_flat(self.store.manifest["config"])
        names = ["num_draws", "num_bands", "scheme", "proposal", "noise", "weighting", "objective"]
        if config.estimator.random_encoding:
            names += ["num_encodings", "encoding", "augmentation"]
        used = {"damping": self._kernel(kernel).damping(damping)} if score.startswith("preconditioned") else {}
        return (
            {"score": score, "kernel": kernel}
            | used
            | {name: getattr(config.estimator, name) for name in names}
            | {"projection": config.projection.projection, "proj_dim": self.store.manifest["proj_dim"]}
            | {"teacher": self.store.manifest["teacher"]["source"], "dataset": self.store.manifest["dataset"]["source"]}
        )


def _ends(score: float, reach: float, known: bool) -> tuple[float | None, float | None]:
    """Return the ends of an interval, where something is known of them."""
    return (score - reach, score + reach) if known else (None, None)


def _open(image: ImageLike, argument: str = "image") -> tuple[Image.Image, str]:
    """Return a picture and its name."""
    if isinstance(image, Image.Image):
        return image, str(getattr(image, "filename", "") or argument)
    return open_image(image, argument=argument), Path(image).name


def _query_id(pixels: Tensor) -> int:
    """Return a negative id, unlike any example's, from a picture's content: never from its place in a batch."""
    return -1 - int.from_bytes(hashlib.sha256(pixels.numpy().tobytes()).digest()[:7], "little")


def _describe_condition(label: int | None, prompt: str | None, names: Sequence[str] | None) -> str:
    if label is not None:
        name = label_name(label, names)
        return f"label {label}" if name == str(label) else f"label {label} ({name})"
    return "" if prompt is None else f"prompt {json.dumps(prompt, ensure_ascii=False)}"
