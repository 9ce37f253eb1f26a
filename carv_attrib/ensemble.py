"""One index for several teachers, such as checkpoints of one run: an index of each, whose scores are averaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carv_attrib.errors import ArgumentError, StoreCorruptError, StoreError, StoreMismatchError
from carv_attrib.files import atomic_file
from carv_attrib.pipeline import featurize
from carv_attrib.planning.costs import parse_budget
from carv_attrib.store import ENSEMBLE_FILE, FeatureStore
from carv_attrib.teacher import Teacher

if TYPE_CHECKING:
    import datasets


def featurize_ensemble(
    teachers: Sequence[Teacher | str | Path],
    dataset: str | Path | datasets.Dataset,
    output: str | Path,
    **settings: Any,
) -> list[FeatureStore]:
    """Compute the features of every example for each of several teachers; goes on where an earlier run was stopped.

    Latents are encoded once for all teachers with the same encoder. They are kept in the folder until all is done, or
    longer in the `latent_cache` of the settings.

    Args:
        teachers: two at least; loaded, folders or hub ids.
        dataset: as for `featurize`.
        output: folder that gets an index for each teacher, `checkpoint-0` and so on.
        **settings: as for `featurize`, the same for all. A plan is made for the first teacher, with its share of the
            budget, and the others have its settings.

    Raises:
        ArgumentError: for fewer than two teachers.
        StoreMismatchError: if `output` was begun with another number of teachers.
        StoreError: if `output` cannot be written, or holds something else.
    """
    folders = create_ensemble(Path(output), len(teachers))
    own_cache = Path(output) / "latents"
    settings = {"latent_cache": str(own_cache), **settings}
    aims = {name: settings.pop(name) for name in ("plan", "budget", "target_snr") if name in settings}
    if aims.get("budget") is not None:
        aims["budget"] = parse_budget(aims["budget"]) / len(teachers)
    stores = [featurize(teachers[0], dataset, folders[0], **aims, **settings)]
    planned = stores[0].manifest["plan"]["settings"] if aims.get("plan") else {}
    for teacher, folder in zip(teachers[1:], folders[1:], strict=True):
        stores.append(featurize(teacher, dataset, folder, **{**planned, **settings}))
    shutil.rmtree(own_cache, ignore_errors=True)
    return stores


def create_ensemble(path: Path, num_members: int) -> list[Path]:
    """Return the folders of the members of a new ensemble, or of one that was begun with as many.

    Raises:
        ArgumentError: for fewer than two.
        StoreMismatchError: if it was begun with more or fewer.
        StoreError: if the folder cannot be written, or holds something else.
    """
    if num_members < 2:
        raise ArgumentError(f"`teachers` must be two at least, got {num_members}; use `featurize` for one.")
    file = path / ENSEMBLE_FILE
    if file.is_file():
        folders = member_folders(path)
        if len(folders) != num_members:
            raise StoreMismatchError(
                f"{path} was begun with {len(folders)} teachers, not with {num_members}; give those, or another folder."
            )
        return folders
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise StoreError(f"`output` {path} exists and is not an index of several teachers; name a new folder.")
    names = [f"checkpoint-{number}" for number in range(num_members)]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as temporary:
            temporary.write_text(json.dumps({"format": "carv-attrib ensemble", "members": names}, indent=1) + "\n")
    except OSError as err:
        raise StoreError(f"`output` {path} cannot be written: {err.strerror}; choose another folder.") from err
    return [path / name for name in names]


def member_folders(path: str | Path) -> list[Path]:
    """Return the folders of the indexes that an index consists of: itself, or one for each teacher.

    Raises:
        StoreCorruptError: if the list of them is damaged.
    """
    path = Path(path)
    file = path / ENSEMBLE_FILE
    if not file.is_file():
        return [path]
    try:
        names = json.loads(file.read_text())["members"]
        folders = [path / name for name in names]
        if not all(folder.parent == path and folder.name not in ("", "..") for folder in folders):
            raise ValueError("a member lies elsewhere")
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise StoreCorruptError(f"{file} is damaged: {err}; featurize again, with the same teachers.") from err
    return folders
