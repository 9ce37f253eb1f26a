"""The FAISS index of whitened features: the only module that imports faiss.

An example is stored as `(Lambda + lambda_0 I)^{-1/2} U^T g_ib / sqrt(B)`, its bands one after the other, so that the
inner product with a query treated alike is the score of eq. (9). Another lambda, or none, changes the query's vector
only; a cosine needs an index of its own, of vectors of length one.

Vectors may be compressed, by any FAISS factory string: the index only finds candidates, whose scores are computed from
the store. It lies in several files, so that making it takes the memory of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from carv_attrib.errors import ArgumentError, StoreCorruptError, StoreError
from carv_attrib.files import atomic_file, file_digest, read_sealed, write_sealed
from carv_attrib.kernel import Damping, Kernel, KernelKind, ScoreKind, is_of_older_version
from carv_attrib.seeding import choose_positions, stream_key
from carv_attrib.store import FeatureStore

KERNEL_FILE = "kernel.safetensors"
NUM_CANDIDATES = 200
"""Examples from the index, at least, that are scored exactly and compete for the top."""
SHARD_BYTES = 2**28
"""Of compressed vectors in a file of the index, about."""
TRAINING_BYTES = 2**29
"""Of the vectors that a compressed index is trained on, at most."""
PER_CENTROID = 39
"""Training vectors that FAISS wants for each centroid at least."""
_EXACT_UP_TO = 20_000


@dataclass(frozen=True)
class SearchSettings:
    """How candidates are found.

    Attributes:
        factory: FAISS factory string.
        parameters: for searching, as FAISS's `ParameterSpace` reads them: `nprobe=16`, `efSearch=64`, or nothing.
        candidates: how many are scored at least.
        recall: mean share of the ten largest scores that are among the candidates, as measured on queries when the
            parameters were chosen.
        recall_error: its standard error.
        milliseconds: of finding and reading the candidates of one query, the median then.
    """

    factory: str = "Flat"
    parameters: str = ""
    candidates: int = NUM_CANDIDATES
    recall: float | None = None
    recall_error: float | None = None
    milliseconds: float | None = None


@dataclass(frozen=True)
class IndexSettings:
    """What an index was built for.

    Attributes:
        score: the score whose inner products it holds.
        kernel: the kernel's kind.
        damping: lambda_0, relative to the mean eigenvalue; or auto.
        features_sha256: of the checksums of all parts, in the order of the store.
        search: how candidates are found.
    """

    score: ScoreKind
    kernel: KernelKind
    damping: Damping
    features_sha256: str
    search: SearchSettings = field(default_factory=SearchSettings)

    def serves(self, score: ScoreKind, kernel: KernelKind, damping: Damping) -> bool:
        """Return whether an index built so can be searched for this score."""
        if "cosine" in (self.score + score):
            return (self.score, self.kernel, self.damping) == (score, kernel, damping)
        return self.kernel == kernel


class FeatureIndex:
    """Whitened features in FAISS inner-product indexes; positions are those of `FeatureStore.ids`."""

    def __init__(self, settings: IndexSettings, kernel: Kernel, shards: list[Any]) -> None:
        """Join shards, each a FAISS index of the examples after those of the one before."""
        import faiss

        self.settings = settings
        self._kernel = kernel
        self._whiten = _Whitening(settings, kernel)
        self._shards = shards  # IndexShards does not keep them alive
        make: Any = faiss.IndexShards  # whose stub lacks arguments
        self._faiss = make(shards[0].d, False, True)  # one after the other, positions counted on
        parameters: Any = faiss.ParameterSpace()
        for shard in shards:
            if settings.search.parameters:
                parameters.set_index_parameters(shard, settings.search.parameters)
            self._faiss.add_shard(shard)

    @staticmethod
    def build(store: FeatureStore, kernel: Kernel, *, score: ScoreKind, damping: Damping) -> FeatureIndex:
        """Return the exact index of all features of a store for one score, in memory.

        Raises:
            ArgumentError: for damping that is not positive.
        """
        settings = IndexSettings(score, kernel.kind, damping, store.digest())
        return FeatureIndex(settings, kernel, list(_make_shards(store, _Whitening(settings, kernel), "Flat")))

    @staticmethod
    def write(
        store: FeatureStore, kernel: Kernel, *, score: ScoreKind, damping: Damping, factory: str = "Flat"
    ) -> FeatureIndex:
        """Write the kernel and the shards to a store's folder; `finish` makes them an index.

        Args:
            store: of the features, which are read part by part.
            kernel: to whiten them.
            score: that the inner products are to be.
            damping: lambda_0, relative to the mean eigenvalue, or auto.
            factory: FAISS factory string; `auto`: exact for few examples, else an inverted file of products quantised
                to 4 bits for each 4 dimensions.

        Raises:
            ArgumentError: for damping that is not positive, or a factory string that FAISS does not take.
        """
        import faiss

        factory = choose_factory(len(store.ids), kernel.eigenvalues.numel()) if factory == "auto" else factory
        settings = IndexSettings(score, kernel.kind, damping, store.digest(), SearchSettings(factory))
        shards = _make_shards(store, _Whitening(settings, kernel), factory)
        first = next(shards)  # a bad factory leaves the index that is there
        store.retire_index()  # files of two runs must never look like those of one
        for old in store.path.glob("index*.faiss"):
            old.unlink()
        kernel.save(store.path / KERNEL_FILE)
        files = []
        for number, shard in enumerate(chain([first], shards)):
            files.append(store.path / f"index-{number:05d}.faiss")
            with atomic_file(files[-1]) as temporary:
                faiss.write_index(shard, str(temporary))
        return FeatureIndex(settings, kernel, [_read_shard(file) for file in files])

    def finish(self, folder: Path, search: SearchSettings | None = None) -> FeatureIndex:
        """Write `index.json`, with the sizes and checksums of the files in a folder; return the index as it is then."""
        settings = replace(self.settings, search=search or self.settings.search)
        files = _files(folder)
        content = asdict(settings) | {
            "bytes": {file.name: file.stat().st_size for file in files},
            "sha256": {file.name: file_digest(file) for file in files},
        }
        write_sealed(folder / "index.json", content)
        return self.searched(settings.search)

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

        Returns:
            Positions; -1 in the place of those that a compressed index did not find.

        Raises:
            StoreCorruptError: if a vector is not a number.
        """
        vectors = self._whiten.query(query, self._kernel.inverse(score, damping))
        positions: np.ndarray
        _, positions = self._faiss.search(vectors, min(top_k, len(self)))
        if (
            (positions >= len(self)).any()
            or (positions < 0).all(1).any()
            or (self.settings.search.factory == "Flat" and (positions < 0).any())
        ):
            raise StoreCorruptError("the search index holds NaN; run `carv-attrib index` again.")
        return positions

    @staticmethod
    def load(store: FeatureStore, kernel: Kernel) -> FeatureIndex:
        """Return the index in a store's folder, memory-mapped, after a check of its checksum.

        Raises:
            StoreError: if there is none, or it is not of this store.
            StoreCorruptError: if it is damaged.
        """
        settings = read_index_settings(store, read_all=True)  # FAISS trusts what it reads
        way_out = f"run `carv-attrib index {store.path}`"
        try:
            index = FeatureIndex(settings, kernel, [_read_shard(file) for file in _files(store.path)[1:]])
        except RuntimeError as err:
            raise StoreCorruptError(f"{store.path}/index-*.faiss is damaged: FAISS cannot read it; {way_out}.") from err
        if (len(index), index._faiss.d) != (len(store.ids), kernel.eigenvalues.numel()):
            found = f"{len(index)} vectors of {index._faiss.d} dimensions"
            raise StoreCorruptError(f"the search index in {store.path} has {found}: it is of another index; {way_out}.")
        return index

    def __len__(self) -> int:
        """Return the number of examples."""
        return int(self._faiss.ntotal)

    def inner_products(
        self,
        query: Float64[Tensor, "queries bands replicates d"],
        train: Float[Tensor, "train bands replicates d"],
        *,
        score: ScoreKind,
        damping: Damping,
    ) -> Float32[np.ndarray, "queries train"]:
        """Return, in single precision, what `search` sorts by if nothing is compressed: of features of examples."""
        inverse = self._kernel.inverse(score, damping)
        found: np.ndarray
        if score.endswith("cosine"):
            found = self._whiten.query(query, inverse) @ self._whiten(train).T
        else:  # examples are not rotated, but queries back
            vectors = self._kernel.restored((query.mean(2) * inverse)[:, :, None]) / query.shape[1]
            means = self._kernel.averaged(train.mean(2, keepdim=True))
            found = (vectors.flatten(1).float() @ means.flatten(1).T).numpy()
        return found

    def searched(self, search: SearchSettings) -> FeatureIndex:
        """Return the same index, searched in another way from now on."""
        return FeatureIndex(replace(self.settings, search=search), self._kernel, self._shards)

    def parameter_choices(self) -> list[str]:
        """Return parameters of a search, from the fastest to the most thorough."""
        import faiss

        shard = faiss.downcast_index(self._shards[0])
        if isinstance(shard, faiss.IndexPreTransform):
            shard = faiss.downcast_index(shard.index)
        if isinstance(shard, faiss.IndexRefine):
            shard = faiss.downcast_index(shard.base_index)
        if isinstance(shard, faiss.IndexIVF):
            doubled = range(int(np.ceil(np.log2(shard.nlist))) + 1)
            return [f"nprobe={min(2**i, shard.nlist)}" for i in doubled]
        if isinstance(shard, faiss.IndexHNSW):
            return [f"efSearch={2**i}" for i in range(4, 12)]
        return [""]


class _Whitening:
    """What features become in an index."""

    def __init__(self, settings: IndexSettings, kernel: Kernel) -> None:
        self._kernel = kernel
        self._sqrt_inverse = kernel.inverse(settings.score, settings.damping).sqrt()
        self._normalise = settings.score.endswith("cosine")

    def __call__(self, features: Tensor) -> Float32[np.ndarray, "train dims"]:
        banded = self._kernel.banded(features.mean(2, keepdim=True)).mean(2)
        vectors = (banded * self._sqrt_inverse).flatten(1)
        if self._normalise:
            vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-300)
        else:
            vectors = vectors / banded.shape[1] ** 0.5
        whitened: np.ndarray = vectors.float().numpy()
        return whitened

    def query(
        self, query: Float64[Tensor, "queries bands replicates d"], inverse: Float64[Tensor, "bands d"]
    ) -> Float32[np.ndarray, "queries dims"]:
        """Return what rotated features of queries become, so that inner products are scores."""
        vectors = query.mean(2) * inverse / self._sqrt_inverse / query.shape[1] ** 0.5
        flat: np.ndarray = vectors.flatten(1).float().numpy()
        return flat


def choose_factory(num_examples: int, num_dims: int) -> str:
    """Return a FAISS factory string for so many vectors: exact for few."""
    if num_examples <= _EXACT_UP_TO or num_dims % 4:
        return "Flat"
    trained_on = min(num_examples, TRAINING_BYTES // (4 * num_dims))
    num_lists = min(4 * num_examples**0.5, trained_on / PER_CENTROID)
    return f"IVF{2 ** int(np.log2(num_lists))},PQ{num_dims // 4}x4fs"


def _make_shards(store: FeatureStore, whiten: _Whitening, factory: str) -> Iterator[Any]:
    """Yield FAISS indexes of the features of a store, each of about `SHARD_BYTES` at most.

    Raises:
        ArgumentError: for a factory string that FAISS does not take.
    """
    import faiss

    parts = (whiten(part.features) for part in store.read_parts())
    first = next(parts)
    try:
        empty = faiss.index_factory(first.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if not empty.is_trained:
            empty.train(_training_vectors(store, whiten, first.shape[1]))
        size = _code_size(empty)
    except RuntimeError as err:
        raise ArgumentError(
            f"`factory` must be a FAISS factory string for vectors of {first.shape[1]} dimensions and so many "
            f"examples, such as Flat, HNSW32 or IVF256,SQfp16, got {factory}: {str(err).splitlines()[-1]}"
        ) from err
    shard = faiss.clone_index(empty)
    for vectors in chain([first], parts):
        if shard.ntotal and (shard.ntotal + len(vectors)) * size > SHARD_BYTES:
            yield shard
            shard = faiss.clone_index(empty)
        shard.add(vectors)
    yield shard


def _training_vectors(store: FeatureStore, whiten: _Whitening, num_dims: int) -> Float32[np.ndarray, "sample dims"]:
    """Return the vectors of a sample of examples, chosen by a hash of their ids."""
    ids = torch.from_numpy(store.ids)
    number = min(len(ids), TRAINING_BYTES // (4 * num_dims))
    chosen = choose_positions(stream_key(0, "index"), ids, number).numpy()
    chosen.sort()
    pieces, first = [], 0
    for part in store.read_parts():
        rows = chosen[(chosen >= first) & (chosen < first + len(part.ids))] - first
        pieces.append(whiten(part.features[rows]))
        first += len(part.ids)
    return np.concatenate(pieces)


def _code_size(index: Any) -> int:
    """Return the bytes of a vector in a FAISS index; of graphs, those of their vectors alone."""
    try:
        return int(index.sa_code_size())
    except RuntimeError:
        return 4 * int(index.d)


def _read_shard(file: Path) -> Any:
    """Return a FAISS index, memory-mapped as far as FAISS can.

    Raises:
        RuntimeError: if FAISS cannot read it.
    """
    import faiss

    try:
        return faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError:
        return faiss.read_index(str(file), faiss.IO_FLAG_MMAP)


def read_index_settings(store: FeatureStore, *, read_all: bool = False) -> IndexSettings:
    """Return what the index in a store's folder was built for, after checking that it is there and of this store.

    Compared are the sizes of its files, and the kernel's checksum; with `read_all` also those of the shards, which
    may be as large as the features.

    Raises:
        StoreError: if there is none, or it is of other features.
        StoreCorruptError: if it is damaged.
    """
    path = store.path / "index.json"
    way_out = (
        f"run `carv-attrib index {store.path}`"
        if store.is_complete
        else "run featurize to the end, or merge all shards"
    )
    if not path.is_file():
        raise StoreError(f"{store.path} has no index yet; {way_out}.")
    try:
        content = read_sealed(path)
        sizes, checksums, search = (content.pop(name) for name in ("bytes", "sha256", "search"))
        if not sizes:
            raise StoreError(f"{store.path} has no index yet; {way_out}.")
        if content["kernel"] not in get_args(KernelKind):
            raise StoreError(f"the index in {store.path} has a kernel of an older version; {way_out}.")
        settings = IndexSettings(**content, search=SearchSettings(**search))
        files = _files(store.path)
        if (found := [file.name for file in files]) != [KERNEL_FILE, *sorted(set(sizes) - {KERNEL_FILE})]:
            raise StoreCorruptError(f"{path} names other files than {', '.join(found)}; {way_out}.")
        for file in files:
            if not file.is_file():
                raise StoreCorruptError(f"{file} is missing; {way_out}.")
            if (size := file.stat().st_size) != sizes[file.name]:
                raise StoreCorruptError(
                    f"{file} is damaged: it has {size} bytes instead of {sizes[file.name]}; {way_out}."
                )
            if (read_all or file.name == KERNEL_FILE) and file_digest(file) != checksums[file.name]:
                raise StoreCorruptError(f"{file} is damaged: its checksum does not match; {way_out}.")
        if is_of_older_version(files[0]):
            raise StoreError(f"the index in {store.path} has a kernel of an older version; {way_out}.")
    except KeyError as err:
        raise StoreCorruptError(f"{path} has no {err}: it is damaged or of an older version; {way_out}.") from err
    except (OSError, ValueError, TypeError) as err:
        raise StoreCorruptError(f"{path} is damaged: {err}; {way_out}.") from err
    if settings.features_sha256 != store.digest():
        raise StoreError(f"the index in {store.path} is of other features; {way_out}.")
    return settings


def read_index_choice(store: FeatureStore) -> dict[str, Any]:
    """Return what the index in a store's folder is or was built for, as `build_index` takes it; nothing if unknown.

    Left out is what was measured, since that was on other examples.
    """
    try:
        content = read_sealed(store.path / "index.json")
        choice = {name: content[name] for name in ("score", "kernel", "damping")}
        search = {name: content["search"][name] for name in ("factory", "parameters", "candidates")}
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return choice | {"search": SearchSettings(**search)} if choice["kernel"] in get_args(KernelKind) else {}


def _files(folder: Path) -> list[Path]:
    """Return the files of an index in a folder, the kernel first."""
    return [folder / KERNEL_FILE, *sorted(folder.glob("index-*.faiss"))]
