"""Arrays from an npz file, with the axes that are expected of them."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from carv_attrib.errors import DataError

_READ_ERRORS = (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


def read_arrays(path: str | Path, argument: str, axes: Mapping[str, tuple[str, ...]]) -> dict[str, np.ndarray]:
    """Return all arrays in an npz file, never a pickle.

    Args:
        path: of the file.
        argument: what errors call it.
        axes: names of the first axes of each array that must be there; those of one name have one length.

    Raises:
        DataError: if the file cannot be read, or lacks something.
    """
    if Path(path).is_file() and not zipfile.is_zipfile(path):
        raise DataError(f"`{argument}` {path} must be an .npz file; see docs/evaluation.md.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except _READ_ERRORS as err:
        raise DataError(f"`{argument}` {path} cannot be read: {' '.join(str(err).split())}.") from err
    if lost := [name for name in axes if name not in arrays]:
        raise DataError(
            f"`{argument}` {path} has no array {', '.join(lost)}, but {', '.join(arrays) or 'none'}; "
            "see docs/evaluation.md, and whether it is the file that you mean."
        )
    lengths: dict[str, tuple[int, str]] = {}
    for name, own_axes in axes.items():
        shape = arrays[name].shape
        sizes = dict(zip(own_axes, shape, strict=False))
        if len(sizes) < len(own_axes):
            raise DataError(
                f"`{argument}` {path} must have an array {name} ({', '.join(own_axes)}), its shape is {shape}; see "
                "docs/evaluation.md."
            )
        for axis, size in sizes.items():
            known, other = lengths.setdefault(axis, (size, name))
            if size != known:
                raise DataError(
                    f"`{argument}` {path} has {axis} (={known}) in {other}, but (={size}) in {name}; one of them lacks "
                    "some, or has others."
                )
    return arrays
