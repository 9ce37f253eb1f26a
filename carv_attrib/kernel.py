"""The preconditioner of the scores, `(H + lambda I)^{-1}` (`docs/method.md`, eq. (9) and (9')), in float64."""

from __future__ import annotations

import json
import logging
import math
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Float64
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from carv_attrib.config import FeaturizeConfig, check_choice
from carv_attrib.errors import ArgumentError, StoreCorruptError, StoreError
from carv_attrib.files import atomic_file
from carv_attrib.store import FeatureStore
from carv_attrib.threads import in_order

KernelKind = Literal["bands", "means"]
ScoreKind = Literal["preconditioned", "dot", "cosine", "preconditioned-cosine"]

Damping = float | Literal["auto"]

DEFAULT_DAMPING = 0.1
"""What `auto` is where there is nothing to choose it from: with one draw, and in pilots."""
POOLED = 0.5
"""Share of a band's matrix that is the mean of all bands': which keeps it from fitting too few vectors."""
DAMPINGS = torch.logspace(-5, 1, 121, dtype=torch.float64)
"""That `auto` chooses among, before it is halved, raised to the least and adapted to the number of bands."""
_LEAST_DAMPING = 0.01
"""Of `auto`."""
LARGE_KERNEL = 2 * 10**9
"""Bytes beyond which a warning says what the kernel takes."""
_log = logging.getLogger(__name__)
_ENOUGH_BANDS = 4
"""With fewer bands, `auto` damping is larger."""
_AT_ONCE = 2**28
"""Bytes of the matrices that are decomposed at once, by as many threads as there are."""


@dataclass(frozen=True)
class Kernel:
    """The eigendecomposition of H, which is zero between bands and between blocks of coordinates.

    Attributes:
        kind: `bands`: scored are bands, each with a matrix of its own; `means`: scored are draw-averaged features (as
            TRAK does), one band.
        eigenvalues: of each block, increasing, not negative.
        eigenvectors: in columns.
        num_vectors: how many vectors the matrix of a band is the mean of.
        auto_damping: lambda, relative to the mean eigenvalue, that was chosen from the vectors (eq. (9')).
    """

    kind: KernelKind
    eigenvalues: Float64[Tensor, "bands blocks size"]
    eigenvectors: Float64[Tensor, "bands blocks size size"]
    num_vectors: int
    auto_damping: float = DEFAULT_DAMPING

    @property
    def proj_dim(self) -> int:
        """Dimensions of the features, of all blocks."""
        return self.eigenvalues[0].numel()

    def within(self, bands: slice) -> Kernel:
        """Return the kernel of some of the bands."""
        return replace(self, eigenvalues=self.eigenvalues[bands], eigenvectors=self.eigenvectors[bands])

    def averaged(
        self, features: Float[Tensor, "*examples bands replicates d"]
    ) -> Float[Tensor, "*examples kept_bands replicates d"]:
        """Return the features that this kernel scores: bands, or their mean as one band."""
        return features if self.kind == "bands" else features.mean(-3, keepdim=True)

    def banded(
        self, features: Float[Tensor, "*examples bands replicates d"]
    ) -> Float64[Tensor, "*examples kept_bands replicates d"]:
        """Return the features that this kernel scores, in its eigenbasis."""
        return _by_block(self.averaged(features.double()), self.eigenvectors)

    def restored(
        self, banded: Float64[Tensor, "*examples kept_bands replicates d"]
    ) -> Float64[Tensor, "*examples kept_bands replicates d"]:
        """Return vectors in the eigenbasis in the coordinates of the features."""
        return _by_block(banded, self.eigenvectors.mT)

    def refined(
        self,
        old: Float[Tensor, "examples bands replicates d"],
        new: Float[Tensor, "examples bands 2 d"],
        num_candidates: int,
    ) -> Kernel:
        """Return the kernel over bands for scores of new draws, with which a few examples have new vectors (eq. (11)).

        The new vectors of the candidates take the place of the old. All other examples count half as they did, scaled
        to the noise that is left, and half by the new draws of some of them, the references. `auto` stays what it was.

        Args:
            old: vectors in this kernel of the candidates, and after them of the references.
            new: those of the old draws and the new ones, in two halves.
            num_candidates: how many of the examples are candidates.
        """
        old, new = old.double(), new.double() * (old.shape[2] / new.shape[2]) ** 0.5  # as many as there were, in sums
        candidates, references = (self._sums(vectors) for vectors in (new[:num_candidates], new[num_candidates:]))
        known = (self.eigenvectors * self.eigenvalues[:, :, None]) @ self.eigenvectors.mT * self.num_vectors
        others = (known - self._sums(old[:num_candidates])) * (new.square().sum() / old.square().sum())
        if num_references := len(new) - num_candidates:
            share = (self.num_vectors - num_candidates * old.shape[2]) / (num_references * old.shape[2])
            others = (others + share * references) / 2
        return decompose(candidates + others, self.num_vectors, self.kind, self.auto_damping)

    def _sums(
        self, vectors: Float64[Tensor, "examples bands replicates d"]
    ) -> Float64[Tensor, "bands blocks size size"]:
        """Return what vectors add to `num_vectors` times H."""
        return _pooled(outer_sums(vectors, self.eigenvalues.shape[-1]))

    def damping(self, damping: Damping) -> float:
        """Return lambda, relative to the mean eigenvalue: the given number, or what was chosen for `auto`.

        Raises:
            ArgumentError: for damping that is not positive.
        """
        if damping == "auto":
            return self.auto_damping
        if isinstance(damping, str) or not 0 < damping < float("inf"):
            raise ArgumentError(f"`damping` must be a positive number or auto, got {damping}; auto is the default.")
        return float(damping)

    def inverse(self, score: ScoreKind, damping: Damping) -> Float64[Tensor, "kept_bands d"]:
        """Return the diagonal of `(H + lambda I)^{-1}` in the eigenbasis, or ones for scores without it.

        lambda is relative to the mean eigenvalue of each block.

        Raises:
            ArgumentError: for damping that is not positive.
        """
        chosen = self.damping(damping)
        if not score.startswith("preconditioned"):
            return torch.ones_like(self.eigenvalues).flatten(1)
        return 1 / (self.eigenvalues + chosen * _mean_eigenvalues(self.eigenvalues)).flatten(1)

    def save(self, path: Path) -> None:
        """Write the kernel to a safetensors file, atomically."""
        tensors = {"eigenvalues": self.eigenvalues, "eigenvectors": self.eigenvectors.contiguous()}
        # one entry of metadata: safetensors writes several in any order
        names = ("kind", "num_vectors", "auto_damping")
        about = json.dumps({name: getattr(self, name) for name in names})
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata={"kernel": about})


def fit_kernel(store: FeatureStore, kind: KernelKind = "bands") -> Kernel:
    """Return the kernel of a store: one pass in O(d^2) memory for each band, of blocks less, in float64.

    Raises:
        ArgumentError: for an unknown kind, or means of an index that holds none.
        StoreError: if the store holds no features.
    """
    check_choice("kernel", kind, KernelKind)
    config = FeaturizeConfig.from_flat(store.manifest["config"])
    if kind == "means" and config.estimator.every_draw_a_band and config.estimator.proposal != "uniform":
        raise ArgumentError(
            "`kernel` means needs means over draws, but this index keeps every draw with the root of its weight; "
            "use `kernel` bands, or featurize with fewer `num_bands`."
        )
    size = config.projection.block_size(store.manifest["proj_dim"])
    sums: Tensor = torch.zeros(())
    of_halves: list[Tensor] = [torch.zeros(()), torch.zeros(())]
    num_vectors = 0
    for part in store.read_parts():
        vectors = part.features.double()
        halves = [vectors.flatten(1, 2)[:, half::2] for half in range(2)]  # of the draws
        if kind == "means":
            vectors = vectors.mean((1, 2), keepdim=True)
            halves = [half.mean(1, keepdim=True) for half in halves]
        sums = sums + outer_sums(vectors, size)
        of_halves = [total + outer_sums(half[:, None], size)[0] for total, half in zip(of_halves, halves, strict=True)]
        num_vectors += vectors.shape[0] * vectors.shape[2]
    if num_vectors == 0:
        raise StoreError(f"{store.path} holds no features yet; run featurize first.")
    auto_damping = DEFAULT_DAMPING if _has_one_draw(store) else choose_damping(of_halves[0], of_halves[1], len(sums))
    return decompose(_pooled(sums), num_vectors, kind, auto_damping)


def warn_of_large_kernel(num_bands: int, proj_dim: int, block_size: int) -> None:
    """Say what a kernel over bands takes, if it is much."""
    if (size := 8 * num_bands * proj_dim * block_size) > LARGE_KERNEL:
        _log.warning(
            "the kernel takes %.1f GB of disk, four times that of memory, and %d eigendecompositions of %s "
            "dimensions; fewer bands (`num_bands`), fewer dimensions (`proj_dim`) or, with the Kronecker projection, "
            "smaller blocks (`block_dim`) take less.",
            size / 1e9,
            num_bands * proj_dim // block_size,
            f"{block_size:,}",
        )


def kernel_of(vectors: Float[Tensor, "examples bands replicates d"], block_size: int) -> Kernel:
    """Return the kernel of vectors that are at hand, without a damping of its own."""
    return decompose(_pooled(outer_sums(vectors.double(), block_size)), vectors.shape[0] * vectors.shape[2])


def decompose(
    sums: Float64[Tensor, "bands blocks size size"],
    num_vectors: int,
    kind: KernelKind = "bands",
    auto_damping: float = DEFAULT_DAMPING,
) -> Kernel:
    """Return the kernel whose H is `sums / num_vectors`, means of outer products."""
    values, vectors = _eigh(sums / num_vectors)
    return Kernel(kind, values, vectors, num_vectors, auto_damping)


def choose_damping(
    first: Float64[Tensor, "blocks size size"], second: Float64[Tensor, "blocks size size"], num_bands: int
) -> float:
    """Return the damping, relative to the mean eigenvalue, by cross-validation over draws (eq. (9')).

    Args:
        first: sums of outer products of one half of the draws.
        second: of the other half.
        num_bands: of whose scores the mean is taken.
    """
    by_draws = math.sqrt(_cross_validated(first, second) * _cross_validated(second, first)) / 2
    return max(by_draws, _LEAST_DAMPING) * max(1.0, _ENOUGH_BANDS / num_bands) ** 2


def _cross_validated(known: Float64[Tensor, "blocks size size"], other: Float64[Tensor, "blocks size size"]) -> float:
    """Return the damping of `known` that makes Gaussian vectors with the second moment `other` most likely.

    The factor of the covariance of each block is the best at each damping.
    """
    values, vectors = _eigh(known)
    moments = (vectors * (other @ vectors)).sum(1)[:, None]
    damped = values[:, None] + DAMPINGS[:, None] * _mean_eigenvalues(values)[:, None]  # blocks, dampings, size
    surprise = damped.log().mean(2) + (moments / damped).mean(2).log()
    has_gradient = moments.sum((1, 2)) > 0  # the others would ask for as little as there is
    return float(DAMPINGS[surprise[has_gradient].sum(0).argmin()])


def _eigh(matrices: Float64[Tensor, "*many size size"]) -> tuple[Float64[Tensor, "*many size"], Tensor]:
    """Return eigenvalues, increasing and not negative, and eigenvectors in columns of symmetric matrices.

    Each in one thread: the last bits of an eigenvector depend on how many there are.
    """
    flat = matrices.flatten(0, -3)
    values, vectors = flat.new_empty(flat.shape[:-1]), torch.empty_like(flat)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with closing(in_order(torch.linalg.eigh, flat, min(threads, _AT_ONCE // (flat[0].nbytes)))) as found:
            for number, (own_values, own_vectors) in enumerate(found):
                values[number], vectors[number] = own_values.clamp(min=0), own_vectors
    finally:
        torch.set_num_threads(threads)
    return values.view(matrices.shape[:-1]), vectors.view(matrices.shape)


def _mean_eigenvalues(eigenvalues: Float64[Tensor, "*blocks size"]) -> Float64[Tensor, "*blocks one"]:
    """Return the mean of each block, and a trifle for layers that have no gradient."""
    return eigenvalues.mean(-1, keepdim=True).clamp(min=1e-12 * float(eigenvalues.mean()))


def _in_blocks(vectors: Float64[Tensor, "*vectors d"], size: int) -> Float64[Tensor, "*vectors blocks size"]:
    """Return vectors with their coordinates in blocks."""
    return vectors.reshape(*vectors.shape[:-1], vectors.shape[-1] // size, size)


def _by_block(
    vectors: Float64[Tensor, "*examples bands replicates d"], matrices: Float64[Tensor, "#bands blocks size size"]
) -> Float64[Tensor, "*examples bands replicates d"]:
    """Return vectors times the matrix of each band and block."""
    products: Tensor = torch.einsum("...brgi,bgij->...brgj", _in_blocks(vectors, matrices.shape[-1]), matrices)
    return products.flatten(-2)


def outer_sums(
    vectors: Float64[Tensor, "examples bands replicates d"], block_size: int
) -> Float64[Tensor, "bands blocks size size"]:
    """Return the sums of outer products of each band and block."""
    blocks = _in_blocks(vectors, block_size)
    sums: Tensor = torch.einsum("nbrgi,nbrgj->bgij", blocks, blocks)
    return sums


def _pooled(sums: Float64[Tensor, "bands blocks size size"]) -> Float64[Tensor, "bands blocks size size"]:
    """Return the sums of each band with a share of the mean of all bands in them, in place."""
    mean = sums.mean(0)
    return sums.mul_(1 - POOLED).add_(mean, alpha=POOLED)


def _has_one_draw(store: FeatureStore) -> bool:
    """Return whether an example has a single vector, of one draw or a few, which leaves nothing to compare."""
    return int(store.manifest["config"]["num_bands"]) * int(store.manifest["num_replicates"]) == 1


def is_of_older_version(path: Path) -> bool:
    """Return whether a kernel file is of one matrix for all bands; what is wrong with others is for `load_kernel`."""
    try:
        with safe_open(path, framework="pt") as file:
            return "eigenvectors" in file.keys() and len(file.get_slice("eigenvectors").get_shape()) == 2
    except (OSError, SafetensorError):
        return False


def load_kernel(path: Path) -> Kernel:
    """Return the kernel that `Kernel.save` wrote.

    Raises:
        StoreCorruptError: if the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["kernel"])
        tensors = load_file(path)
        values, vectors = tensors["eigenvalues"], tensors["eigenvectors"]
        if (
            values.ndim != 3
            or vectors.shape != (*values.shape, values.shape[-1])
            or {values.dtype, vectors.dtype} != {torch.float64}
        ):
            raise ValueError(f"eigenvectors of shape {list(vectors.shape)}, in {vectors.dtype}")
        if not (values.isfinite().all() and vectors.isfinite().all()):
            raise ValueError("it holds NaN or infinity")
        return Kernel(eigenvalues=values, eigenvectors=vectors, **about)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as err:
        raise StoreCorruptError(f"{path} is damaged: {err}; run `carv-attrib index`.") from err
