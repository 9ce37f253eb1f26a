"""The public API for queries: which training examples made the model produce this, and how sure are we."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from PIL import Image
from torch import Tensor

from carv_attrib.config import FeaturizeConfig, check_at_least, check_choice
from carv_attrib.data import open_image, thumbnail
from carv_attrib.ensemble import member_folders
from carv_attrib.errors import ArgumentError, StoreMismatchError
from carv_attrib.estimator import Estimator
from carv_attrib.groups import read_groups
from carv_attrib.index import NUM_CANDIDATES
from carv_attrib.kernel import Damping, KernelKind, ScoreKind
from carv_attrib.records import label_name
from carv_attrib.refinement import MAX_DRAWS, DatasetLike, Refinement
from carv_attrib.report import Match, QueryResult
from carv_attrib.scorer import Choice, Queries, Scorer
from carv_attrib.scores import BandScores, join, mean
from carv_attrib.store import FeatureStore
from carv_attrib.teacher import Teacher

_BANDS_AT_ONCE = 128  # of queries; errors take two megabytes of each

ImageLike = str | Path | Image.Image
TeacherLike = Teacher | str | Path


class Attributor:
    """An index that is open for queries; of several teachers, whose scores are averaged, if it was made with several.

    Attributes:
        members: an index with its teacher, or several.
        store: of the first.
        ids: example ids, increasing: the columns of `scores`.
    """

    def __init__(self, members: Sequence[Scorer]) -> None:
        first, *others = members
        self.store = first.store
        self.ids: Int64[np.ndarray, " train"] = np.sort(self.store.ids)
        self.members = tuple(members)
        for other in others:
            if not np.array_equal(other.store.ids, first.store.ids):
                raise StoreMismatchError(
                    f"{other.store.path} must hold the same examples as {self.store.path}; if a removal was stopped, "
                    "run it again, else featurize both again."
                )
            other.store.check_matches({"config": first.store.manifest["config"]})

    @staticmethod
    def open(
        path: str | Path,
        *,
        teacher: TeacherLike | Sequence[TeacherLike] | None = None,
        dataset: DatasetLike | Sequence[DatasetLike] | None = None,
        device: str = "auto",
    ) -> Attributor:
        """Return the index in a folder.

        Args:
            path: the folder that `featurize` wrote.
            teacher: a loaded teacher, or where it lies now; by default, where it was when the index was made. Of an
                index of several teachers: all of them, in the same order.
            dataset: where the training examples lie now, for `refine` and groups by a column; by default, where they
                were. A list, if data sets were appended.
            device: for teachers that are not loaded yet; they are, with the first query.

        Raises:
            ArgumentError: for more or fewer teachers than the index has.
            StoreError: if there is no index, or it is not complete.
            StoreCorruptError: if a file is damaged.
        """
        stores = [FeatureStore.open(folder) for folder in member_folders(path)]
        teachers = [store.manifest["teacher"]["source"] for store in stores]
        if teacher is not None:
            teachers = list(teacher) if isinstance(teacher, list | tuple) else [teacher]
        if len(teachers) != len(stores):
            raise ArgumentError(f"`teacher` must be as many as the index has (={len(stores)}), got {len(teachers)}.")
        return Attributor([Scorer(store, own, device, dataset) for store, own in zip(stores, teachers, strict=True)])

    @property
    def estimator(self) -> Estimator:
        """The estimator of the (first) teacher, which is loaded if it is not yet.

        Raises:
            TeacherError: if the teacher cannot be loaded.
            StoreMismatchError: if it is not the one that made the index.
        """
        return self.members[0].estimator

    def query(
        self,
        image: ImageLike,
        *,
        prompt: str | None = None,
        label: int | None = None,
        top_k: int = 10,
        opponents: bool = False,
        timesteps: tuple[int, int] | None = None,
        group_by: str | None = None,
        refine: int | None = None,
        target_se: float | None = None,
        max_draws: int | None = None,
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
            group_by: also return the sums of the scores of all examples with the same label, caption or folder, or the
                same value of a column of the data set.
            refine: take more draws of so many of the first examples (and of the query), and rank them again. Of fewer
                than twice `top_k`, probabilities of the top k are not known.
            target_se: stop refining when the standard errors of all that are returned are at most this.
            max_draws: stop refining at so many draws of an example, those of the index among them; None: 64, or
                twice those of the index.
            mask: a grey picture or its path, white where the image is asked about: which examples made that part. It
                is fitted to the teacher as the image is.
            score: preconditioned (default), dot, cosine or preconditioned-cosine; None: what the index was built for.
            kernel: bands (default) or means; None: what the index was built for.
            damping: lambda, relative to the mean eigenvalue, or auto; None: what the index was built for.

        Raises:
            ArgumentError: for a bad value, or a label or prompt that does not fit the teacher, or a black mask.
            DataError: if the image or the mask, or with `refine` the data set, cannot be read.
        """
        started = time.perf_counter()
        check_at_least("top_k", top_k, 1)
        choice = self._resolve(score, kernel, damping)
        refinement = None
        if refine is not None:
            if max_draws is None:
                max_draws = max(MAX_DRAWS, 2 * int(self.store.manifest["config"]["num_draws"]))
            refinement = Refinement(refine, target_se, max_draws, top_k, opponents)
            refinement.check(choice.kernel, self.store.manifest)
        elif target_se is not None or max_draws is not None:
            name = "max_draws" if target_se is None else "target_se"
            raise ArgumentError(f"`{name}` is where refining stops; give `refine` too: how many to refine.")
        groups = read_groups(self.store, group_by, lambda: self.members[0].examples) if group_by else None
        picture, name = _open(image)
        mask_picture, mask_name = (None, "") if mask is None else _open(mask, "mask")
        members = self.members
        window = members[0].window(timesteps, choice)
        labels, prompts = None if label is None else [label], None if prompt is None else [prompt]
        asked = [member.encode([picture], labels, prompts, mask_picture) for member in members]
        queries = [member.features(own) for member, own in zip(members, asked, strict=True)]
        number = refine or max(NUM_CANDIDATES, 2 * top_k)
        positions = np.unique(
            np.concatenate(
                [
                    member.candidates(query, choice, number, window, opponents=opponents)
                    for member, query in zip(members, queries, strict=True)
                ]
            )
        )
        draws_taken, more = 0, 0
        if refinement:
            scores, draws_taken, more = self._refine(asked, queries, positions, choice, window, refinement)
        else:
            pairs = zip(members, queries, strict=True)
            scores = mean([member.candidate_scores(query, positions, choice, window) for member, query in pairs])
        settings = self._describe(choice)
        if mask_picture is not None:
            settings["mask"] = mask_name
        if timesteps:
            first, last = members[0].band_edges[[window.start, window.stop]]
            settings["timesteps"] = f"{first:g}:{last:g}"
        if refinement:
            settings |= {"refine": refine, "max_draws": refinement.max_draws, "draws_taken": draws_taken}
            settings |= {} if target_se is None else {"target_se": target_se}
        return QueryResult(
            query=name,
            condition=_describe_condition(label, prompt, self.store.manifest["dataset"]["label_names"]),
            thumbnail=thumbnail(asked[0].pixels[0]),
            proponents=self._matches(scores, positions, top_k),
            opponents=self._matches(scores.scaled(-1.0), positions, top_k, sign=-1) if opponents else (),
            groups=groups.scores(self._part_scores(queries, choice, window)) if groups else (),
            settings=settings,
            cost={
                "network_evaluations": sum(member.estimator.config.draws_per_example for member in members) + more,
                "examples_searched": len(self.ids),
                "seconds": round(time.perf_counter() - started, 3),
            },
        )

    def _refine(
        self,
        asked: Sequence[Queries],
        queries: Sequence[Tensor],
        positions: Int64[np.ndarray, " candidates"],
        choice: Choice,
        window: slice,
        refinement: Refinement,
    ) -> tuple[BandScores, int, int]:
        """Return scores with more draws, how many draws each example has then, and what they cost in all.

        All teachers take as many rounds: until the errors of the mean are small enough.
        """
        each = [
            member.refined_scores(own, query, positions, choice, window, refinement)
            for member, own, query in zip(self.members, asked, queries, strict=True)
        ]
        for rounds in zip(*each, strict=True):
            scores = mean([refined for refined, _, _ in rounds])
            if refinement.is_enough(scores):
                break
        return scores, rounds[0][1], sum(cost for _, _, cost in rounds)

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
        choice = self._resolve(score, kernel, damping)
        parts = self._part_scores(self._features(images, prompts, labels), choice, errors=False)
        return np.concatenate([part.scores.numpy() for part in parts], axis=1)[:, self._order]

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
        """Return scores as `scores` does, and their standard errors (NaN where one draw leaves none).

        Errors are over the noise draws and the random projection (for cosines, the draws alone); they make it several
        times as dear as `scores`.

        Raises:
            ArgumentError: for a bad value, or labels or prompts that do not fit the teacher or the images.
            DataError: if an image cannot be read.
        """
        choice = self._resolve(score, kernel, damping)
        features = self._features(images, prompts, labels)
        step, rows = max(1, _BANDS_AT_ONCE // features[0].shape[1]), []
        for start in range(0, len(images), step):
            parts = self._part_scores([own[start : start + step] for own in features], choice)
            pairs = [(part.scores.numpy(), part.standard_errors.numpy()) for part in parts]
            rows.append([np.concatenate(values, axis=1) for values in zip(*pairs, strict=True)])
        scores, errors = (np.concatenate(values)[:, self._order] for values in zip(*rows, strict=True))
        return scores, errors

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
        return join(list(self._part_scores(self._features(images, prompts, labels), choice))).select(self._order)

    @property
    def _order(self) -> Int64[np.ndarray, " examples"]:
        """Positions in the store of the examples, by id."""
        return np.argsort(self.store.ids, kind="stable")

    def _features(
        self, images: Sequence[ImageLike], prompts: Sequence[str] | None, labels: Sequence[int] | None
    ) -> list[Tensor]:
        """Return the features of the images by each teacher.

        Raises:
            ArgumentError: for labels or prompts that do not fit the teacher or the images.
            DataError: if an image cannot be read.
        """
        if isinstance(images, str) or not isinstance(images, Sized) or len(images) == 0:
            raise ArgumentError(f"`images` must be a list of at least one picture or path, got {images!r}.")
        for name, values in (("prompts", prompts), ("labels", labels)):
            if values is None:
                continue
            if not isinstance(values, Sized):
                raise ArgumentError(f"`{name}` must be a list, one for each image, got {values!r}.")
            if len(values) != len(images):
                raise ArgumentError(f"`{name}` must be as many as images (={len(images)}), got {len(values)}.")
        pictures = [_open(image)[0] for image in images]
        return [member.features(member.encode(pictures, labels, prompts)) for member in self.members]

    def _resolve(self, score: ScoreKind | None, kernel: KernelKind | None, damping: Damping | None) -> Choice:
        """Return the given settings, those of the index in place of None."""
        if score is not None:
            check_choice("score", score, ScoreKind)
        if kernel is not None:
            check_choice("kernel", kernel, KernelKind)
        settings = self.members[0].settings
        choice = Choice(
            score or settings.score, kernel or settings.kernel, settings.damping if damping is None else damping
        )
        for member in self.members:
            member.kernel(choice.kernel).damping(choice.damping)
        return choice

    def _part_scores(
        self, queries: Sequence[Tensor], choice: Choice, window: slice = slice(None), *, errors: bool = True
    ) -> Iterator[BandScores]:
        """Yield the scores of the examples of each part, in the order of the store: means over the teachers."""
        pairs = zip(self.members, queries, strict=True)
        each = [member.part_scores(query, choice, window, errors=errors) for member, query in pairs]
        for parts in zip(*each, strict=True):
            yield mean(parts)

    def _matches(
        self, found: BandScores, positions: Int64[np.ndarray, " candidates"], top_k: int, sign: int = 1
    ) -> tuple[Match, ...]:
        """Return the first of the candidates, largest score (times `sign`) first."""
        probabilities = found.top_probabilities(top_k)[0].tolist()
        columns = (found.scores, found.standard_errors, found.projection_errors, found.half_widths)
        scores, errors, of_projection, reach = (values[0].tolist() for values in columns)
        best = np.argsort(-found.scores[0].numpy(), kind="stable")[:top_k]
        ids = self.store.ids[positions]
        records = self.store.find_records(ids[best].tolist())
        names = self.store.manifest["dataset"]["label_names"]
        known = found.degrees_of_freedom > 0
        compared = known and len(positions) >= min(2 * top_k, len(self.ids))  # else others might be among the first
        bands = found.bands[:, 0].T.tolist()
        return tuple(
            Match(
                id=int(ids[i]),
                key=(record := records[int(ids[i])]).key,
                score=sign * scores[i],
                standard_error=errors[i] if known else None,
                projection_error=of_projection[i] if known and found.projection is not None else None,
                low=(ends := _ends(sign * scores[i], reach[i], known))[0],
                high=ends[1],
                bands=tuple(sign * score for score in bands[i]),
                top_probability=probabilities[i] if compared else None,
                label=label_name(record.label, names),
                caption=record.caption,
                thumbnail=record.thumbnail,
            )
            for i in best
        )

    def _describe(self, choice: Choice) -> dict[str, Any]:
        """Return the settings that a reader of a result needs."""
        config = FeaturizeConfig.from_flat(self.store.manifest["config"])
        names = ["num_draws", "num_bands", "scheme", "proposal", "noise", "weighting", "objective"]
        if config.estimator.random_encoding:
            names += ["num_encodings", "encoding", "augmentation"]
        used: dict[str, Any] = {}
        if choice.score.startswith("preconditioned"):
            dampings = [member.kernel(choice.kernel).damping(choice.damping) for member in self.members]
            used["damping"] = dampings[0] if len(dampings) == 1 else ", ".join(f"{value:.3g}" for value in dampings)
        teachers = [member.store.manifest["teacher"]["source"] for member in self.members]
        return (
            {"score": choice.score, "kernel": choice.kernel}
            | used
            | {name: getattr(config.estimator, name) for name in names}
            | {"projection": config.projection.projection, "proj_dim": self.store.manifest["proj_dim"]}
            | {"teacher": ", ".join(teachers), "dataset": self.store.manifest["dataset"]["source"]}
        )


def _ends(score: float, reach: float, known: bool) -> tuple[float | None, float | None]:
    """Return the ends of an interval, where something is known of them."""
    return (score - reach, score + reach) if known else (None, None)


def _open(image: ImageLike, argument: str = "image") -> tuple[Image.Image, str]:
    """Return a picture and its name."""
    if isinstance(image, Image.Image):
        return image, str(getattr(image, "filename", "") or argument)
    if not isinstance(image, str | Path):
        raise ArgumentError(
            f"`{argument}` must be a PIL picture or its path, got a {type(image).__name__}; `PIL.Image.fromarray` "
            "makes one of an array."
        )
    return open_image(image, argument=argument), Path(image).name


def _describe_condition(label: int | None, prompt: str | None, names: Sequence[str] | None) -> str:
    if label is not None:
        name = label_name(label, names)
        return f"label {label}" if name == str(label) else f"label {label} ({name})"
    return "" if prompt is None else f"prompt {json.dumps(prompt, ensure_ascii=False)}"
