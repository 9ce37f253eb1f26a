"""A features file, as of one part: safetensors, with a checksum of all and of every row (`docs/store-format.md`)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from carv_attrib.errors import StoreCorruptError
from carv_attrib.files import atomic_file

_LATER_TENSORS = ("row_crc32", "examples_sha256")  # which parts of earlier versions do not have
_NO_CHECKSUM = -1  # of the rows of parts of earlier versions


@dataclass(frozen=True)
class PartFeatures:
    """Features of the examples of one part, in row order.

    Attributes:
        ids: example ids.
        features: means over the draws of each half of each band.
    """

    ids: Int64[Tensor, " examples"]
    features: Float[Tensor, "examples bands replicates proj_dim"]

    def packed(self, *, float16: bool) -> dict[str, Tensor]:
        """Return the tensors of a features file but for its checksums: float16 over a scale for each vector, or all."""
        values, scale = _to_float16(self.features) if float16 else (self.features, torch.ones(()))
        return {"ids": self.ids, "features": values, "features_scale": scale}

    @staticmethod
    def unpacked(tensors: Mapping[str, Tensor]) -> PartFeatures:
        """Return what such tensors hold, in float32."""
        return PartFeatures(tensors["ids"], tensors["features"].float() * tensors["features_scale"])


def concatenate(pieces: Sequence[PartFeatures]) -> PartFeatures | None:
    """Return the features of several batches as one; None where there are none, every example being skipped."""
    if not pieces:
        return None
    return PartFeatures(*(torch.cat([getattr(piece, name) for piece in pieces]) for name in ("ids", "features")))


@contextmanager
def open_features(path: Path, feature_shape: Sequence[int]) -> Iterator[Any]:
    """Open a features file (memory-mapped) after a check of its tensors.

    Args:
        path: of the file.
        feature_shape: bands, replicates and dimensions that the manifest says.

    Raises:
        StoreCorruptError: if it cannot be read, or a tensor is missing or of another dtype or shape.
    """
    try:
        with safe_open(path, framework="pt") as file:
            _check_tensors(path, file, feature_shape)
            yield file
    except (OSError, SafetensorError) as err:
        raise StoreCorruptError(f"{path} is damaged: {err}; delete it and featurize again.") from err


def features_checksum(file: Any) -> str | None:
    """Return the checksum that an open features file has in its header."""
    return (file.metadata() or {}).get("sha256")


def read_tensors(path: Path, feature_shape: Sequence[int]) -> dict[str, Tensor]:
    """Return ids, features and scales of a features file, after a check of its checksum.

    Raises:
        StoreCorruptError: if it is damaged.
    """
    with open_features(path, feature_shape) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        if tensor_digest(tensors) != features_checksum(file):
            raise StoreCorruptError(
                f"{path} is damaged: its checksum does not match{_damaged_rows(tensors)}; delete it, featurize again."
            )
    return {name: tensors[name] for name in ("ids", "features", "features_scale")}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], examples_sha256: str | None = None) -> None:
    """Write a features file, whole or not at all.

    Args:
        path: of the file.
        tensors: ids, features and scales.
        examples_sha256: hex digest of the file of the records, if there is one.

    Raises:
        OSError, SafetensorError: if it cannot be written.
    """
    own = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}  # unshared
    own["row_crc32"] = _checksums_of_rows(own)
    if examples_sha256 is not None:
        own["examples_sha256"] = torch.frombuffer(bytearray.fromhex(examples_sha256), dtype=torch.uint8)
    with atomic_file(path) as temporary:
        save_file(own, temporary, metadata={"sha256": tensor_digest(own)})


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the hex SHA-256 of the names and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().tobytes())  # numpy has no bfloat16
    return digest.hexdigest()


class PartRows:
    """Reads rows of a features file.

    Features are read, not mapped: a row of a mapped file brings 64 kB and more of it into memory, and keeps it there.
    """

    def __init__(self, path: Path, file: Any, ids: Int64[np.ndarray, " examples"]) -> None:
        features = file.get_slice("features")
        self._path, self._ids = path, ids
        self._inode = path.stat().st_ino
        self._shape = features.get_shape()[1:]
        self._dtype = {"F16": np.float16, "F32": np.float32}[features.get_dtype()]
        self._offset = _data_offset(path, "features")
        # copies, since a tensor of safetensors keeps the file mapped
        self._scale = _scale_of_rows(file.get_tensor("features_scale").clone(), features.get_shape()).numpy()
        has_checksums = "row_crc32" in file.keys()
        self._row_crc32 = (
            file.get_tensor("row_crc32").clone().numpy() if has_checksums else np.full(len(ids), _NO_CHECKSUM)
        )

    def was_replaced(self) -> bool:
        """Return whether another file is there now."""
        return self._path.exists() and self._path.stat().st_ino != self._inode

    def read(self, rows: Int64[np.ndarray, " rows"]) -> Float32[np.ndarray, "rows bands replicates proj_dim"]:
        """Return the features of rows, after a check of their checksums.

        Raises:
            StoreCorruptError: if the file is gone or damaged.
        """
        values = np.empty((len(rows), *self._shape), self._dtype)
        size = values[:1].nbytes
        try:
            with self._path.open("rb", buffering=0) as file:
                lengths = [
                    os.preadv(file.fileno(), [own], self._offset + row * size)
                    for row, own in zip(rows.tolist(), values, strict=True)
                ]
        except OSError as err:
            raise StoreCorruptError(f"{self._path} cannot be read: {err}; if it is gone, featurize again.") from err
        if min(lengths) < size:
            raise StoreCorruptError(f"{self._path} is damaged: it is too short; delete it, featurize again.")
        scale, expected = self._scale[rows], self._row_crc32[rows]
        if ((expected != _NO_CHECKSUM) & (expected != _row_checksums(self._ids[rows], values, scale))).any():
            raise StoreCorruptError(
                f"{self._path} is damaged: the checksum of an example does not match; delete it, featurize again."
            )
        features: Float32[np.ndarray, "rows bands replicates proj_dim"] = values.astype(np.float32) * scale
        return features


def _check_tensors(path: Path, file: Any, feature_shape: Sequence[int]) -> None:
    """Refuse a features file whose tensors are not those of docs/store-format.md.

    Raises:
        StoreCorruptError: for one that is missing, or of another dtype or shape.
    """
    slices = {name: file.get_slice(name) for name in file.keys()}
    found = {name: (own.get_dtype(), own.get_shape()) for name, own in slices.items()}
    examples = found.get("ids", ("", [0]))[1]
    features, scales = [*examples, *feature_shape], [*examples, *feature_shape[:-1], 1]
    allowed = {
        "ids": [("I64", examples[:1])],
        "features": [("F16", features), ("F32", features)],
        "features_scale": [("F32", scales), ("F32", [])],
        "row_crc32": [("I64", examples)],
        "examples_sha256": [("U8", [32])],
    }
    for name, kinds in allowed.items():
        if name not in found and name not in _LATER_TENSORS:
            raise StoreCorruptError(f"{path} has no {name}; delete it and featurize again.")
        if name in found and found[name] not in kinds:
            wanted = " or ".join(f"{dtype} {shape}" for dtype, shape in kinds)
            raise StoreCorruptError(
                f"{path} must have {name} of {wanted} by the manifest, has {found[name][0]} {found[name][1]}; "
                "delete it and featurize again."
            )


def _data_offset(path: Path, name: str) -> int:
    """Return how many bytes of a safetensors file, which can be opened, lie before a tensor."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length + int(json.loads(file.read(length))[name]["data_offsets"][0])


def _to_float16(values: Float[Tensor, "*shape dim"]) -> tuple[Tensor, Float[Tensor, "*shape one"]]:
    """Return values over the largest magnitude of each vector, in float16, and that magnitude in float32."""
    scale = values.abs().amax(-1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    return (values / scale).half(), scale.float()


def _row_checksums(
    ids: Int64[np.ndarray, " rows"], values: Float[np.ndarray, "rows *shape"], scale: Float[np.ndarray, "rows *scales"]
) -> Int64[np.ndarray, " rows"]:
    """Return the CRC-32 of the bytes of each id, of its values, and of their scales."""
    rows = zip(ids, values, scale, strict=True)
    return np.fromiter((crc32(factor, crc32(row, crc32(i))) for i, row, factor in rows), np.int64, len(ids))


def _checksums_of_rows(tensors: Mapping[str, Tensor]) -> Int64[Tensor, " rows"]:
    """Return the checksums of the rows of a part."""
    ids, values = tensors["ids"], tensors["features"]
    scale = _scale_of_rows(tensors["features_scale"], values.shape)
    return torch.from_numpy(_row_checksums(ids.numpy(), values.numpy(), scale.numpy()))


def _scale_of_rows(scale: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the scales of features of some shape; one for all is one for each row."""
    return scale if scale.dim() else scale.expand(shape[0], *[1] * (len(shape) - 1))


def _damaged_rows(tensors: Mapping[str, Tensor]) -> str:
    """Return which rows of a part do not have their checksums, as words; none, where they have no checksums."""
    if "row_crc32" not in tensors:
        return ""
    damaged = (_checksums_of_rows(tensors) != tensors["row_crc32"]).nonzero().flatten().tolist()
    return f", in rows {damaged[0]} to {damaged[-1]}" if damaged else ""
