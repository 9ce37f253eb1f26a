"""Batches of examples as a teacher takes them: pixels, labels, prompts, and what is recorded of each."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from carv_attrib.data import Example, ExampleDataset, JoinedExamples, thumbnail, to_pixels
from carv_attrib.errors import BadImageError, DataError
from carv_attrib.estimator import Encoded, Estimator
from carv_attrib.records import Record
from carv_attrib.teacher import Teacher

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Examples that could be read, and a record of every example, skipped ones among them.

    Attributes:
        ids: of the examples that could be read.
        keys: their names.
        pixels: in [-1, 1].
        labels: for a class-conditional teacher, else None.
        prompts: for a text-conditional teacher, else None.
        records: of all examples, in row order.
    """

    ids: Int64[Tensor, " batch"]
    keys: list[str]
    pixels: Float[Tensor, "batch channels height width"]
    labels: list[int | None] | None
    prompts: list[str | None] | None
    records: list[Record]


def check_columns(teacher: Teacher, examples: ExampleDataset) -> None:
    """Check that the dataset has the labels or captions that the teacher is conditioned on.

    Warns if the classes have names, and are not as many as the teacher's: their numbers might mean others there.

    Raises:
        DataError: if it has not.
    """
    if teacher.condition_kind == "label":
        if not examples.has_labels:
            raise DataError(
                f"the teacher needs class labels, but {examples.source} has none (nor are numbers with an empty cell); "
                "name a `label_column`, or sort the pictures into at least two folders, one for each class."
            )
        names = examples.label_names
        if names and len(names) != teacher.num_classes:
            _log.warning(
                "%s has %d classes and the teacher %d; they are numbered in the order of their names, from %s = 0 on: "
                "check that the teacher was trained with these numbers.",
                examples.source,
                len(names),
                teacher.num_classes,
                names[0],
            )
    if teacher.condition_kind == "prompt" and not examples.has_captions:
        raise DataError(f"the teacher needs captions, but {examples.source} has none; name a `caption_column`.")


def read_batch(
    examples: ExampleDataset | JoinedExamples, rows: Sequence[int], teacher: Teacher, *, skip_bad: bool
) -> Batch:
    """Read some rows of a dataset.

    Raises:
        BadImageError: for an unreadable image, unless `skip_bad`, which records it.
        DataError: for a label that the teacher does not have.
    """
    good: list[tuple[Example, Tensor]] = []
    records: list[Record] = []
    for row in rows:
        try:
            example = examples.load(row)
            pixels = to_pixels(example.image, teacher.pixel_spec)
        except BadImageError as err:
            if not skip_bad:
                raise
            records.append(Record(int(examples.ids[row]), examples.key(row), None, None, b"", error=str(err)))
            continue
        check_label(teacher, example)
        good.append((example, pixels))
        records.append(Record(example.id, example.key, example.label, example.caption, thumbnail(pixels)))
    spec = teacher.pixel_spec
    return Batch(
        ids=torch.tensor([example.id for example, _ in good], dtype=torch.int64),
        keys=[example.key for example, _ in good],
        pixels=torch.stack([p for _, p in good]) if good else torch.empty(0, spec.channels, spec.height, spec.width),
        labels=[example.label for example, _ in good] if teacher.condition_kind == "label" else None,
        prompts=[example.caption for example, _ in good] if teacher.condition_kind == "prompt" else None,
        records=records,
    )


def check_label(teacher: Teacher, example: Example | Record) -> None:
    """Check that a class-conditional teacher has the class of an example.

    Raises:
        DataError: if it has not.
    """
    if teacher.condition_kind == "label" and (example.label is None or not 0 <= example.label < teacher.num_classes):
        raise DataError(
            f"{example.key} has label {example.label}, but the teacher's classes are 0 to {teacher.num_classes - 1}; "
            "correct it, or name another `label_column`."
        )


def encode_batch(estimator: Estimator, batch: Batch) -> Encoded:
    """Return the latents and the condition of a batch."""
    return estimator.encode(batch.pixels, batch.labels, batch.prompts, batch.ids.tolist())
