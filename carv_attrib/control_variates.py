"""What all examples of a dataset have in common at a draw, used as a control variate for each of them.

With shared draws, errors of neighbouring examples are alike: at the same (timestep, noise), gradients of similar
pictures are similar. A regression over the dataset finds that common error, and a few independent draws of each
example, which as many examples average out, say what to put in its place (`docs/method.md`, eq. (6')).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from carv_attrib.errors import ArgumentError


def regression_basis(
    latents: Float[Tensor, "examples *latent"],
    labels: Int[Tensor, " examples"] | None = None,
    num_components: int = 16,
) -> Float[Tensor, "examples regressors"]:
    """Return an orthonormal basis of functions of an example: its class, or a constant, and principal components.

    Raises:
        ArgumentError: for fewer than twice as many examples as regressors.
    """
    flat = latents.flatten(1).double()
    components = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)[0][:, :num_components]
    if labels is None:
        constant = torch.ones(len(flat), 1, dtype=torch.float64)
    else:
        constant = torch.nn.functional.one_hot(labels.unique(return_inverse=True)[1]).double()
    regressors = torch.cat([constant, components], dim=1)
    if 2 * regressors.shape[1] > len(regressors):
        raise ArgumentError(
            f"`num_components` must leave two examples for each regressor, got {regressors.shape[1]} regressors "
            f"for {len(regressors)} examples; use fewer components."
        )
    basis: Tensor = torch.linalg.qr(regressors)[0]
    return basis


def replace_common_part(
    shared: Float[Tensor, "examples dims"],
    independent: Float[Tensor, "examples dims"],
    basis: Float[Tensor, "examples regressors"],
) -> Float[Tensor, "examples dims"]:
    """Return `(1 - S) shared + S independent`, with S = basis basis^T the projection on functions of the example.

    Unbiased if both estimates are, since S depends on no draw. Its variance is that of what S leaves of the shared
    error, plus that of the independent estimate times the regressors per example: with p regressors and n examples,
    `V_independent p / n` on average.

    Args:
        shared: an estimate of each example's vector from draws that all examples share.
        independent: another, as rough as one likes, from draws of its own for each example.
        basis: of `regression_basis`.
    """
    basis = basis.to(shared)
    return shared - basis @ (basis.T @ (shared - independent))
