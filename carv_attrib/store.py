"""The on-disk store: a manifest, and one pair of files for each part of the dataset (`docs/store-format.md`).

A part covers fixed dataset rows, so that a store has the same bytes however often its making was interrupted. Every
file is written under a temporary name, fsynced and renamed; a part is done when its features file has its name.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from torch import Tensor

from carv_attrib.errors import StoreCorruptError, StoreError, StoreMismatchError
from carv_attrib.files import file_digest, read_sealed, unfinished_files, write_sealed
from carv_attrib.parts import PartFeatures, PartRows, features_checksum, open_features, read_tensors, write_tensors
from carv_attrib.records import Record, read_records, write_records

FORMAT_VERSION = 5
_MAX_OPENED = 1000  # parts whose checksums are kept
_PART_NAME = re.compile(r"part-\d{6,}")
ENSEMBLE_FILE = "ensemble.json"
"""Lists the folders of the stores of several teachers; it lies beside them."""


@dataclass(frozen=True)
class Segment:
    """A data set whose examples are in a store: the one that it was begun with, or one that was appended.

    Attributes:
        dataset: its entry in the manifest.
        first_part: number of its first part.
        part_size: rows of a part.
    """

    dataset: Mapping[str, Any]
    first_part: int
    part_size: int

    @property
    def parts(self) -> range:
        """Numbers of its parts."""
        num_parts = -(-int(self.dataset["num_examples"]) // self.part_size)
        return range(self.first_part, self.first_part + num_parts)

    def rows(self, part: int) -> range:
        """Return the rows of the data set that a part covers."""
        first = (part - self.first_part) * self.part_size
        return range(first, min(first + self.part_size, int(self.dataset["num_examples"])))


def _check_numbers(manifest: Mapping[str, Any]) -> None:
    """Check the numbers of a manifest that say how large things are.

    Raises:
        ValueError: if one is not a positive integer.
    """
    config = manifest["config"]
    sizes = {name: config[name] for name in ("part_size", "num_bands")}
    sizes |= {name: manifest[name] for name in ("num_replicates", "proj_dim")}
    sizes["block_dim"] = config.get("block_dim", 1)  # not in older formats
    for dataset in (manifest["dataset"], *manifest.get("appended", ())):
        sizes["num_examples"] = dataset["num_examples"]
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} is {size!r}")


class FeatureStore:
    """A folder of features, open for reading and for adding the parts that are missing."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self._opened: dict[int, PartRows] = {}

    @staticmethod
    def open(path: str | Path) -> FeatureStore:
        """Return the store in a folder.

        Raises:
            StoreError: if there is none, or it was made by a newer version.
            StoreCorruptError: if its manifest cannot be read.
        """
        path = Path(path)
        file = path / "manifest.json"
        if not path.exists():
            raise StoreError(f"{path} does not exist; name the folder that `carv-attrib featurize` wrote.")
        if (path / ENSEMBLE_FILE).is_file():
            raise StoreError(
                f"{path} has an index for each of several teachers; name one, such as {path}/checkpoint-0."
            )
        if not file.is_file():
            raise StoreError(f"{path} is not an index: it has no manifest.json; make one with `carv-attrib featurize`.")
        try:
            manifest = read_sealed(file)
            version = int(manifest["format_version"])
            if version in (3, 4, FORMAT_VERSION):
                _check_numbers(manifest)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as err:
            raise StoreCorruptError(f"{file} is damaged: {err}.") from err
        if version == 3:  # it also has draws of some examples, for a kernel; they are not read
            manifest["config"].pop("kernel_examples", None)
        if version in (3, 4):
            manifest["config"].setdefault("block_dim", manifest["config"].get("proj_dim", manifest["proj_dim"]))
        elif version != FORMAT_VERSION:
            raise StoreError(
                f"{path} has format version {version}, this program reads 3 to {FORMAT_VERSION}; featurize again."
            )
        return FeatureStore(path, manifest)

    @staticmethod
    def create(path: str | Path, manifest: Mapping[str, Any]) -> FeatureStore:
        """Return a new, empty store with the given manifest.

        Raises:
            StoreError: if the folder cannot be written, or holds something else, or another process makes one there.
        """
        path = Path(path)
        own = ("features", "examples")
        if path.exists() and (not path.is_dir() or any(p.name not in own and p.name[0] != "." for p in path.iterdir())):
            raise StoreError(f"`output` {path} exists and is not an index; name a new or an empty folder.")
        store = FeatureStore(path, {"format": "carv-attrib index", "format_version": FORMAT_VERSION, **manifest})
        try:
            for name in own:
                (path / name).mkdir(parents=True, exist_ok=True)
            with store._locked():
                if (path / "manifest.json").exists():
                    raise StoreError(f"`output` {path} was begun by another process meanwhile; run it again.")
                store._write_manifest()
        except OSError as err:
            raise StoreError(f"`output` {path} cannot be written: {err.strerror}; choose another folder.") from err
        return FeatureStore.open(path)

    def _write_manifest(self) -> None:
        write_sealed(self.path / "manifest.json", self.manifest)

    def change_manifest(self, **entries: Any) -> None:
        """Change entries of the manifest, on disk too, after the search index was taken away: it is of other examples.

        Raises:
            StoreError: if the folder cannot be written.
        """
        self.manifest = {**self.manifest, **entries}
        try:
            self.retire_index()
            self._write_manifest()
        except OSError as err:
            raise StoreError(f"{self.path} cannot be written: {err.strerror}; mend that, and run it again.") from err

    def retire_index(self) -> None:
        """Take the search index away; what it was made for stays, so that the next one can be made for it too.

        Raises:
            OSError: if the folder cannot be written.
        """
        file = self.path / "index.json"
        try:
            write_sealed(file, read_sealed(file) | {"bytes": {}, "sha256": {}})
        except FileNotFoundError:
            pass
        except (ValueError, TypeError):
            file.unlink()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the store, as it is now, for one writer, and remove what a killed one left unfinished.

        Raises:
            StoreError: if another process is writing, the folder cannot be written, or it holds another index now.
        """
        with self._locked():
            for leftover in unfinished_files(self.path):
                leftover.unlink(missing_ok=True)  # a query's own, which has got its name
            self._take_up_changes()
            self._finish_removal()
            yield

    def _take_up_changes(self) -> None:
        """Read again what other writers may have changed since this store was opened."""
        found, changing = FeatureStore.open(self.path).manifest, {"appended", "removed"}
        if any(found.get(name) != self.manifest.get(name) for name in {*found, *self.manifest} - changing):
            raise StoreError(f"{self.path} was made anew after it was opened; run it again.")
        self.manifest = found
        self._forget_parts()

    def _forget_parts(self) -> None:
        """Forget which parts there are, and what is in them: they are other ones now."""
        for cached in ("parts", "_part_ids"):
            self.__dict__.pop(cached, None)
        self._opened.clear()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other writers out.

        Raises:
            StoreError: if another process is writing, or the folder cannot be written.
        """
        try:
            lock = (self.path / ".lock").open("a+")
        except OSError as err:
            raise StoreError(f"{self.path} cannot be written: {err.strerror}; choose another folder.") from err
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as err:
                lock.seek(0)
                writer = lock.read(200).strip() or "another process"
                raise StoreError(f"{writer} is writing to {self.path}; wait for it, or stop it.") from err
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
            try:
                yield
            finally:
                lock.truncate(0)

    def check_matches(self, requested: Mapping[str, Any]) -> None:
        """Check that the store was made with the requested settings.

        Raises:
            StoreMismatchError: with each field that differs, and both values.
        """
        stored = _flatten(self.manifest)
        differences = [
            f"{name}: stored {stored.get(name)!r}, requested {value!r}"
            for name, value in _flatten(requested).items()
            if stored.get(name) != value
        ]
        if differences:
            older = self.manifest["format_version"] != FORMAT_VERSION
            raise StoreMismatchError(
                f"{self.path} was made with other settings ({'; '.join(differences)})"
                f"{' by an older version, with other defaults' if older else ''}; use them, or another folder."
            )

    @property
    def num_parts(self) -> int:
        """Number of parts that a complete store has."""
        return self.segments[-1].parts.stop

    @property
    def segments(self) -> list[Segment]:
        """The data sets whose examples are in the store, in the order of their parts."""
        size, found, first_part = int(self.manifest["config"]["part_size"]), [], 0
        for dataset in (self.manifest["dataset"], *self.manifest.get("appended", ())):
            found.append(Segment(dataset, first_part, size))
            first_part = found[-1].parts.stop
        return found

    def part_rows(self, part: int) -> range:
        """Return the rows that a part covers, of the data set that it belongs to."""
        return next(segment.rows(part) for segment in self.segments if part in segment.parts)

    @property
    def removed(self) -> frozenset[int]:
        """Ids of the examples that were removed, and are not to come back."""
        return frozenset(self.manifest.get("removed", ()))

    def missing_parts(self) -> list[int]:
        """Return the parts that are still to be computed."""
        done = set(self._done())
        return [part for part in range(self.num_parts) if part not in done]

    @property
    def is_complete(self) -> bool:
        """Whether no part is missing."""
        return len(self._done()) == self.num_parts

    def _done(self) -> list[int]:
        """Return the parts that are there, increasing: two folders are listed, whatever the manifest says."""
        features, examples = (
            {path.stem for path in (self.path / folder).glob(f"part-*{suffix}")}
            for folder, suffix in (("features", ".safetensors"), ("examples", ".parquet"))
        )
        numbers = [int(name.removeprefix("part-")) for name in features & examples if _PART_NAME.fullmatch(name)]
        return sorted(number for number in numbers if number < self.num_parts)

    def features_path(self, part: int) -> Path:
        """Return the file that holds the features of a part."""
        return self.path / "features" / f"part-{part:06d}.safetensors"

    def examples_path(self, part: int) -> Path:
        """Return the file that holds the records of a part."""
        return self.path / "examples" / f"part-{part:06d}.parquet"

    def references_path(self, number: int, key: str) -> Path:
        """Return the file that keeps a round of fresh draws of the references."""
        return self.path / "references" / f"round-{number:03d}-{key}.safetensors"

    def write_part(self, part: int, features: PartFeatures | None, records: Sequence[Record]) -> None:
        """Commit one part: its records first, then its features, whose presence is the sign that it is done.

        Args:
            part: number of the part.
            features: None if every example was skipped.
            records: of all examples of the part, in row order.

        Raises:
            StoreError: if the disk is full or the folder cannot be written; nothing that was done is lost.
        """
        records = [record for record in records if record.id not in self.removed]
        features = features if features is not None else self._empty_part()
        tensors = features.packed(self.manifest["config"]["feature_dtype"])
        self._write_files(part, self._without_removed(tensors), records)

    def _without_removed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a part without the rows of removed examples."""
        if not self.removed:
            return dict(tensors)
        keep = torch.tensor([i not in self.removed for i in tensors["ids"].tolist()], dtype=torch.bool)
        return {name: values[keep] if values.dim() else values for name, values in tensors.items()}

    def _write_files(self, part: int, tensors: Mapping[str, Tensor], records: Sequence[Record]) -> None:
        self._opened.pop(part, None)
        try:
            write_records(self.examples_path(part), records)
            write_tensors(self.features_path(part), tensors, file_digest(self.examples_path(part)))
        except (OSError, SafetensorError) as err:
            raise StoreError(
                f"part {part} cannot be written to {self.path}: {err}; mend that, and start again."
            ) from err

    def remove(self, ids: Iterable[int]) -> None:
        """Take examples, if any, out of the features and the records, for good: they are not made again either.

        A removal that was stopped is finished when the store is next held for `writing`.

        Raises:
            StoreError: if the folder cannot be written.
            StoreCorruptError: if a part is damaged.
        """
        if new := set(ids) - self.removed:
            self.change_manifest(removed=sorted(self.removed | new))
        self._finish_removal()

    def _finish_removal(self) -> None:
        """Rewrite the parts that still have removed examples."""
        if not self.removed:
            return
        for part in self.parts:
            records = self.read_records(part)
            kept = [record for record in records if record.id not in self.removed]
            with self._open_part(part) as file:
                stale = not self.removed.isdisjoint(file.get_tensor("ids").tolist())
            if stale or len(kept) < len(records):
                tensors = read_tensors(self.features_path(part), self.feature_shape)
                self._write_files(part, self._without_removed(tensors), kept)
        for file in self._references_files():
            if not self._is_of_these_examples(file):
                try:
                    file.unlink(missing_ok=True)
                except OSError as err:
                    raise StoreError(f"{file} cannot be deleted: {err.strerror}; delete it, and go on.") from err
        self._forget_parts()

    def read_part(self, part: int) -> PartFeatures:
        """Return the features of a part, in float32.

        Raises:
            StoreCorruptError: if the file is damaged or is not of this store's shape.
        """
        return PartFeatures.unpacked(read_tensors(self.features_path(part), self.feature_shape))

    def read_parts(self) -> Iterator[PartFeatures]:
        """Yield the features of all parts, in the order of `ids`, in float32.

        Raises:
            StoreError: if examples were removed after the store was opened.
            StoreCorruptError: if a file is damaged.
        """
        for place, part in enumerate(self.parts):
            content = self.read_part(part)
            self._check_ids(place, content.ids)
            yield content

    def _check_ids(self, place: int, ids: Int64[Tensor, " examples"]) -> None:
        """Check that the part at a place of `parts` has the ids that it had when the store was opened.

        Raises:
            StoreError: if it has others.
        """
        if not np.array_equal(ids.numpy(), self._part_ids[place]):
            raise StoreError(f"{self.path} was changed after it was opened; open it again.")

    @cached_property
    def parts(self) -> list[int]:
        """The parts that were there when first asked for."""
        return self._done()

    @cached_property
    def _part_ids(self) -> list[Int64[np.ndarray, " examples"]]:
        ids = []
        for part in self.parts:
            with self._open_part(part) as file:
                ids.append(file.get_tensor("ids").numpy())
        return ids

    @property
    def ids(self) -> Int64[np.ndarray, " examples"]:
        """Ids of all examples that have features, in the order of the store."""
        return np.concatenate(self._part_ids) if self._part_ids else np.empty(0, np.int64)

    def digest(self) -> str:
        """Return the hex SHA-256 of the checksums of all parts, in order: it changes with any feature or id."""
        digest = hashlib.sha256()
        for part in self.parts:
            with self._open_part(part) as file:
                digest.update(f"{part}:{features_checksum(file)}\n".encode())
        return digest.hexdigest()

    def read_features(self, positions: Sequence[int]) -> Float[Tensor, "examples bands replicates proj_dim"]:
        """Return the features at positions of `ids`, in float32, reading no more of each file than needed.

        Raises:
            StoreError: if examples were removed after the store was opened.
            StoreCorruptError: if one is damaged.
        """
        wanted = np.asarray(positions, np.int64)
        bounds = np.cumsum([0, *map(len, self._part_ids)])
        owners = np.searchsorted(bounds, wanted, side="right") - 1
        found = torch.empty(len(wanted), *self.feature_shape)
        for owner in np.unique(owners).tolist():
            own = owners == owner
            found[own] = torch.from_numpy(self._part_rows(owner).read(wanted[own] - bounds[owner]))
        return found

    def _part_rows(self, place: int) -> PartRows:
        """Return what reads rows of the part at a place of `parts`; it is kept for the next query."""
        part = self.parts[place]
        if part not in self._opened or self._opened[part].was_replaced():
            if len(self._opened) >= _MAX_OPENED:
                self._opened.clear()
            with self._open_part(part) as file:
                self._check_ids(place, file.get_tensor("ids"))
                self._opened[part] = PartRows(self.features_path(part), file, self._part_ids[place])
        return self._opened[part]

    def read_records(self, part: int) -> list[Record]:
        """Return the records of a part, skipped examples among them.

        Raises:
            StoreCorruptError: if the file is damaged.
        """
        return read_records(self.examples_path(part))

    def find_records(self, ids: Sequence[int]) -> dict[int, Record]:
        """Return the records of the examples with the given ids.

        Raises:
            StoreCorruptError: if one has none.
        """
        wanted = {int(i) for i in ids}
        owners = [part for part, own in zip(self.parts, self._part_ids, strict=True) if wanted & set(own.tolist())]
        found = {record.id: record for part in owners for record in self.read_records(part) if record.id in wanted}
        if lost := sorted(wanted - set(found)):
            raise StoreCorruptError(
                f"{self.path / 'examples'} has no record of example {lost[0]}; run `carv-attrib verify`."
            )
        return found

    def num_skipped(self) -> int:
        """Return how many examples have a record but no features."""
        return sum(len(self.part_rows(part)) for part in self.parts) - len(self.removed) - len(self.ids)

    def verify(self) -> list[str]:
        """Return one line for everything that is wrong: damaged, missing or inconsistent files."""
        problems = []
        done = self._done()
        if missing := self.num_parts - len(done):
            first = next((place for place, part in enumerate(done) if part != place), len(done))
            problems.append(
                f"{missing} of {self.num_parts} parts are missing, the first is part {first}; run featurize again."
            )
        for part in done:
            try:
                features = self.read_part(part)
                if not torch.isfinite(features.features).all():
                    raise StoreCorruptError(f"{self.features_path(part)} holds NaN or infinity.")
                records = self.read_records(part)
                if not self.removed.isdisjoint(record.id for record in records):
                    raise StoreCorruptError(
                        f"{self.examples_path(part)} has removed examples; run `carv-attrib index`."
                    )
                good = [record.id for record in records if record.error is None]
                if good != features.ids.tolist():
                    raise StoreCorruptError(f"{self.examples_path(part)} does not list the examples of its features.")
                self._check_examples(part)
            except StoreCorruptError as err:
                problems.append(str(err))
        problems += [
            f"{file} is damaged or has removed examples; delete it, and the next query that refines makes it again."
            for file in self._references_files()
            if not self._is_of_these_examples(file)
        ]
        return problems

    def _references_files(self) -> list[Path]:
        """Return the files that keep fresh draws of the references."""
        return sorted((self.path / "references").glob("round-*.safetensors"))

    def _is_of_these_examples(self, file: Path) -> bool:
        """Return whether a file of draws of the references is whole, and has none of an example that was removed."""
        try:
            return self.removed.isdisjoint(read_tensors(file, self.feature_shape)["ids"].tolist())
        except StoreCorruptError:
            return False

    def _check_examples(self, part: int) -> None:
        """Compare the checksum of the records of a part, of which reading compares no more than the pages."""
        with self._open_part(part) as file:  # parts of earlier versions have none
            expected = file.get_tensor("examples_sha256") if "examples_sha256" in file.keys() else None
        path = self.examples_path(part)
        if expected is not None and bytes(expected.tolist()).hex() != file_digest(path):
            raise StoreCorruptError(f"{path} is damaged: its checksum does not match; delete it, featurize again.")

    def _empty_part(self) -> PartFeatures:
        return PartFeatures(torch.empty(0, dtype=torch.int64), torch.empty(0, *self.feature_shape))

    @property
    def feature_shape(self) -> list[int]:
        """Bands, replicates and dimensions of the features of one example."""
        return [self.manifest["config"]["num_bands"], self.manifest["num_replicates"], self.manifest["proj_dim"]]

    def _open_part(self, part: int) -> AbstractContextManager[Any]:
        return open_features(self.features_path(part), self.feature_shape)


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
