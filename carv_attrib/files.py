"""Files that appear whole or not at all, and their checksums."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write to; it gets the real name, on disk for certain, if all went well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.chmod(path.parent.stat().st_mode & 0o664)  # as readable as the folder, whoever wrote the file
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def unfinished_files(folder: Path) -> list[Path]:
    """Return the temporary files that killed writers left below a folder: those of `atomic_file` and of safetensors."""
    return [file for pattern in (".*.tmp", ".tmp??????") for file in folder.rglob(pattern)]


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with a checksum, whole or not at all."""
    with atomic_file(path) as temporary:
        sealed = {**content, "checksum": _seal(content)}
        temporary.write_text(json.dumps(sealed, indent=1, sort_keys=True) + "\n")


def read_sealed(path: Path) -> dict[str, Any]:
    """Return the JSON object that `write_sealed` wrote, or one of an earlier version, which has no checksum.

    Raises:
        ValueError: if it is no JSON, or the checksum does not match.
        TypeError: if it is no object.
    """
    content = dict(json.loads(path.read_text()))
    checksum = content.pop("checksum", None)
    if checksum not in (None, _seal(content)):
        raise ValueError("its checksum does not match: it was edited, or is damaged")
    return content


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
