"""What examples of a dataset have in common at a draw, used as a control variate for each of them.

With shared draws, errors of like examples are alike: at the same (timestep, noise), gradients of similar pictures are
similar. A smoother over the dataset finds that common error, and a few independent draws of each example, which many
examples average out, say what to put in its place (`docs/method.md`, eq. (6')).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from carv_attrib.errors import ArgumentError


def smoother_factor(
    latents: Float[Tensor, "examples ..."],
    labels: Int[Tensor, " examples"] | None = None,
    *,
    ridge: float,
    num_landmarks: int = 1024,
) -> Float[Tensor, "examples landmarks"]:
    """Return A with `A A^T = C (C + ridge I)^{-1}`, kernel ridge regression of a function of the examples.

    C is a model of how alike the errors of two examples are: Gaussian in the distance of their latents, with the median
    squared distance as its scale, and half as much between classes. If it is right, the best `ridge` is the number of
    shared draws over that of independent ones, so that there is nothing to tune. Examples are compared with the first
    `num_landmarks` of them (Nyström), in O(examples * landmarks^2) time.

    Raises:
        ArgumentError: if `ridge` is not positive.
    """
    if not 0 < ridge < float("inf"):
        raise ArgumentError(f"`ridge` must be positive, got {ridge}; use shared over independent draws.")
    flat = latents.flatten(1).double()
    squares = torch.cdist(flat, flat[:num_landmarks]).square()
    alike = torch.exp(-squares / squares.median().clamp(min=1e-300))
    if labels is not None:
        alike = alike * torch.where(labels[:, None] == labels[None, :num_landmarks], 1.0, 0.5)
    eigenvalues, eigenvectors = torch.linalg.eigh(alike[:num_landmarks])
    kept = eigenvalues > 1e-10 * eigenvalues[-1]
    features = alike @ (eigenvectors[:, kept] / eigenvalues[kept].sqrt())  # their inner products are C
    basis, scales, _ = torch.linalg.svd(features, full_matrices=False)
    factor: Tensor = basis * (scales.square() / (scales.square() + ridge)).sqrt()
    return factor


def replace_common_part(
    shared: Float[Tensor, "examples dims"],
    independent: Float[Tensor, "examples dims"],
    factor: Float[Tensor, "examples landmarks"],
) -> Float[Tensor, "examples dims"]:
    """Return `(1 - S) shared + S independent`, with S = factor factor^T.

    Unbiased if both estimates are, since S depends on no draw. The variance is that of what S leaves of the shared
    error, and `(S S^T)_ii` of the independent estimate's.

    Args:
        shared: an estimate of each example's vector from draws that all examples share.
        independent: another, as rough as one likes, from draws of its own for each example.
        factor: of `smoother_factor`.
    """
    factor = factor.to(shared)
    return shared - factor @ (factor.T @ (shared - independent))
