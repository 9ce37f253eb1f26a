"""The preconditioner of the scores, `(H + lambda I)^{-1}` (`docs/method.md`, eq. (9) and (9')), in float64."""

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

KernelKind = Literal["bands", "means"]
ScoreKind = Literal["preconditioned", "dot", "cosine", "preconditioned-cosine"]

Damping = float | Literal["auto"]

DEFAULT_DAMPING = 0.1
"""What `auto` is where H is of too few examples to choose it: in pilots."""
_LEAST_SHRINKAGE = 1e-6  # keeps lambda positive and finite


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

    def banded(
        self, features: Float[Tensor, "*examples bands replicates d"]
    ) -> Float64[Tensor, "*examples kept_bands replicates d"]:
        """Return the features that this kernel scores, in its eigenbasis: bands, or their mean as one band."""
        rotated = features.double() @ self.eigenvectors
        return rotated if self.kind == "bands" else rotated.mean(-3, keepdim=True)

    def refined(self, vectors: Float64[Tensor, "examples vectors d"]) -> Kernel:
        """Return the kernel of scores that have other draws than this one's, from those draws of a few examples.

        Gradients are whitened well only by an H that has seen the same draws; of few examples it is noisy. So H is the
        mean of both, and `auto` is chosen from the few.
        """
        flat = vectors.flatten(0, 1)
        fresh = flat.T @ flat / len(flat)
        known = (self.eigenvectors * self.eigenvalues) @ self.eigenvectors.T
        squares = (vectors @ vectors.transpose(1, 2)).square().sum((1, 2)) / vectors.shape[1] ** 2
        auto_damping = choose_damping(fresh, float(squares.mean()), len(vectors))
        return decompose((fresh + known) / 2 * len(flat), len(flat), self.kind, auto_damping)

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
            "use `kernel` bands, or featurize with fewer `num_bands`."
        )
    gram: Tensor = torch.zeros(())
    num_examples, num_vectors, squares = 0, 0, 0.0
    for vectors in _replicates(store) if kind == "bands" else _means(store):
        flat = vectors.flatten(0, 1)
        gram = gram + flat.T @ flat
        num_examples, num_vectors = num_examples + len(vectors), num_vectors + len(flat)
        squares += float((vectors @ vectors.transpose(1, 2)).square().sum()) / vectors.shape[1] ** 2
    if num_vectors == 0:
        raise StoreError(f"{store.path} holds no features yet; run featurize first.")
    return decompose(gram, num_vectors, kind, choose_damping(gram / num_vectors, squares / num_examples, num_examples))


def decompose(
    gram: Float64[Tensor, "d d"], num_vectors: int, kind: KernelKind = "bands", auto_damping: float = DEFAULT_DAMPING
) -> Kernel:
    """Return the kernel whose H is `gram / num_vectors`, a mean of outer products."""
    with _one_thread():
        eigenvalues, eigenvectors = torch.linalg.eigh(gram / num_vectors)
    return Kernel(kind, eigenvalues.clamp(min=0), eigenvectors, num_vectors, auto_damping)


def choose_damping(hessian: Float64[Tensor, "d d"], mean_square: float, num_examples: int) -> float:
    """Return the damping whose `H + lambda I` has the shape of the best estimate of H's expectation (eq. (9')).

    H is the mean over n examples of `M_i`, the mean outer product of an example's vectors. Of all
    `(1 - rho) H + rho mu I`, with mu the mean eigenvalue, the one nearest to H's expectation has
    `rho = sum of the variances of H's entries / ||H - mu I||^2` (Ledoit and Wolf 2004, for a mean that is known to be
    zero, over examples and not over their vectors, which are not independent). The order of scores does not depend on
    the scale, which leaves `lambda = rho / (1 - rho)` times mu.

    Args:
        hessian: H.
        mean_square: mean over examples of the squared Frobenius norm of `M_i`.
        num_examples: n.
    """
    size, square = len(hessian), float(hessian.square().sum())
    distance = square - float(hessian.trace()) ** 2 / size
    noise = (mean_square - square) / num_examples
    rho = noise / distance if distance > 0 else 1.0
    return min(max(rho, _LEAST_SHRINKAGE) / max(1 - rho, _LEAST_SHRINKAGE), 1 / _LEAST_SHRINKAGE)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread: the last bits of an eigenvector depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _replicates(store: FeatureStore) -> Iterable[Float64[Tensor, "examples vectors d"]]:
    """Yield the replicates of all bands of all examples."""
    for part in store.parts:
        yield store.read_part(part).features.double().flatten(1, 2)


def _means(store: FeatureStore) -> Iterable[Float64[Tensor, "examples one d"]]:
    """Yield the draw-averaged features of all examples."""
    for part in store.parts:
        yield store.read_part(part).features.double().mean((1, 2)).unsqueeze(1)


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
        return Kernel(eigenvalues=tensors["eigenvalues"], eigenvectors=tensors["eigenvectors"], **about)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as err:
        raise StoreCorruptError(f"{path} is damaged: {err}; run `carv-attrib index`.") from err
