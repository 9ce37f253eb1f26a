"""Examples: (id, key, image, label, caption), one by one from the rows of a `datasets.Dataset`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
from PIL import Image

from carv_attrib.data.images import decode_image, printable, reason
from carv_attrib.errors import ArgumentError, BadImageError, DataError

if TYPE_CHECKING:
    import datasets

_READ_ERRORS = (OSError, ValueError, zipfile.BadZipFile, zlib.error)
_FINGERPRINT_IMAGES = 64


@dataclass(frozen=True)
class Example:
    """One training example; `label` None if the dataset gives none, `caption` None if it has no captions."""

    id: int
    key: str
    image: Image.Image
    label: int | None
    caption: str | None


@final
class ExampleDataset:
    """The rows of a dataset as examples; made by `open_dataset`.

    Attributes:
        source: where it came from: a path, a hub id, "digits" or "in-memory dataset".
        columns: the column that was picked for "image", "label", "caption" and "id", or None.
        ids: int64, unique, one per row.
        label_names: the names of the classes, where the dataset has them.
        has_labels: whether there is a label column.
        has_captions: whether there is a caption column.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        columns: Mapping[str, str | None],
        source: str,
        folder: Path | None = None,
        first_id: int = 0,
        label_names: Sequence[str] | None = None,
    ) -> None:
        """Read every column but the images; files of an image `folder` must lie inside it."""
        import datasets

        self.source, self.columns, self._folder = source, dict(columns), folder
        self._image_column = str(columns["image"])
        image_feature = rows.features[self._image_column]
        self._rows = rows = rows.with_format(None)
        if isinstance(image_feature, datasets.Image):
            rows = rows.cast_column(self._image_column, datasets.Image(decode=False))
        self._cells = rows.select_columns([self._image_column])
        self._keys = _row_keys(_cell_paths(self._cells, self._image_column), folder)
        self.ids = _read_ids(rows, columns["id"], first_id)
        self._labels, self.label_names = _read_labels(rows, columns["label"])
        if label_names is not None and self._labels and self.label_names:
            self._labels = _renumbered(self._labels, self.label_names, label_names, source)
            self.label_names = tuple(label_names)
        self._captions = _read_column(rows, columns["caption"])
        self.has_labels, self.has_captions = self._labels is not None, self._captions is not None
        if not self.has_labels:
            self.columns["label"] = None

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._keys)

    def key(self, row: int) -> str:
        """The printable name of a row: its file relative to the folder, or "row 17"."""
        return self._keys[row]

    def column(self, name: str) -> list[str]:
        """Return any column as texts: class names for numbers of classes, a list with commas, nothing as "".

        Raises:
            ArgumentError: if there is no such column, or it holds the images.
        """
        names = [column for column in self._rows.column_names if column != self._image_column]
        if name not in names:
            raise ArgumentError(f"there must be a column {name} in {self.source}, it has {', '.join(names) or 'none'}.")
        values = _read_column(self._rows, name) or []
        classes = getattr(self._rows.features[name], "names", None)
        return [_text(classes[value] if classes and value is not None and value >= 0 else value) for value in values]

    def load(self, row: int) -> Example:
        """Decode one row.

        Raises:
            BadImageError: the image is missing, damaged or not readable; the message begins with its key.
        """
        image = decode_image(self._content(row), self.key(row))
        label = None if self._labels is None else self._labels[row]
        return Example(int(self.ids[row]), self.key(row), image, label, self._caption(row))

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the data: the same in every process, for every folder and cache.

        Over the number of rows, the ids, keys, labels and captions of all of them, and the raw image bytes of up to 64
        evenly spaced rows (of an image that cannot be read, the fact).
        """
        captions = [self._caption(row) for row in range(len(self))]
        digest = hashlib.sha256(json.dumps([len(self), self.ids.tolist(), self._keys, self._labels, captions]).encode())
        for row in np.unique(np.linspace(0, len(self) - 1, _FINGERPRINT_IMAGES).round().astype(int)).tolist():
            try:
                content = self._content(row)
            except BadImageError:
                content = b"unreadable"
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()

    def _caption(self, row: int) -> str | None:
        """The caption; the first of several; "" where it is missing."""
        if self._captions is None:
            return None
        caption = self._captions[row]
        if isinstance(caption, list):
            caption = caption[0] if caption else None
        return caption or ""

    def _content(self, row: int) -> bytes:
        key = self.key(row)
        try:
            cell = self._cells[row][self._image_column]
        except (ValueError, OSError) as err:
            raise BadImageError(f"{key}: the row cannot be read ({reason(err)}).") from err
        content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if content is not None:
            return bytes(content)
        if not path:
            raise BadImageError(f"{key}: the row has no image (neither bytes nor a path); fill or remove it.")
        if self._folder and not Path(os.path.realpath(path.split("::")[-1])).is_relative_to(self._folder):
            raise BadImageError(f"{key}: a link that leads out of the folder; copy the file into it.")
        return _read_file(path, key)


class JoinedExamples:
    """The examples of several data sets, one after the other; what is needed of an `ExampleDataset` to read them."""

    def __init__(self, parts: Sequence[ExampleDataset]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.ids = np.concatenate([part.ids for part in parts])
        self.label_names = parts[0].label_names
        self.has_labels = all(part.has_labels for part in parts)
        self.has_captions = all(part.has_captions for part in parts)

    def key(self, row: int) -> str:
        """The printable name of a row."""
        part, own = self._locate(row)
        return part.key(own)

    def load(self, row: int) -> Example:
        """Decode one row, as `ExampleDataset.load` does."""
        part, own = self._locate(row)
        return part.load(own)

    def column(self, name: str) -> list[str]:
        """Return any column as texts, as `ExampleDataset.column` does; every data set must have it."""
        return [value for part in self._parts for value in part.column(name)]

    def _locate(self, row: int) -> tuple[ExampleDataset, int]:
        number = int(np.searchsorted(self._ends, row, side="right"))
        return self._parts[number], row - int(self._ends[number]) + len(self._parts[number])


def _read_file(path: str, key: str) -> bytes:
    try:
        if "://" not in path:
            return Path(path).read_bytes()
        import fsspec  # "zip://a.png::images.zip" or "hf://...", as `datasets` writes them

        with fsspec.open(path, "rb") as file:
            return bytes(file.read())
    except FileNotFoundError as err:
        raise BadImageError(f"{key}: the file is missing; restore it or remove its row.") from err
    except _READ_ERRORS as err:
        raise BadImageError(f"{key}: the file cannot be read ({reason(err)}).") from err


def _read_column(rows: datasets.Dataset, name: str | None) -> list[Any] | None:
    if name is None:
        return None
    try:
        values: list[Any] = rows.select_columns([name]).with_format("arrow")[:].column(0).to_pylist()
    except (ValueError, OSError) as err:
        raise DataError(f"`dataset` cannot be read: column {printable(name)} is damaged ({reason(err)}).") from err
    return values


def _text(value: Any) -> str:
    if value is None:
        return ""
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)


def _cell_paths(cells: datasets.Dataset, column: str) -> list[str | None]:
    """The paths inside the image cells, without touching the bytes beside them."""
    flat = cells.flatten()
    paths = _read_column(flat, f"{column}.path") if f"{column}.path" in flat.column_names else None
    return [None] * len(cells) if paths is None else paths


def _row_keys(paths: Sequence[str | None], folder: Path | None) -> list[str]:
    """Names of the rows that do not depend on where the files lie: relative to `folder` or to what they share."""
    names = [path and re.sub(r"^\w+://(.*)::(.*)$", r"\2/\1", path, flags=re.DOTALL) for path in paths]
    parents = {name.rpartition(os.sep)[0] for name in names if name and name.startswith(os.sep)}
    root = str(folder) if folder else os.path.commonpath(parents) if parents else ""
    prefix = root.rstrip(os.sep) + os.sep
    return [printable(name.removeprefix(prefix)) if name else f"row {row}" for row, name in enumerate(names)]


def _read_labels(rows: datasets.Dataset, column: str | None) -> tuple[list[int | None] | None, tuple[str, ...] | None]:
    """The labels, None for a row without one (in class columns -1), and the names of their classes."""
    import datasets

    labels, names = _read_column(rows, column), None
    if labels is not None and isinstance(rows.features[column], datasets.ClassLabel):
        labels = [None if label == -1 else label for label in labels]
        names = tuple(rows.features[column].names)
    if labels is None or all(label is None for label in labels):
        return None, None
    return labels, names


def _renumbered(
    labels: Sequence[int | None], names: Sequence[str], wanted: Sequence[str], source: str
) -> list[int | None]:
    """Return labels as the numbers that the names of their classes have among the wanted ones."""
    numbers = {name: number for number, name in enumerate(wanted)}
    used = {label: names[label] for label in labels if label is not None}
    if lost := [name for name in used.values() if name not in numbers]:
        raise DataError(
            f"{source} has a class {lost[0]!r}, which is none of {', '.join(wanted[:10])}{' ...' * (len(wanted) > 10)};"
            " rename it, or leave its examples out."
        )
    return [None if label is None else numbers[used[label]] for label in labels]


def _read_ids(rows: datasets.Dataset, column: str | None, first_id: int) -> np.ndarray:
    values = _read_column(rows, column)
    if values is None:
        return np.arange(first_id, first_id + len(rows), dtype=np.int64)
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        raise DataError(f"`id_column` must hold an integer in every row, column {column} does not; leave it out.")
    if max(values) > np.iinfo(np.int64).max:
        raise DataError(f"`id_column` must hold int64 integers, column {column} has {max(values)}; leave it out.")
    ids, counts = np.unique(np.array(values, dtype=np.int64), return_counts=True)
    if len(ids) < len(values):
        raise DataError(f"`id_column` must be unique, column {column} repeats {ids[counts > 1][0]}; leave it out.")
    return np.array(values, dtype=np.int64)
