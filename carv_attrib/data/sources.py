"""Where datasets come from, and which of their columns hold what.

Opening reads no image. `datasets`, `pyarrow` and `sklearn` are imported only when they are needed.
"""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from carv_attrib.data.examples import ExampleDataset
from carv_attrib.data.images import RASTER_FORMATS, printable, reason
from carv_attrib.errors import ArgumentError, DataError

if TYPE_CHECKING:
    import datasets

_log = logging.getLogger(__name__)
_SPLIT_FOLDERS = frozenset("train training val valid validation dev test testing eval evaluation".split())
_ARCHIVES = frozenset((".zip", ".tar"))
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_FILE_SUFFIX = re.compile(r"\.(parquet|arrow|csv|jsonl?|zip|tar|gz|png|jpe?g|webp|npz|pt)$", re.IGNORECASE)
_SOURCES = "give a folder of images, a `save_to_disk` folder, a .parquet file, a hub id or `digits`"

_ROLE_NAMES = {
    "image": frozenset("image images img picture photo jpg jpeg png webp".split()),
    "label": frozenset("label labels class class_id class_label target targets category".split()),
    "caption": frozenset("caption captions text texts prompt prompts description".split()),
}
_BAD_DATA = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What `datasets` and Arrow raise for damaged or hostile data."""
_ROLE_KINDS = {"image": ("image", "bytes"), "label": ("class", "integer"), "caption": ("text",)}
_KINDS_BY_NAME = frozenset(("integer", "text"))  # numbers and texts mean many things: only the name tells


def open_dataset(
    source: str | Path | datasets.Dataset,
    *,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
    id_column: str | None = None,
    first_id: int = 0,
    label_names: Sequence[str] | None = None,
) -> ExampleDataset:
    """The dataset at `source`, its columns found by type and name where they are not given.

    Ids are those of the `id_column`, or row numbers after `first_id`. Classes with names get the numbers of these in
    `label_names`, if it is given.

    `source` is "digits", a folder of images (sub-folders are labels, or splits if all of them are named so; with or
    without metadata.csv or .jsonl), a `save_to_disk` folder, a .parquet file, a hub id, or a `datasets.Dataset`.

    Raises:
        ArgumentError: no such split or column, a column of the wrong type, or several that could be meant.
        DataError: `source` cannot be read, holds no rows or no images, the ids are not unique integers, or a class is
            not in `label_names`.
    """
    with _quiet_datasets():
        splits, name, folder = _open_splits(source)
    if split not in splits:
        raise ArgumentError(f"`split` must be one of {', '.join(splits)}, got {split}.")
    rows = splits[split]
    if len(rows) == 0:
        raise DataError(f"`dataset` must hold at least one row, {name} has none; check the source and the split.")
    given = {"image": image_column, "label": label_column, "caption": caption_column, "id": id_column}
    columns = _find_columns(rows, given)
    return ExampleDataset(rows, columns, name, folder, first_id, label_names)


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Hide the progress bars of `datasets`, and leave them as they were."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    if shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _open_splits(source: str | Path | datasets.Dataset) -> tuple[dict[str, datasets.Dataset], str, Path | None]:
    """The splits at `source`, its printable name, and the folder if it is one of images."""
    import datasets

    if isinstance(source, datasets.Dataset):
        return _named_splits(source), "in-memory dataset", None
    if not isinstance(source, str | Path) or not str(source):
        got = "an empty text" if isinstance(source, str) else f"a {type(source).__name__}"
        raise ArgumentError(f"`dataset` must be a path, a name or a `datasets.Dataset`, got {got}; {_SOURCES}.")
    if source == "digits":
        return {"train": open_digits()}, "digits", None
    path = Path(source).absolute()
    name = printable(str(path if path.exists() else source))  # a relative path is of no use later
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return _named_splits(_load(datasets.load_from_disk, str(path), name=name)), name, None
        return _open_image_folder(path.resolve(), name), name, path.resolve()
    if path.is_file():
        return _open_parquet(path, name), name, None
    if not _HUB_ID.fullmatch(str(source)) or _FILE_SUFFIX.search(str(source)):
        raise DataError(f"`dataset` must exist, {name} does not; {_SOURCES}.")
    as_hub_id = f"{name} (no such path here, so taken as a hub id)"
    return _load(datasets.load_dataset, str(source), name=as_hub_id), name, None


def _named_splits(loaded: Any) -> dict[str, datasets.Dataset]:
    """The splits of a `DatasetDict`; a plain `Dataset` is its own split and, as the only one, "train"."""
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded, str(loaded.split or "train"): loaded}


def _load(load: Callable[..., Any], *arguments: Any, name: str, **keywords: Any) -> dict[str, datasets.Dataset]:
    import datasets

    try:
        loaded: dict[str, datasets.Dataset] = load(*arguments, **keywords)
    except datasets.exceptions.DatasetGenerationError as err:
        raise DataError(f"`dataset` cannot be read from {name}: {reason(err.__cause__ or err)}") from err
    except (*_BAD_DATA, datasets.exceptions.DatasetsError) as err:
        raise DataError(f"`dataset` cannot be read from {name}: {reason(err)}") from err
    return loaded


def _open_image_folder(folder: Path, name: str) -> dict[str, datasets.Dataset]:
    """The images of a folder; splits only if all its sub-folders are named so, never by the names of files."""
    import datasets

    suffixes = _ARCHIVES | {suffix for suffix, kind in Image.registered_extensions().items() if kind in RASTER_FORMATS}
    if not any(path.suffix.lower() in suffixes for path in folder.rglob("*")):
        raise DataError(f"`dataset` must hold images, the folder {name} has none; {_SOURCES}.")
    children = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
    has_metadata = any(folder.glob("metadata.*"))
    has_splits = bool(children) and _SPLIT_FOLDERS.issuperset(children) and not has_metadata
    root = glob.escape(str(folder))
    patterns = {split: f"{root}/{split}/**" for split in children} if has_splits else {"train": f"{root}/**"}
    splits = _load(datasets.load_dataset, "imagefolder", data_files=patterns, name=f"the folder {name}")
    if has_metadata:
        present, listed = _count_pictures(folder, suffixes - _ARCHIVES), sum(map(len, splits.values()))
        if unlisted := max(0, present - listed):
            _log.warning("%d of %d pictures in %s are in no row of its metadata: left out.", unlisted, present, name)
    return {split: _without_split_labels(rows) for split, rows in splits.items()}


def _count_pictures(folder: Path, suffixes: Set[str]) -> int:
    """Return how many pictures `datasets` finds in a folder: none that is hidden, or in such a folder or `__*`."""
    found = (path.relative_to(folder) for path in folder.rglob("[!.]*") if path.suffix.lower() in suffixes)
    return sum(not any(part.startswith((".", "__")) for part in path.parts[:-1]) for path in found)


def _without_split_labels(rows: datasets.Dataset) -> datasets.Dataset:
    """Undo the labels that `datasets` makes of the split folders themselves ("train", "test")."""
    import datasets

    label = rows.features.get("label")
    is_split = isinstance(label, datasets.ClassLabel) and _SPLIT_FOLDERS.issuperset(label.names)
    return rows.remove_columns("label") if is_split else rows


def _open_parquet(path: Path, name: str) -> dict[str, datasets.Dataset]:
    import datasets
    import pyarrow.parquet

    if path.suffix.lower() != ".parquet":
        raise DataError(f"`dataset` must be a .parquet file if it is a file, got {name}; {_SOURCES}.")
    _load(pyarrow.parquet.read_schema, path, name=name)  # `datasets` logs a damaged file before it raises
    return _load(datasets.load_dataset, "parquet", data_files=glob.escape(str(path)), name=name)


def open_digits() -> datasets.Dataset:
    """scikit-learn's 1797 handwritten digits, 8 x 8, as uncompressed PGM: the same bytes with every zlib."""
    import datasets

    try:
        from sklearn.datasets import load_digits
    except ImportError as err:
        raise DataError(
            "`dataset` digits needs scikit-learn, which is not installed; `pip install scikit-learn`."
        ) from err
    digits = load_digits()
    values = np.round(digits.images * 255 / 16).astype(np.uint8)
    cells = [{"bytes": b"P5 8 8 255\n" + value.tobytes(), "path": f"digit {row}"} for row, value in enumerate(values)]
    label = datasets.ClassLabel(names=[str(digit) for digit in range(10)])
    features = datasets.Features({"image": datasets.Image(decode=False), "label": label})
    return datasets.Dataset.from_dict({"image": cells, "label": digits.target.tolist()}, features=features)


def _find_columns(rows: datasets.Dataset, given: Mapping[str, str | None]) -> dict[str, str | None]:
    """The column of each role: the one that is given, else the only one of a fitting type and name."""
    kinds = {name: _kind(feature) for name, feature in rows.features.items()}
    for role, column in given.items():
        if column is not None and column not in kinds:
            raise ArgumentError(f"`{role}_column` must be one of {', '.join(kinds)}, got {column}.")
    columns = {role: _pick_column(role, given[role], kinds) for role in _ROLE_KINDS}
    if columns["image"] is None:
        found = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        way_out = "convert one with `dataset.cast_column(name, datasets.Image())`"
        raise DataError(f"`dataset` must have a column of images, the columns are {found}; {way_out}.")
    return columns | {"id": given["id"]}


def _pick_column(role: str, given: str | None, kinds: Mapping[str, str]) -> str | None:
    if given is not None:
        if kinds[given] not in _ROLE_KINDS[role]:
            rule = f"`{role}_column` must hold one of the types {', '.join(_ROLE_KINDS[role])}"
            way_out = "fill empty cells, or " if role == "label" and kinds[given].startswith("float") else ""
            raise ArgumentError(f"{rule}, column {given} is of type {kinds[given]}; {way_out}name another.")
        return given
    for kind in _ROLE_KINDS[role]:
        fitting = [name for name in kinds if kinds[name] == kind]
        named = [name for name in fitting if name.lower() in _ROLE_NAMES[role]]
        candidates = named if kind in _KINDS_BY_NAME or len(named) == 1 else fitting
        if len(candidates) > 1:
            rule = f"`{role}_column` must be given where several columns fit ({', '.join(candidates)})"
            raise ArgumentError(f"{rule}, got none; choose one, such as `--{role}-column {candidates[0]}`.")
        if candidates:
            return candidates[0]
    return None


def _kind(feature: Any) -> str:
    """What a column holds: image, bytes, class, integer or text (also lists of texts), else its type's own name."""
    import datasets

    if isinstance(feature, datasets.Image | datasets.ClassLabel):
        return "image" if isinstance(feature, datasets.Image) else "class"
    if isinstance(feature, dict):
        return "bytes" if "bytes" in feature and _kind(feature["bytes"]) == "bytes" else "struct"
    if isinstance(feature, datasets.List | datasets.LargeList):
        return "text" if _kind(feature.feature) == "text" else "list"
    kind = re.sub(r"^(large_)?(binary|string)(_view)?$", r"\2", str(feature.dtype))
    kind = re.sub(r"^u?int\d+$", "integer", kind)
    return {"binary": "bytes", "string": "text"}.get(kind, kind)
