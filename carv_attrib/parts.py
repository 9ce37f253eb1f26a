"""A features file, as of one part: safetensors, with a checksum of all and of every row (`docs/store-format.md`)."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, Num
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from carv_attrib.config import FeatureDtype
from carv_attrib.errors import StoreCorruptError
from carv_attrib.files import atomic_file

GROUP = 64
"""Numbers of a vector in int8 that share a scale."""
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

    def packed(self, dtype: FeatureDtype) -> dict[str, Tensor]:
        """Return the tensors of a features file but for its checksums: in few bits over a scale of each vector, or all.

        In float16 the largest magnitude of a vector is 1; in int8 that of `GROUP` numbers is 127.
        """
        values, scale = self.features, torch.ones(())
        if dtype == "float16":
            scale = _largest(values)
            values = (values / scale).half()
        elif dtype == "int8":
            num_dims = values.shape[-1]
            padded = torch.nn.functional.pad(values, (0, -num_dims % GROUP))
            scale = _largest(padded.view(*values.shape[:-1], -(-num_dims // GROUP), GROUP)).squeeze(-1) / 127
            values = (values / torch.from_numpy(_spread(scale.numpy(), num_dims))).round().to(torch.int8)
        return {"ids": self.ids, "features": values, "features_scale": scale}

    @staticmethod
    def unpacked(tensors: Mapping[str, Tensor]) -> PartFeatures:
        """Return what such tensors hold, in float32."""
        values, scale = tensors["features"].float(), tensors["features_scale"].numpy()
        return PartFeatures(tensors["ids"], values * torch.from_numpy(_spread(scale, values.shape[-1])))


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


@dataclass(frozen=True)
class _Rows:
    """The rows of a tensor in a file.

    Attributes:
        offset: of the first, in bytes.
        stride: from one to the next, in bytes; 0 where all are one.
        shape: of a row.
        dtype: of its numbers.
    """

    offset: int
    stride: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def read(self, file: int, rows: Int64[np.ndarray, " rows"]) -> np.ndarray:
        """Return some of them, of an open file.

        Raises:
            EOFError: if it is too short.
        """
        values = np.empty((len(rows), *self.shape), self.dtype)
        for row, own in zip(rows.tolist(), values, strict=True):
            if os.preadv(file, [own], self.offset + row * self.stride) < own.nbytes:
                raise EOFError("it is too short")
        return values


class PartRows:
    """Reads rows of a features file.

    Features are read, not mapped: a row of a mapped file brings 64 kB and more of it into memory, and keeps it there.
    """

    def __init__(self, path: Path, file: Any, ids: Int64[np.ndarray, " examples"]) -> None:
        self._path, self._ids = path, ids
        self._inode = path.stat().st_ino
        self._features, self._scale = (_rows(path, file, name) for name in ("features", "features_scale"))
        has_checksums = "row_crc32" in file.keys()
        # a copy, since a tensor of safetensors keeps the file mapped
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
        try:
            with self._path.open("rb", buffering=0) as file:
                values, scale = (own.read(file.fileno(), rows) for own in (self._features, self._scale))
        except OSError as err:
            raise StoreCorruptError(f"{self._path} cannot be read: {err}; if it is gone, featurize again.") from err
        except EOFError as err:
            raise StoreCorruptError(f"{self._path} is damaged: {err}; delete it, featurize again.") from err
        expected = self._row_crc32[rows]
        if ((expected != _NO_CHECKSUM) & (expected != _row_checksums(self._ids[rows], values, scale))).any():
            raise StoreCorruptError(
                f"{self._path} is damaged: the checksum of an example does not match; delete it, featurize again."
            )
        features: Float32[np.ndarray, "rows bands replicates proj_dim"] = values.astype(np.float32) * _spread(
            scale, self._features.shape[-1]
        )
        return features


def _rows(path: Path, file: Any, name: str) -> _Rows:
    """Return where the rows of a tensor of an open features file are; a number stands for all."""
    content = file.get_slice(name)
    shape = content.get_shape()
    dtype = np.dtype({"I8": "int8", "F16": "float16", "F32": "float32"}[content.get_dtype()])
    size = math.prod(shape[1:]) * dtype.itemsize if shape else 0
    return _Rows(_data_offset(path, name), size, tuple(shape[1:]) if shape else (1, 1, 1), dtype)


def _check_tensors(path: Path, file: Any, feature_shape: Sequence[int]) -> None:
    """Refuse a features file whose tensors are not those of docs/store-format.md.

    Raises:
        StoreCorruptError: for one that is missing, or of another dtype or shape.
    """
    slices = {name: file.get_slice(name) for name in file.keys()}
    found = {name: (own.get_dtype(), own.get_shape()) for name, own in slices.items()}
    examples = found.get("ids", ("", [0]))[1]
    features, scales, groups = (
        [*examples, *feature_shape[:-1], d] for d in (feature_shape[-1], 1, -(-feature_shape[-1] // GROUP))
    )
    allowed = {
        "ids": [("I64", examples[:1])],
        "features": [("I8", features), ("F16", features), ("F32", features)],
        "features_scale": [("F32", scales), ("F32", groups), ("F32", [])],
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


def _largest(values: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape one"]:
    """Return the largest magnitude of each vector in float32; one of a vector of zeros."""
    largest = values.abs().amax(-1, keepdim=True).float()
    return torch.where(largest == 0, 1.0, largest)  # NaN stays NaN


def _spread(scale: Float32[np.ndarray, "..."], num_dims: int) -> Float32[np.ndarray, "..."]:
    """Return the scale of each number of vectors, from those of groups of numbers or of all."""
    if scale.ndim == 0 or scale.shape[-1] == 1:
        return scale
    spread: np.ndarray = np.repeat(scale, GROUP, axis=-1)[..., :num_dims]
    return spread


def _row_checksums(
    ids: Int64[np.ndarray, " rows"], values: Num[np.ndarray, "rows *shape"], scale: Float[np.ndarray, "rows *scales"]
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
