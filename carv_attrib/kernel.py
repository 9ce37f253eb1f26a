"""The preconditioner of the scores, `(H + lambda I)^{-1}` (`docs/method.md`, eq. (9) and (9')), in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
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
from carv_attrib.files import atomic_file
from carv_attrib.store import FeatureStore
from carv_attrib.threads import in_order

KernelKind = Literal["bands", "means"]
ScoreKind = Literal["preconditioned", "dot", "cosine", "preconditioned-cosine"]

Damping = float | Literal["auto"]

DEFAULT_DAMPING = 0.1
"""What `auto` is where there is nothing to choose it from: with one draw, and in pilots."""
_SIDE_BY_SIDE = 4096
"""Dimensions up to which two eigendecompositions are made at once: beyond, they take gigabytes each."""
DAMPINGS = torch.logspace(-5, 1, 121, dtype=torch.float64)
"""That `auto` chooses among, before it is halved and adapted to the number of bands."""
_ENOUGH_BANDS = 4
"""With fewer bands, `auto` damping is larger."""


@dataclass(frozen=True)
class Kernel:
    """The eigendecomposition of H, and whether scores keep bands apart.

    Attributes:
        kind: `bands`: H is a mean over examples, bands and their replicates, and bands are kept; `means`: H is a mean
            over examples of draw-averaged features (TRAK's Phi^T Phi), which are also what is scored.
        eigenvalues: of H, increasing, not negative.
        eigenvectors: in columns.
        num_vectors: how many vectors H is the mean of.
        auto_damping: lambda, relative to the mean eigenvalue, that was chosen from the vectors (eq. (9')).
    """

    kind: KernelKind
    eigenvalues: Float64[Tensor, " proj_dim"]
    eigenvectors: Float64[Tensor, "proj_dim proj_dim"]
    num_vectors: int
    auto_damping: float = DEFAULT_DAMPING

    def averaged(
        self, features: Float[Tensor, "*examples bands replicates d"]
    ) -> Float[Tensor, "*examples kept_bands replicates d"]:
        """Return the features that this kernel scores: bands, or their mean as one band."""
        return features if self.kind == "bands" else features.mean(-3, keepdim=True)

    def banded(
        self, features: Float[Tensor, "*examples bands replicates d"]
    ) -> Float64[Tensor, "*examples kept_bands replicates d"]:
        """Return the features that this kernel scores, in its eigenbasis."""
        return self.averaged(features.double() @ self.eigenvectors)

    def refined(
        self,
        old: Float[Tensor, "examples bands replicates d"],
        new: Float[Tensor, "examples bands 2 d"],
        num_candidates: int,
    ) -> Kernel:
        """Return the kernel for scores of new draws, with which a few examples have new vectors (eq. (11)).

        The new vectors of the candidates take the place of the old. All other examples count half as they did, scaled
        to the noise that is left, and half by the new draws of some of them, the references. `auto` stays what it was.

        Args:
            old: vectors in this kernel of the candidates, and after them of the references.
            new: those of the old draws and the new ones, in two halves.
            num_candidates: how many of the examples are candidates.
        """
        old, new = (vectors.double().flatten(1, 2) for vectors in (old, new))
        new = new * (old.shape[1] / new.shape[1]) ** 0.5  # as many as there were, in sums
        candidates, references = new[:num_candidates], new[num_candidates:]
        known = (self.eigenvectors * self.eigenvalues) @ self.eigenvectors.T * self.num_vectors
        others = (known - _gram(old[:num_candidates])) * (new.square().sum() / old.square().sum())
        if len(references):
            share = (self.num_vectors - num_candidates * old.shape[1]) / (len(references) * old.shape[1])
            others = (others + share * _gram(references)) / 2
        return decompose(_gram(candidates) + others, self.num_vectors, self.kind, self.auto_damping)

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

    def inverse(self, score: ScoreKind, damping: Damping) -> Float64[Tensor, " proj_dim"]:
        """Return the diagonal of `(H + lambda I)^{-1}` in the eigenbasis, or ones for scores without it.

        Raises:
            ArgumentError: for damping that is not positive.
        """
        chosen = self.damping(damping)
        if not score.startswith("preconditioned"):
            return torch.ones_like(self.eigenvalues)
        return 1 / (self.eigenvalues + chosen * self.eigenvalues.mean())

    def save(self, path: Path) -> None:
        """Write the kernel to a safetensors file, atomically."""
        tensors = {"eigenvalues": self.eigenvalues, "eigenvectors": self.eigenvectors.contiguous()}
        # one entry of metadata: safetensors writes several in any order
        names = ("kind", "num_vectors", "auto_damping")
        about = json.dumps({name: getattr(self, name) for name in names})
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata={"kernel": about})


def fit_kernel(store: FeatureStore, kind: KernelKind = "bands") -> Kernel:
    """Return the kernel of a store: one pass in O(d^2) memory, in float64.

    Raises:
        ArgumentError: for an unknown kind, or means of an index that holds none.
        StoreError: if the store holds no features.
    """
    check_choice("kernel", kind, KernelKind)
    config = FeaturizeConfig.from_flat(store.manifest["config"]).estimator
    if kind == "means" and config.every_draw_a_band and config.proposal != "uniform":
        raise ArgumentError(
            "`kernel` means needs means over draws, but this index keeps every draw with the root of its weight; "
            "use `kernel` bands, or featurize with fewer `num_bands`."
        )
    halves: list[Tensor] = [torch.zeros(()), torch.zeros(())]
    of_means: Tensor = torch.zeros(())
    num_vectors = 0
    for part in store.read_parts():
        draws = part.features.double().flatten(1, 2)  # (examples, replicates of bands, d)
        sides = [draws[:, ::2], draws[:, 1::2]]
        if kind == "means":
            sides = [side.mean(1, keepdim=True) for side in sides]
            draws = draws.mean(1, keepdim=True)
            of_means = of_means + _gram(draws)
        halves = [half + _gram(side) for half, side in zip(halves, sides, strict=True)]
        num_vectors += draws.shape[0] * draws.shape[1]
    if num_vectors == 0:
        raise StoreError(f"{store.path} holds no features yet; run featurize first.")
    num_bands = 1 if kind == "means" else config.num_bands
    auto_damping = DEFAULT_DAMPING if _has_one_draw(store) else choose_damping(halves[0], halves[1], num_bands)
    return decompose(of_means if kind == "means" else halves[0] + halves[1], num_vectors, kind, auto_damping)


def decompose(
    gram: Float64[Tensor, "d d"], num_vectors: int, kind: KernelKind = "bands", auto_damping: float = DEFAULT_DAMPING
) -> Kernel:
    """Return the kernel whose H is `gram / num_vectors`, a mean of outer products."""
    with _one_thread():
        eigenvalues, eigenvectors = torch.linalg.eigh(gram / num_vectors)
    return Kernel(kind, eigenvalues.clamp(min=0), eigenvectors, num_vectors, auto_damping)


def choose_damping(first: Float64[Tensor, "d d"], second: Float64[Tensor, "d d"], num_bands: int) -> float:
    """Return the damping, relative to the mean eigenvalue, by cross-validation over draws (eq. (9')).

    Args:
        first: H, up to a factor, of one half of the draws.
        second: of the other half.
        num_bands: of whose scores the mean is taken.
    """
    pairs = ((first, second), (second, first))
    threads = 2 if len(first) <= _SIDE_BY_SIDE else 0
    with _one_thread(), closing(in_order(lambda pair: _cross_validated(*pair), pairs, threads)) as found:
        by_draws = math.prod(found) ** 0.5 / 2  # H has twice the draws of a half
    return by_draws * max(1.0, _ENOUGH_BANDS / num_bands) ** 2


def _cross_validated(known: Float64[Tensor, "d d"], other: Float64[Tensor, "d d"]) -> float:
    """Return the damping of `known` that makes Gaussian vectors with the second moment `other` most likely.

    The factor of the covariance is the best at each damping.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(known)
    moments = (eigenvectors * (other @ eigenvectors)).sum(0)
    damped = eigenvalues.clamp(min=0) + DAMPINGS[:, None] * eigenvalues.mean()
    surprise = damped.log().mean(1) + (moments / damped).mean(1).log()
    return float(DAMPINGS[surprise.argmin()])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread for each call: the last bits of an eigenvector depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _gram(vectors: Float64[Tensor, "examples vectors d"]) -> Float64[Tensor, "d d"]:
    """Return the sum of outer products."""
    flat = vectors.flatten(0, 1)
    return flat.T @ flat


def _has_one_draw(store: FeatureStore) -> bool:
    """Return whether an example has a single vector, which leaves nothing to compare."""
    return int(store.manifest["config"]["num_bands"]) * int(store.manifest["num_replicates"]) == 1


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
        values, vectors = tensors["eigenvalues"], tensors["eigenvectors"]
        if vectors.shape != (len(values), len(values)) or {values.dtype, vectors.dtype} != {torch.float64}:
            raise ValueError(f"eigenvectors of shape {list(vectors.shape)}, in {vectors.dtype}")
        if not (values.isfinite().all() and vectors.isfinite().all()):
            raise ValueError("it holds NaN or infinity")
        return Kernel(eigenvalues=values, eigenvectors=vectors, **about)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as err:
        raise StoreCorruptError(f"{path} is damaged: {err}; run `carv-attrib index`.") from err
