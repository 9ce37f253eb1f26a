"""Changes to an index that is there: examples appended and removed, shards merged, features exported."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from carv_attrib.batches import check_columns
from carv_attrib.config import DataConfig, ExecutionConfig, FeaturizeConfig, check_choice
from carv_attrib.data import open_dataset
from carv_attrib.ensemble import member_folders
from carv_attrib.errors import ArgumentError, DataError, StoreError, StoreMismatchError
from carv_attrib.files import atomic_file
from carv_attrib.index import read_index_choice
from carv_attrib.manifest import describe_dataset, restore_estimator
from carv_attrib.memory import less_memory
from carv_attrib.pipeline import build_index, write_parts
from carv_attrib.store import FeatureStore
from carv_attrib.teacher import Teacher
from carv_attrib.teachers import load_teacher

if TYPE_CHECKING:
    import datasets

_log = logging.getLogger(__name__)
ExportFormat = Literal["npy", "parquet", "trak"]
APPEND_SETTINGS = tuple(field.name for kind in (DataConfig, ExecutionConfig) for field in fields(kind))
"""Settings of `featurize` that an append has of its own; all others are those of the index."""


def append(
    path: str | Path,
    dataset: str | Path | datasets.Dataset,
    *,
    teacher: Teacher | str | Path | None = None,
    **settings: Any,
) -> FeatureStore:
    """Add the examples of another data set to an index, and build it again; goes on where an earlier run was stopped.

    Everything that decides a feature is as the index has it. Examples without an id column are numbered on from the
    last one of the index. A data set that the index has already is not added again, so that a run can be repeated.

    Args:
        path: of the index.
        dataset: of the new examples, as for `featurize`.
        teacher: loaded, or where it lies now; by default, where it was when the index was made.
        **settings: of `APPEND_SETTINGS`: where examples are in the data set, and how it is run.

    Raises:
        ArgumentError: for a setting that is the index's own.
        DataError: if the data set cannot be read, lacks what the teacher needs, has a class that the index does not
            have by name, or ids that it has already.
        StoreMismatchError: for another teacher, or if another append was begun and not finished.
    """
    if unknown := sorted(set(settings) - set(APPEND_SETTINGS)):
        raise ArgumentError(f"`{unknown[0]}` is decided by the index; {', '.join(APPEND_SETTINGS)} can be given.")
    store = FeatureStore.open(path)
    config = FeaturizeConfig.from_flat({**store.manifest["config"], **settings})
    if teacher is None or isinstance(teacher, str | Path):
        source = teacher or store.manifest["teacher"]["source"]
        teacher = load_teacher(source, device=config.execution.device, dtype=config.storage.dtype)
    with store.writing(), less_memory(teacher.denoiser, **config.execution.memory_savers):
        estimator = restore_estimator(teacher, store.manifest)
        data = {name: getattr(config.data, name) for name in DataConfig.__dataclass_fields__}
        opened = {**data, "label_names": store.manifest["dataset"]["label_names"]}
        begun = store.segments[-1].dataset if len(store.segments) > 1 and not store.is_complete else None
        if begun is None and not store.is_complete:
            raise StoreError(f"{path} is not complete; run featurize to the end before anything is appended.")
        first_id = begun["first_id"] if begun else 1 + max(_all_ids(store), default=-1)
        examples = open_dataset(dataset, first_id=first_id, **opened)
        check_columns(teacher, examples)
        entry = describe_dataset(examples) | {"first_id": first_id, "data": data}
        if begun and begun["fingerprint"] != entry["fingerprint"]:
            raise StoreMismatchError(
                f"{path} has an unfinished append of {begun['source']}; run that again first, with the same data set."
            )
        if not begun and not _holds(store, dataset, opened, len(examples)):
            _check_new(store, examples.ids)
            store.change_manifest(appended=[*store.manifest.get("appended", ()), entry])
        write_parts(store, estimator, examples, config.execution, store.segments[-1])
        build_index(FeatureStore.open(path), **read_index_choice(store))
    return FeatureStore.open(path)


def remove(path: str | Path, *, ids: Iterable[int] = (), keys: Iterable[str] = ()) -> int:
    """Take examples out of an index, and build it again: features, records, pictures, kernel, search index, references.

    They do not come back when `featurize` is run again. Only their ids stay, in the manifest. Of an index of several
    teachers they are taken out of each. A removal that was stopped is finished by the same call.

    Args:
        path: of the index.
        ids: of examples.
        keys: names of examples.

    Returns:
        How many examples were removed, now or, if they are named by id, before.

    Raises:
        ArgumentError: if the index does not have one of them, a key names several, or no example would be left; nothing
            is removed then.
    """
    ids, keys = list(ids), list(keys)
    if not ids and not keys:
        raise ArgumentError("`ids` or `keys` must name at least one example; `carv-attrib query` shows both.")
    stores = [FeatureStore.open(folder) for folder in member_folders(path)]
    with ExitStack() as held:
        for store in stores:
            held.enter_context(store.writing())
        found = _find(stores, set(ids), set(keys))
        for store in stores:
            store.remove(found)
            build_index(FeatureStore.open(store.path), **read_index_choice(store))
    return len(found)


def merge(output: str | Path, shards: Sequence[str | Path]) -> FeatureStore:
    """Put the parts of shards, made with `--shard`, together in a new index, and build it.

    Parts are copied and checked; the shards are left as they are. A merge that was stopped goes on. What was removed
    from one shard is in no part of the new index.

    Args:
        output: a new folder, or the one that an earlier merge was stopped in.
        shards: folders of featurize runs with the same settings, teacher and data set.

    Raises:
        StoreMismatchError: if shards were made differently; fields that differ are named.
        StoreError: if a part is in none of them, or examples were appended to one.
        StoreCorruptError: if a file is damaged.
    """
    stores = [FeatureStore.open(shard) for shard in shards]
    if not stores:
        raise ArgumentError("`shards` must name at least one folder.")
    identity = _identity(stores[0].manifest)
    for store in stores:
        store.check_matches(identity)
        if len(store.segments) > 1:
            raise StoreError(f"{store.path} has had examples appended, which a merge would lose; merge first.")
    removed = set().union(*(store.removed for store in stores))
    owners = {part: store for store in reversed(stores) for part in store.parts}
    if lost := [part for part in range(stores[0].num_parts) if part not in owners]:
        raise StoreError(
            f"{len(lost)} of {stores[0].num_parts} parts are in none of the {len(stores)} shards, the first is part "
            f"{lost[0]}; run that shard to the end, or name it too."
        )
    if (Path(output) / "manifest.json").is_file():
        merged = FeatureStore.open(output)
        merged.check_matches(identity)
    else:
        merged = FeatureStore.create(output, stores[0].manifest)
    with merged.writing():
        merged.remove(removed)  # known before a part is there, should this be stopped
        for part in merged.missing_parts():
            owner = owners[part]
            owner.read_part(part)  # a damaged one is not spread
            for source, target in (
                (owner.examples_path(part), merged.examples_path(part)),
                (owner.features_path(part), merged.features_path(part)),
            ):
                with atomic_file(target) as temporary:
                    shutil.copyfile(source, temporary)
        merged.remove(removed)  # from the new parts too
        merged = FeatureStore.open(output)
        build_index(merged)
    return merged


def export(path: str | Path, output: str | Path, format: ExportFormat) -> list[Path]:
    """Write the features of an index for other programs; return the files.

    `npy`: `features.npy` (examples, bands * d) in float32, bands one after the other, means over halves, and `ids.npy`.
    `parquet`: `features.parquet` with the columns id, key, label, caption and features (a list of as many numbers).
    `trak`: a folder as `trak.TRAKer` writes it after `featurize`, with the means over bands (examples, d) as projected
    gradients of model 0; a TRAKer with that `save_dir` and `proj_dim`, a normal projection and
    `use_half_precision=False` goes on with `finalize_features`.

    Raises:
        ArgumentError: for another format.
        StoreError: if the folder cannot be written.
    """
    check_choice("format", format, ExportFormat)
    store, folder = FeatureStore.open(path), Path(output)
    if folder.exists() and any(folder.iterdir()):
        raise StoreError(f"`output` {folder} exists; name a new or an empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return {"npy": _export_npy, "parquet": _export_parquet, "trak": _export_trak}[format](store, folder)


def _export_npy(store: FeatureStore, folder: Path) -> list[Path]:
    bands, _, dims = store.feature_shape
    files = [folder / "features.npy", folder / "ids.npy"]
    features = np.lib.format.open_memmap(files[0], "w+", np.float32, (len(store.ids), bands * dims))
    start = 0
    for part in store.read_parts():
        values = part.features.mean(2).flatten(1).numpy()
        features[start : start + len(values)] = values
        start += len(values)
    features.flush()
    np.save(files[1], store.ids)
    return files


def _export_parquet(store: FeatureStore, folder: Path) -> list[Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    bands, _, dims = store.feature_shape
    schema = pa.schema(
        {
            "id": pa.int64(),
            "key": pa.string(),
            "label": pa.int64(),
            "caption": pa.string(),
            "features": pa.list_(pa.float32(), bands * dims),
        }
    )
    file = folder / "features.parquet"
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for part, content in zip(store.parts, store.read_parts(), strict=True):
            records = {record.id: record for record in store.read_records(part)}
            rows = [records[i] for i in content.ids.tolist()]
            features = pa.FixedSizeListArray.from_arrays(content.features.mean(2).flatten().numpy(), bands * dims)
            columns = [[getattr(row, name) for row in rows] for name in ("id", "key", "label", "caption")]
            writer.write_table(pa.Table.from_arrays([*map(pa.array, columns), features], schema=schema))
    return [file]


def _export_trak(store: FeatureStore, folder: Path) -> list[Path]:
    from trak.projectors import ProjectionType
    from trak.savers import MmapSaver

    size, dims = len(store.ids), store.feature_shape[2]
    # what a TRAKer on a CPU compares
    metadata = {"JL dimension": dims, "JL matrix type": ProjectionType.normal, "train set size": size}
    saver = MmapSaver(folder, metadata, size, dims, True, logging.WARNING, use_half_precision=False)
    saver.register_model_id(0, False)
    start = 0
    for part in store.read_parts():
        values = part.features.mean((1, 2)).numpy()
        saver.current_store["grads"][start : start + len(values)] = values
        start += len(values)
    for name in ("out_to_loss", "is_featurized"):
        saver.current_store[name][:] = 1
    for array in saver.current_store.values():
        array.flush()
    saver.serialize_current_model_id_metadata()
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _all_ids(store: FeatureStore) -> set[int]:
    """Return the ids of all examples that are or were in a store, skipped ones among them."""
    return {record.id for part in store.parts for record in store.read_records(part)} | store.removed


def _holds(store: FeatureStore, dataset: Any, opened: Mapping[str, Any], num_examples: int) -> bool:
    """Return whether a store has a data set already, whose examples got their ids then."""
    for known in (segment.dataset for segment in store.segments):
        if known["num_examples"] == num_examples:
            examples = open_dataset(dataset, first_id=known.get("first_id", 0), **opened)
            if examples.fingerprint == known["fingerprint"]:
                _log.warning("%s has the examples of %s already; nothing is added.", store.path, examples.source)
                return True
    return False


def _check_new(store: FeatureStore, ids: np.ndarray) -> None:
    """Check that examples are not in a store yet."""
    if shared := _all_ids(store) & set(ids.tolist()):
        raise DataError(
            f"{store.path} has, or had, an example {min(shared)} already; give the new ones ids of their own, or leave "
            "`id_column` out."
        )


def _find(stores: Sequence[FeatureStore], ids: set[int], keys: set[str]) -> set[int]:
    """Return the ids of the examples with these ids and keys, where one of the stores has or had them.

    A removal that was stopped has taken them out of some.
    """
    found = ids & frozenset().union(*(store.removed for store in stores))
    named: dict[str, set[int]] = {}
    for store in stores:
        for record in (record for part in store.parts for record in store.read_records(part)):
            if record.id in ids:
                found.add(record.id)
            if record.key in keys:
                named.setdefault(record.key, set()).add(record.id)
    for name, own in sorted(named.items()):
        if len(own) > 1:
            raise ArgumentError(
                f"`keys` {name} is the name of {len(own)} examples, {', '.join(map(str, sorted(own)[:5]))}; give their "
                "`ids`. Nothing was removed."
            )
    if lost := [*sorted(ids - found), *sorted(keys - named.keys())]:
        raise ArgumentError(f"{stores[0].path} has no example {lost[0]}; nothing was removed.")
    found = found.union(*named.values())
    if any(found >= set(store.ids.tolist()) for store in stores):
        raise ArgumentError(f"{stores[0].path} would have no example left; delete the folder instead.")
    return found


def _identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what shards must have in common: all but where things lie, versions, and rows of a network call."""
    names = ("config", "pilot", "layers", "proj_dim", "num_replicates", "draws_per_example", "draws_sha256")
    return {name: manifest[name] for name in names} | {
        "teacher": {"fingerprint": manifest["teacher"]["fingerprint"]},
        "dataset": {name: manifest["dataset"][name] for name in ("fingerprint", "num_examples")},
    }
