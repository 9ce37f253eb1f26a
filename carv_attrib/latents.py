"""Encoded batches, part by part: from images that threads read ahead, or from the latent cache (`docs/data.md`).

The cache is a folder with one sub-folder for each way of encoding a dataset, named by a hash of all that decides what
is in it; the denoiser does not, nor do the draws. A part of it is a pair of files, and is there when both are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from carv_attrib.batches import Batch, check_label, encode_batch, read_batch
from carv_attrib.config import ExecutionConfig
from carv_attrib.data import RESIZE_RULE, ExampleDataset
from carv_attrib.errors import ArgumentError, BadImageError, StoreCorruptError, StoreError
from carv_attrib.estimator import Encoded, Estimator
from carv_attrib.files import atomic_file, file_digest
from carv_attrib.parts import tensor_digest
from carv_attrib.records import Record, read_records, write_records
from carv_attrib.teacher import Teacher, placement
from carv_attrib.threads import in_background, in_order

CACHE_VERSION = 1
CONDITION = "condition."
"""What the names of a condition's tensors begin with in a file."""


@dataclass(frozen=True)
class EncodedBatch:
    """Some rows of a dataset after the expensive upstream work.

    Attributes:
        encoded: the examples that could be read; None if there are none.
        records: of all examples, in row order, skipped ones among them.
    """

    encoded: Encoded | None
    records: list[Record]

    @property
    def ids(self) -> Int64[Tensor, " batch"]:
        """The ids of the examples that could be read."""
        return torch.tensor([record.id for record in self.records if record.error is None], dtype=torch.int64)

    @property
    def keys(self) -> list[str]:
        """The names of the examples that could be read."""
        return [record.key for record in self.records if record.error is None]


def encoded_parts(
    estimator: Estimator,
    examples: ExampleDataset,
    parts: Mapping[int, range],
    execution: ExecutionConfig,
    cache: LatentCache | None,
) -> Generator[tuple[int, Iterator[EncodedBatch]], None, None]:
    """Yield each part and its encoded batches, which must be taken before the next part.

    A part that the cache has is neither read nor encoded; another is kept there, once all its batches were taken.

    Args:
        estimator: whose encodings they are.
        examples: the dataset.
        parts: the rows of every wanted part.
        execution: how many rows a batch has, and how they are read.
        cache: of this estimator and dataset, if any.

    Raises:
        BadImageError: for an unreadable image, unless `skip_bad`; also if it was unreadable when the cache was made.
        DataError: for a label that the teacher does not have.
        StoreError: if the cache cannot be written.
        StoreCorruptError: if a file of the cache is damaged.
    """
    step = execution.examples_per_batch(estimator.examples_per_call)
    cached = {part for part in parts if cache and cache.has(part)}
    missing = {part: batch_rows(rows, step) for part, rows in parts.items() if part not in cached}
    read = partial(read_batch, examples, teacher=estimator.teacher, skip_bad=execution.skip_bad)
    with (
        in_background(LatentCache.write_part) as keep,
        closing(in_order(read, chain.from_iterable(missing.values()), execution.num_workers)) as batches,
    ):
        for part in parts:
            if cache and part in cached:
                whole = cache.read_part(part)
                check_records(whole.records, estimator.teacher, cache.records_path(part), execution.skip_bad)
                yield part, split(whole, step, placement(estimator.teacher)[0])
            else:
                own = islice(batches, len(missing[part]))
                yield part, encode_batches(estimator, own, partial(keep, cache, part) if cache else None)


def batch_rows(rows: range, size: int) -> list[range]:
    """Return the rows of a part, so many at a time."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def encode_batches(
    estimator: Estimator, batches: Iterable[Batch], keep: Callable[[Sequence[EncodedBatch]], None] | None
) -> Iterator[EncodedBatch]:
    """Yield batches encoded; give all of them to `keep` at the end."""
    kept = []
    for batch in batches:
        encoded = EncodedBatch(encode_batch(estimator, batch) if len(batch.ids) else None, batch.records)
        yield encoded
        if keep:
            kept.append(encoded)
    if keep:
        keep(kept)


def check_records(records: Iterable[Record], teacher: Teacher, path: Path, skip_bad: bool) -> None:
    """Check that the records of a cached part are of examples that this run would have read.

    Raises:
        BadImageError: for an example that was skipped, unless `skip_bad`.
        DataError: for a label that the teacher does not have.
    """
    for record in records:
        if record.error is None:
            check_label(teacher, record)
        elif not skip_bad:
            raise BadImageError(f"{record.error} So it was when {path} was made; if it is mended, delete that file.")


def split(whole: EncodedBatch, size: int, device: torch.device) -> Iterator[EncodedBatch]:
    """Yield so many rows of a part at a time, moved to the device."""
    first = 0
    for start in range(0, len(whole.records), size):
        records = whole.records[start : start + size]
        own = slice(first, first + sum(record.error is None for record in records))
        first = own.stop
        if whole.encoded is None or own.start == own.stop:
            yield EncodedBatch(None, records)
            continue
        condition = {name: values[own].to(device) for name, values in whole.encoded.condition.items()}
        yield EncodedBatch(Encoded(whole.encoded.latents[own].to(device), condition), records)


class LatentCache:
    """Latents, conditions and records of a dataset under one encoder; made by `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def open(folder: str | Path, estimator: Estimator, examples: ExampleDataset, part_size: int) -> LatentCache:
        """Return the cache of an estimator's encodings of a dataset, in a sub-folder, new or as it was left.

        Raises:
            ArgumentError: if the teacher does not say what its encoder is.
            StoreError: if the folder cannot be written.
        """
        if not estimator.teacher.encoder_fingerprint:
            raise ArgumentError(
                f"`latent_cache` needs the teacher's `encoder_fingerprint`, {estimator.teacher.source} has none; "
                "leave it out."
            )
        key = json.dumps(encoding_key(estimator, examples, part_size), indent=1, sort_keys=True) + "\n"
        path = Path(folder) / hashlib.sha256(key.encode()).hexdigest()[:32]
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not (path / "key.json").exists():
                with atomic_file(path / "key.json") as temporary:
                    temporary.write_text(key)
        except OSError as err:
            raise StoreError(
                f"`latent_cache` {folder} cannot be written: {err.strerror}; choose another folder."
            ) from err
        return LatentCache(path)

    def latents_path(self, part: int) -> Path:
        """Return the file that holds the latents and the conditions of a part."""
        return self.path / f"part-{part:06d}.safetensors"

    def records_path(self, part: int) -> Path:
        """Return the file that holds the records of a part."""
        return self.path / f"part-{part:06d}.parquet"

    def has(self, part: int) -> bool:
        """Return whether a part is there."""
        return self.latents_path(part).is_file() and self.records_path(part).is_file()

    def write_part(self, part: int, batches: Sequence[EncodedBatch]) -> None:
        """Keep all batches of a part: records first, then latents, which have the checksums of both.

        Raises:
            StoreError: if the disk is full or the folder cannot be written.
        """
        tensors = _joined([batch.encoded for batch in batches if batch.encoded is not None])
        try:
            write_records(self.records_path(part), [record for batch in batches for record in batch.records])
            checksums = {"sha256": tensor_digest(tensors), "records_sha256": file_digest(self.records_path(part))}
            with atomic_file(self.latents_path(part)) as temporary:
                save_file(tensors, temporary, metadata=checksums)
        except (OSError, SafetensorError) as err:
            raise StoreError(
                f"part {part} of `latent_cache` cannot be written to {self.path}: {err}; mend that, or leave it out."
            ) from err

    def read_part(self, part: int) -> EncodedBatch:
        """Return a part as one batch.

        Raises:
            StoreCorruptError: if a file is damaged.
        """
        path, records_path = self.latents_path(part), self.records_path(part)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                checksums = file.metadata() or {}
            digests = {path: tensor_digest(tensors), records_path: file_digest(records_path)}
        except (OSError, SafetensorError) as err:
            raise StoreCorruptError(f"{path} is damaged: {err}; delete it, and run this again.") from err
        for (damaged, digest), name in zip(digests.items(), ("sha256", "records_sha256"), strict=True):
            if checksums.get(name) != digest:
                raise StoreCorruptError(
                    f"{damaged} is damaged: its checksum does not match; delete it, and run this again."
                )
        latents = tensors.pop("latents", None)
        condition = {name.removeprefix(CONDITION): values for name, values in tensors.items()}
        return EncodedBatch(None if latents is None else Encoded(latents, condition), read_records(records_path))


def encoding_key(estimator: Estimator, examples: ExampleDataset, part_size: int) -> dict[str, Any]:
    """Return all that decides what a cache holds; of settings that play no part, nothing."""
    config, teacher = estimator.config, estimator.teacher
    random = {name: getattr(config, name) for name in ("num_encodings", "encoding", "augmentation", "seed")}
    return {
        "cache_version": CACHE_VERSION,
        "dataset": {
            "fingerprint": examples.fingerprint,
            "num_examples": len(examples),
            "columns": examples.columns,
        },
        "part_size": part_size,
        "pixels": asdict(teacher.pixel_spec),
        "resize_rule": RESIZE_RULE,
        "encoder": teacher.encoder_fingerprint,
        "condition": teacher.condition_kind,
        "dtype": str(placement(teacher)[1]).removeprefix("torch."),
        "random_encodings": random if config.random_encoding else None,
    }


def _joined(pieces: Sequence[Encoded]) -> dict[str, Tensor]:
    """Return the tensors of several batches as those of one, on the CPU; none if there are no batches."""
    if not pieces:
        return {}
    tensors = {"latents": torch.cat([piece.latents for piece in pieces])}
    for name in pieces[0].condition:
        tensors[CONDITION + name] = torch.cat([piece.condition[name] for piece in pieces])
    return {name: values.cpu().contiguous() for name, values in tensors.items()}
