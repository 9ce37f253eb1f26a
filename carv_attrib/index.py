"""The FAISS index of whitened features: the only module that imports faiss.

An example is stored as `(Lambda + lambda_0 I)^{-1/2} U^T g_ib / sqrt(B)`, its bands one after the other, so that the
inner product with a query treated alike is the score of eq. (9). Another lambda, or none, changes the query's vector
only; a cosine needs an index of its own, of vectors of length one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from carv_attrib.errors import StoreCorruptError, StoreError
from carv_attrib.kernel import Damping, Kernel, KernelKind, ScoreKind
from carv_attrib.store import FeatureStore, atomic_file, file_digest

FILES = ("kernel.safetensors", "index.faiss")
"""Files that belong to an index, besides `index.json`, which is written last and has their sizes and checksums."""


@dataclass(frozen=True)
class IndexSettings:
    """What an index was built for.

    Attributes:
        score: the score whose inner products it holds.
        kernel: the kernel's kind.
        damping: lambda_0, relative to the mean eigenvalue; or auto.
        features_sha256: of the checksums of all parts, in the order of the store.
    """

    score: ScoreKind
    kernel: KernelKind
    damping: Damping
    features_sha256: str

    def serves(self, score: ScoreKind, kernel: KernelKind, damping: Damping) -> bool:
        """Return whether an index built so can be searched for this score."""
        if "cosine" in (self.score + score):
            return (self.score, self.kernel, self.damping) == (score, kernel, damping)
        return self.kernel == kernel


class FeatureIndex:
    """Whitened features in a FAISS inner-product index; positions are those of `FeatureStore.ids`."""

    def __init__(self, settings: IndexSettings, kernel: Kernel, faiss_index: Any) -> None:
        self.settings = settings
        self._kernel = kernel
        self._faiss = faiss_index
        self._sqrt_inverse = kernel.inverse(settings.score, settings.damping).sqrt()

    @staticmethod
    def build(store: FeatureStore, kernel: Kernel, *, score: ScoreKind, damping: Damping) -> FeatureIndex:
        """Return the index of all features of a store for one score.

        Raises:
            ArgumentError: for damping that is not positive.
        """
        import faiss

        settings = IndexSettings(score, kernel.kind, damping, store.digest())
        bands = store.manifest["config"]["num_bands"] if kernel.kind == "bands" else 1
        index = FeatureIndex(settings, kernel, faiss.IndexFlatIP(bands * len(kernel.eigenvalues)))
        for part in store.parts:
            index._faiss.add(index._whiten(kernel.banded(store.read_part(part).features.mean(2, keepdim=True))))
        return index

    def search(
        self,
        query: Float64[Tensor, "queries bands replicates d"],
        *,
        score: ScoreKind,
        damping: Damping,
        top_k: int,
    ) -> Int64[np.ndarray, "queries top_k"]:
        """Return the positions of the examples with the largest scores, largest first.

        Args:
            query: features in the kernel's eigenbasis; negated for the smallest scores.
            score: one that `settings.serves`.
            damping: lambda of the score, which may differ from the index's.
            top_k: how many; at most the number of examples.

        Raises:
            StoreCorruptError: if a vector is not a number.
        """
        inverse = self._kernel.inverse(score, damping)
        vectors = query.mean(2) * inverse / self._sqrt_inverse / query.shape[1] ** 0.5
        positions: np.ndarray
        _, positions = self._faiss.search(vectors.flatten(1).float().numpy(), min(top_k, self._faiss.ntotal))
        if (positions < 0).any():
            raise StoreCorruptError("the search index holds NaN; run `carv-attrib index` again.")
        return positions

    def save(self, folder: Path) -> None:
        """Write the kernel, `index.faiss` and, with their sizes and checksums, `index.json` to a store's folder."""
        import faiss

        (folder / "index.json").unlink(missing_ok=True)  # files of two runs must never look like those of one
        self._kernel.save(folder / "kernel.safetensors")
        with atomic_file(folder / "index.faiss") as temporary:
            faiss.write_index(self._faiss, str(temporary))
        sizes = {name: (folder / name).stat().st_size for name in FILES}
        checksums = {name: file_digest(folder / name) for name in FILES}
        settings = asdict(self.settings) | {"bytes": sizes, "sha256": checksums}
        with atomic_file(folder / "index.json") as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n")

    @staticmethod
    def load(store: FeatureStore, kernel: Kernel) -> FeatureIndex:
        """Return the index in a store's folder, memory-mapped, after its size was compared.

        Raises:
            StoreError: if there is none, or it is not of this store.
            StoreCorruptError: if it is damaged.
        """
        settings = read_index_settings(store)
        path = store.path / "index.faiss"
        import faiss

        way_out = f"run `carv-attrib index {store.path}`"
        try:
            faiss_index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as err:
            raise StoreCorruptError(f"{path} is damaged: FAISS cannot read it; {way_out}.") from err
        if faiss_index.ntotal != len(store.ids):
            raise StoreCorruptError(f"{path} is damaged: it has {faiss_index.ntotal} examples; {way_out}.")
        return FeatureIndex(settings, kernel, faiss_index)

    def _whiten(self, features: Float64[Tensor, "train bands replicates d"]) -> Float32[np.ndarray, "train dims"]:
        vectors = (features.mean(2) * self._sqrt_inverse).flatten(1)
        if self.settings.score.endswith("cosine"):
            vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-300)
        else:
            vectors = vectors / features.shape[1] ** 0.5
        whitened: np.ndarray = vectors.float().numpy()
        return whitened


def read_index_settings(store: FeatureStore, *, read_all: bool = False) -> IndexSettings:
    """Return what the index in a store's folder was built for, after checking that it is there and of this store.

    Compared are the sizes of its files, and the kernel's checksum; with `read_all` also that of `index.faiss`, which
    is as large as the features.

    Raises:
        StoreError: if there is none, or it is of other features.
        StoreCorruptError: if it is damaged.
    """
    path = store.path / "index.json"
    way_out = "run featurize again to the end" if store.missing_parts() else f"run `carv-attrib index {store.path}`"
    if not path.is_file():
        raise StoreError(f"{store.path} has no index yet; {way_out}.")
    try:
        content = json.loads(path.read_text())
        sizes, checksums = content.pop("bytes"), content.pop("sha256")
        if content["kernel"] not in get_args(KernelKind):
            raise StoreError(f"the index in {store.path} has a kernel of an older version; {way_out}.")
        settings = IndexSettings(**content)
        for name in FILES:
            file = store.path / name
            if (size := file.stat().st_size) != sizes[name]:
                raise StoreCorruptError(f"{file} is damaged: it has {size} bytes instead of {sizes[name]}; {way_out}.")
            if (read_all or name != "index.faiss") and file_digest(file) != checksums[name]:
                raise StoreCorruptError(f"{file} is damaged: its checksum does not match; {way_out}.")
    except KeyError as err:
        raise StoreCorruptError(f"{path} has no {err}: it is damaged or of an older version; {way_out}.") from err
    except (OSError, ValueError, TypeError) as err:
        raise StoreCorruptError(f"{path} is damaged: {err}; {way_out}.") from err
    if settings.features_sha256 != store.digest():
        raise StoreError(f"the index in {store.path} is of other features; {way_out}.")
    return settings
