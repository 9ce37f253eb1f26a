"""The public API for queries: which training examples made the model produce this, and how sure are we."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from PIL import Image
from torch import Tensor

from carv_attrib.config import FeaturizeConfig, check_at_least, check_choice
from carv_attrib.data import open_image, thumbnail, to_pixels
from carv_attrib.errors import ArgumentError, StoreError
from carv_attrib.estimator import Estimator, average_bands, check_finite
from carv_attrib.index import FeatureIndex, IndexSettings, read_index_settings
from carv_attrib.kernel import Kernel, KernelKind, ScoreKind, fit_kernel, load_kernel, similarity
from carv_attrib.manifest import restore_estimator
from carv_attrib.report import Match, QueryResult
from carv_attrib.store import FeatureStore
from carv_attrib.teacher import Teacher
from carv_attrib.teachers import load_teacher

ImageLike = str | Path | Image.Image


class Attributor:
    """An index that is open for queries.

    Attributes:
        ids: example ids, increasing: the columns of `scores`.
    """

    def __init__(
        self, store: FeatureStore, settings: IndexSettings, teacher: Teacher | str | Path, device: str
    ) -> None:
        self.store = store
        self._settings = settings
        self._teacher = teacher
        self._device = device
        self._kernels: dict[KernelKind, Kernel] = {}
        self._indexes: dict[tuple[ScoreKind, KernelKind, float], FeatureIndex] = {}
        self.ids: Int64[np.ndarray, " train"] = np.sort(store.ids)

    @staticmethod
    def open(path: str | Path, *, teacher: Teacher | str | Path | None = None, device: str = "auto") -> Attributor:
        """Return the index in a folder.

        Args:
            path: the folder that `featurize` wrote.
            teacher: a loaded teacher, or where it lies now; by default, where it was when the index was made.
            device: for a teacher that is not loaded yet; it is, with the first query.

        Raises:
            StoreError: if there is no index, or it is not complete.
            StoreCorruptError: if a file is damaged.
        """
        store = FeatureStore.open(path)
        return Attributor(store, read_index_settings(store), teacher or store.manifest["teacher"]["source"], device)

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
        score: ScoreKind | None = None,
        kernel: KernelKind | None = None,
        damping: float | None = None,
    ) -> QueryResult:
        """Return the training examples with the largest scores for an image, with standard errors.

        Args:
            image: a picture or its path.
            prompt: what a text-conditional teacher made it from.
            label: the class that a class-conditional teacher made it for.
            top_k: how many examples to return.
            opponents: also return those with the smallest scores.
            score: preconditioned (default), dot, cosine or preconditioned-cosine; None: what the index was built for.
            kernel: over draws (default) or means; None: what the index was built for.
            damping: lambda, relative to the mean eigenvalue; None: what the index was built for.

        Raises:
            ArgumentError: for a bad value, or a label or prompt that does not fit the teacher.
            DataError: if the image cannot be read.
        """
        started = time.perf_counter()
        check_at_least("top_k", top_k, 1)
        score, kernel, damping = self._resolve(score, kernel, damping)
        index = self._index(score, kernel, damping)
        picture, name = _open(image)
        draws, pixels = self._features(
            [picture], None if label is None else [label], None if prompt is None else [prompt]
        )
        query = self._kernel(kernel).banded(draws)
        both = [
            index.search(sign * query, score=score, damping=damping, top_k=top_k)[0]
            for sign in (1, -1)[: 1 + opponents]
        ]
        matches = [self._rescore(query, positions, score, kernel, damping) for positions in both]
        return QueryResult(
            query=name,
            condition=_describe_condition(label, prompt, self.store.manifest["dataset"]["label_names"]),
            thumbnail=thumbnail(pixels[0]),
            proponents=tuple(matches[0]),
            opponents=tuple(reversed(matches[1])) if opponents else (),
            settings=self._describe(score, kernel, damping),
            cost={
                "network_evaluations": self.estimator.config.draws_per_example,
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
        damping: float | None = None,
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
        damping: float | None = None,
    ) -> tuple[Float64[np.ndarray, "queries train"], Float64[np.ndarray, "queries train"]]:
        """Return scores as `scores` does, and their Monte-Carlo standard errors (NaN where one draw leaves none).

        Raises:
            ArgumentError: for a bad value, or labels or prompts that do not fit the teacher or the images.
            DataError: if an image cannot be read.
        """
        score, kernel, damping = self._resolve(score, kernel, damping)
        if isinstance(images, str | Path | Image.Image) or len(images) == 0:
            raise ArgumentError(f"`images` must be a list of at least one picture or path, got {images!r}.")
        for name, values in (("prompts", prompts), ("labels", labels)):
            if values is not None and len(values) != len(images):
                raise ArgumentError(f"`{name}` must be as many as images (={len(images)}), got {len(values)}.")
        fitted = self._kernel(kernel)
        draws, _ = self._features([_open(image)[0] for image in images], labels, prompts)
        query = fitted.banded(draws)
        parts = [
            self._similarity(query, fitted.banded(self.store.read_part(part).features), score, kernel, damping)
            for part in self.store.parts
        ]
        order = np.argsort(self.store.ids, kind="stable")
        scores, errors = (torch.cat(column, dim=1).numpy()[:, order] for column in zip(*parts, strict=True))
        return scores, errors

    def _resolve(
        self, score: ScoreKind | None, kernel: KernelKind | None, damping: float | None
    ) -> tuple[ScoreKind, KernelKind, float]:
        """Return the given settings, those of the index in place of None."""
        if score is not None:
            check_choice("score", score, ScoreKind)
        if kernel is not None:
            check_choice("kernel", kernel, KernelKind)
        if damping is not None and not 0 < damping < float("inf"):
            raise ArgumentError(f"`damping` must be a positive number, got {damping}; 0.1 is the default.")
        return score or self._settings.score, kernel or self._settings.kernel, damping or self._settings.damping

    def _kernel(self, kind: KernelKind) -> Kernel:
        """Return the stored kernel, or fit one of the other kind."""
        if kind not in self._kernels:
            stored = kind == self._settings.kernel
            file = self.store.path / "kernel.safetensors"
            self._kernels[kind] = load_kernel(file) if stored else fit_kernel(self.store, kind)
        if self._kernels[kind].kind != kind:
            raise StoreError(f"{self.store.path} was indexed again after it was opened; open it again.")
        return self._kernels[kind]

    def _index(self, score: ScoreKind, kernel: KernelKind, damping: float) -> FeatureIndex:
        """Return the stored index if it serves, else one built in memory for this score."""
        key = (score, kernel, damping)
        if self._settings.serves(*key):
            key = (self._settings.score, self._settings.kernel, self._settings.damping)
            if key not in self._indexes:
                self._indexes[key] = FeatureIndex.load(self.store, self._kernel(kernel))
        elif key not in self._indexes:
            self._indexes[key] = FeatureIndex.build(self.store, self._kernel(kernel), score=score, damping=damping)
        return self._indexes[key]

    def _features(
        self, pictures: Sequence[Image.Image], labels: Sequence[int] | None, prompts: Sequence[str] | None
    ) -> tuple[Tensor, Tensor]:
        """Return the banded features and the pixels of pictures."""
        estimator = self.estimator
        pixels = torch.stack([to_pixels(picture, estimator.teacher.pixel_spec) for picture in pictures])
        ids = [_query_id(row) for row in pixels]
        encoded = estimator.encode(pixels, labels, prompts, ids)
        draws = estimator.draws(ids)
        features = estimator.features(encoded, draws)
        check_finite(features, [f"query {i}" for i in range(len(pictures))])
        return average_bands(features, draws, estimator.config), pixels

    def _similarity(
        self, query: Tensor, train: Tensor, score: ScoreKind, kernel: KernelKind, damping: float
    ) -> tuple[Tensor, Tensor]:
        inverse = self._kernel(kernel).inverse(score, damping)
        scores, errors = similarity(query, train, inverse, normalise=score.endswith("cosine"))
        if self.store.manifest["config"]["scheme"] == "iid":  # sorted iid draws have no two independent halves
            errors = torch.full_like(errors, float("nan"))
        return scores, errors

    def _rescore(
        self,
        query: Tensor,
        positions: Int64[np.ndarray, " top_k"],
        score: ScoreKind,
        kernel: KernelKind,
        damping: float,
    ) -> list[Match]:
        """Return the examples at some positions of the store, with exact scores from their features, largest first."""
        features = self._kernel(kernel).banded(self.store.read_features(positions.tolist()))
        scores, errors = (values[0].numpy() for values in self._similarity(query, features, score, kernel, damping))
        ids = self.store.ids[positions]
        records = self.store.find_records(ids.tolist())
        names = self.store.manifest["dataset"]["label_names"]
        return [
            Match(
                id=int(ids[i]),
                key=records[int(ids[i])].key,
                score=float(scores[i]),
                standard_error=None if np.isnan(errors[i]) else float(errors[i]),
                label=label_name(records[int(ids[i])].label, names),
                caption=records[int(ids[i])].caption,
                thumbnail=records[int(ids[i])].thumbnail,
            )
            for i in np.argsort(-scores, kind="stable")
        ]

    def _describe(self, score: ScoreKind, kernel: KernelKind, damping: float) -> dict[str, Any]:
        """Return the settings that a reader of a result needs."""
        config = FeaturizeConfig.from_flat(self.store.manifest["config"])
        names = ["num_draws", "num_bands", "scheme", "proposal", "noise", "weighting", "objective"]
        if config.estimator.random_encoding:
            names += ["num_encodings", "encoding", "augmentation"]
        used = {"damping": damping} if score.startswith("preconditioned") else {}
        return (
            {"score": score, "kernel": kernel}
            | used
            | {name: getattr(config.estimator, name) for name in names}
            | {"projection": config.projection.projection, "proj_dim": self.store.manifest["proj_dim"]}
            | {"teacher": self.store.manifest["teacher"]["source"], "dataset": self.store.manifest["dataset"]["source"]}
        )


def label_name(label: int | None, names: Sequence[str] | None) -> str | None:
    """Return the class name of a label where there is one, else its number."""
    if label is None:
        return None
    return names[label] if names is not None and 0 <= label < len(names) else str(label)


def _open(image: ImageLike) -> tuple[Image.Image, str]:
    """Return a picture and its name."""
    if isinstance(image, Image.Image):
        return image, str(getattr(image, "filename", "") or "image")
    return open_image(image), Path(image).name


def _query_id(pixels: Tensor) -> int:
    """Return a negative id, unlike any example's, from a picture's content: never from its place in a batch."""
    return -1 - int.from_bytes(hashlib.sha256(pixels.numpy().tobytes()).digest()[:7], "little")


def _describe_condition(label: int | None, prompt: str | None, names: Sequence[str] | None) -> str:
    if label is not None:
        name = label_name(label, names)
        return f"label {label}" if name == str(label) else f"label {label} ({name})"
    return "" if prompt is None else f"prompt {json.dumps(prompt, ensure_ascii=False)}"
