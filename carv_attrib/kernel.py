"""The preconditioner and the scores made with it (`docs/method.md`, eq. (9) and (10)).

`score(q, i) = 1/B sum_b g_qb^T (H + lambda I)^{-1} g_ib`, everything in float64.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Float64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from carv_attrib.config import FeaturizeConfig, check_choice
from carv_attrib.errors import ArgumentError, StoreCorruptError, StoreError
from carv_attrib.store import FeatureStore, atomic_file

KernelKind = Literal["draws", "means"]
ScoreKind = Literal["preconditioned", "dot", "cosine", "preconditioned-cosine"]

DEFAULT_DAMPING = 0.1


@dataclass(frozen=True)
class Kernel:
    """The eigendecomposition of H, and whether scores keep bands apart.

    Attributes:
        kind: `draws`: H is a mean over examples and draws, and bands are kept; `means`: H is a mean over examples of
            draw-averaged features (TRAK's Phi^T Phi), which are also what is scored.
        eigenvalues: of H, increasing, not negative.
        eigenvectors: in columns.
        num_vectors: how many vectors H is the mean of.
    """

    kind: KernelKind
    eigenvalues: Float64[Tensor, " proj_dim"]
    eigenvectors: Float64[Tensor, "proj_dim proj_dim"]
    num_vectors: int

    def banded(
        self, features: Float[Tensor, "*examples bands replicates d"]
    ) -> Float64[Tensor, "*examples kept_bands replicates d"]:
        """Return the features that this kernel scores, in its eigenbasis: bands, or their mean as one band."""
        rotated = features.double() @ self.eigenvectors
        return rotated if self.kind == "draws" else rotated.mean(-3, keepdim=True)

    def inverse(self, score: ScoreKind, damping: float) -> Float64[Tensor, " proj_dim"]:
        """Return the diagonal of `(H + lambda I)^{-1}` in the eigenbasis, or ones for scores without it.

        Raises:
            ArgumentError: for damping that is not positive.
        """
        if not 0 < damping < float("inf"):
            raise ArgumentError(f"`damping` must be a positive number, got {damping}; 0.1 is the default.")
        if not score.startswith("preconditioned"):
            return torch.ones_like(self.eigenvalues)
        return 1 / (self.eigenvalues + damping * self.eigenvalues.mean())

    def save(self, path: Path) -> None:
        """Write the kernel to a safetensors file, atomically."""
        tensors = {"eigenvalues": self.eigenvalues, "eigenvectors": self.eigenvectors.contiguous()}
        # one entry of metadata: safetensors writes several in any order
        about = json.dumps({"kind": self.kind, "num_vectors": self.num_vectors})
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata={"kernel": about})


def fit_kernel(store: FeatureStore, kind: KernelKind = "draws") -> Kernel:
    """Return the kernel of a store: one pass in O(d^2) memory, one eigendecomposition in float64.

    Raises:
        ArgumentError: for an unknown kind, or means of an index that holds none.
        StoreError: if the store holds no features.
    """
    check_choice("kernel", kind, KernelKind)
    config = FeaturizeConfig.from_flat(store.manifest["config"]).estimator
    if kind == "means" and config.every_draw_a_band and config.proposal != "uniform":
        raise ArgumentError(
            "`kernel` means needs means over draws, but this index keeps every draw with the root of its weight; "
            "use `kernel` draws, or featurize with fewer `num_bands`."
        )
    gram: Tensor = torch.zeros(())
    num_vectors = 0
    for vectors in _draws(store) if kind == "draws" else _means(store):
        gram = gram + vectors.T @ vectors
        num_vectors += len(vectors)
    if num_vectors == 0:
        raise StoreError(f"{store.path} holds no features yet; run featurize first.")
    return decompose(gram, num_vectors, kind)


def decompose(gram: Float64[Tensor, "d d"], num_vectors: int, kind: KernelKind = "draws") -> Kernel:
    """Return the kernel whose H is `gram / num_vectors`, a mean of outer products."""
    with _one_thread():
        eigenvalues, eigenvectors = torch.linalg.eigh(gram / num_vectors)
    return Kernel(kind, eigenvalues.clamp(min=0), eigenvectors, num_vectors)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread: the last bits of an eigenvector depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _draws(store: FeatureStore) -> Iterable[Float64[Tensor, "vectors d"]]:
    """Yield every kept draw of the examples that feed the kernel, in the order of the store."""
    for part in store.parts:
        yield store.read_part(part).kernel_draws.double().flatten(0, 1)


def _means(store: FeatureStore) -> Iterable[Float64[Tensor, "vectors d"]]:
    """Yield the draw-averaged features of all examples."""
    for part in store.parts:
        yield store.read_part(part).features.double().mean((1, 2))


def similarity(
    query: Float64[Tensor, "queries bands replicates d"],
    train: Float64[Tensor, "train bands replicates d"],
    inverse: Float64[Tensor, " d"],
    *,
    normalise: bool = False,
) -> tuple[Float64[Tensor, "queries train"], Float64[Tensor, "queries train"]]:
    """Return scores and their Monte-Carlo standard errors, of features in the kernel's eigenbasis.

    The draws of each band are kept in two halves where there are enough of them. The scores of the halves differ by
    chance and, alternate draws being of neighbouring strata, a little by the trend between those, so
    `sum over bands of (difference / 2)^2 / B^2` estimates the variance of the score from above. (Not so for sorted iid
    draws, whose halves are not independent.) With one half a band the successive differences
    of the bands take its place, which also hold the trend over timesteps (too large); with one band nothing (NaN).
    """
    num_bands, num_replicates = train.shape[1:3]
    query, train = query * inverse.sqrt(), train * inverse.sqrt()
    if normalise:
        query, train = (
            x / x.mean(2).flatten(1).norm(dim=1).clamp(min=1e-300).view(-1, 1, 1, 1) for x in (query, train)
        )
        query, train = query * num_bands**0.5, train * num_bands**0.5
    per_band = torch.einsum("qbd,nbd->bqn", query.mean(2), train.mean(2))
    scores = per_band.mean(0)
    if num_replicates == 2:
        halves = torch.einsum("qbrd,nbrd->rbqn", query, train)
        variance = (halves[0] - halves[1]).square().sum(0) / (4 * num_bands**2)
    elif num_bands > 1:
        variance = per_band.diff(dim=0).square().mean(0) / (2 * num_bands)
    else:
        variance = torch.full_like(scores, float("nan"))
    return scores, variance.sqrt()


def load_kernel(path: Path) -> Kernel:
    """Return the kernel that `Kernel.save` wrote.

    Raises:
        StoreCorruptError: if the file is damaged.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["kernel"])
        tensors = load_file(path)
        return Kernel(about["kind"], tensors["eigenvalues"], tensors["eigenvectors"], about["num_vectors"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as err:
        raise StoreCorruptError(f"{path} is damaged: {err}; run `carv-attrib index`.") from err
