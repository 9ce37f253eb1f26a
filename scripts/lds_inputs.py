"""What every method of the LDS benchmark starts from, and how it keeps what it made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_lds_ground_truth import load_digits, query_pixels

from carv_attrib import featurize
from carv_attrib.config import FeaturizeConfig
from carv_attrib.data.sources import open_digits
from carv_attrib.estimator import Encoded
from carv_attrib.evaluation import GroundTruth
from carv_attrib.files import atomic_file
from carv_attrib.store import FORMAT_VERSION, FeatureStore
from carv_attrib.teacher import Teacher

WORK = Path("build/lds")
DAMPINGS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Relative to the mean eigenvalue of each method's own kernel."""


@dataclass(frozen=True)
class Inputs:
    """A task: its teacher, and what is known of retrained models."""

    task: str
    teacher: Teacher
    truth: GroundTruth

    @property
    def num_train(self) -> int:
        """Training examples, the first rows of all that is encoded; queries come after them."""
        return len(self.truth.train_ids)

    @property
    def ids(self) -> list[int]:
        """What independent draws are keyed by; those of queries are negative."""
        return [*self.truth.train_ids.tolist(), *(-1 - row for row in range(len(self.truth.query_labels)))]

    @cached_property
    def encoded(self) -> Encoded:
        """Training examples, then queries."""
        digits = load_digits(self.task)
        pixels = query_pixels(self.teacher, self.truth.query_images)
        with torch.no_grad():
            latents = torch.cat([digits.latents[digits.train_ids], self.teacher.encode(pixels)])
        labels = None
        if self.teacher.condition_kind == "label":
            labels = digits.labels[digits.train_ids].tolist() + self.truth.query_labels.tolist()
        return Encoded(latents[:, None], self.teacher.condition(labels, None))

    def folder(self, settings: dict[str, Any]) -> Path:
        """Return the folder of what these settings make with this teacher; it need not be there."""
        defaults = FeaturizeConfig.from_flat({}).identity()
        key = json.dumps([settings, defaults, FORMAT_VERSION, self.teacher.fingerprint], sort_keys=True)
        return WORK / self.task / hashlib.sha256(key.encode()).hexdigest()[:24]


def index(inputs: Inputs, settings: dict[str, Any]) -> FeatureStore:
    """Return the index of the training examples with some settings of `featurize`, which goes on where it was."""
    ids = inputs.truth.train_ids
    digits = open_digits().select(ids).add_column("id", ids.tolist())
    latents = str(WORK / inputs.task / "latents")
    return featurize(inputs.teacher, digits, inputs.folder(settings), id_column="id", latent_cache=latents, **settings)


def take(encoded: Encoded, rows: slice) -> Encoded:
    """Return some of the examples."""
    return Encoded(encoded.latents[rows], {name: values[rows] for name, values in encoded.condition.items()})


def kept(file: Path, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the arrays in an npz file, which is made where it is missing."""
    if not file.is_file():
        arrays = compute()
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as temporary, temporary.open("wb") as opened:
            np.savez(opened, **arrays)
    with np.load(file) as content:
        return dict(content)
