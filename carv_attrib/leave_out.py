"""How scores vary with the random projection: its coordinates, left out in groups (`docs/method.md`, eq. (10'''))."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from carv_attrib.kernel import Kernel


class LeaveOut:
    """A jackknife over groups of coordinates, whose squares sum to the variance of scores over projections.

    Leaving a group S out of query, examples and kernel changes `q A x` by `(A q)_S (A_SS)^-1 (A x)_S`, exactly, at the
    same lambda. Coordinates that share random numbers must be left out together; where they share some with one
    family of groups and some with another, both are needed, and what they share with none would count twice.
    """

    def __init__(self, kernel: Kernel, inverse: Float64[Tensor, " d"], families: Int64[Tensor, "families d"]) -> None:
        """Prepare a kernel and a damping.

        Args:
            kernel: of the scores.
            inverse: diagonal of its preconditioner.
            families: groups of coordinates by number, as `Projector.families` has them.
        """
        self._inverse = inverse
        rows, spread = kernel.eigenvectors, inverse.square() * kernel.eigenvalues  # A H A
        self._families: list[list[tuple[Tensor, Tensor]]] = []
        expected = 0.0
        for family in families:
            groups = [rows[family == number] for number in family.unique()]
            factors = [torch.linalg.cholesky((own * inverse) @ own.T) for own in groups]
            for own, factor in zip(groups, factors, strict=True):
                ratio = torch.cholesky_solve((own * spread) @ own.T, factor)
                expected += float((ratio * ratio.T).sum()) * (1 - 1 / len(groups)) ** 2
            self._families.append(list(zip(groups, factors, strict=True)))
        alone = float(((rows.square() @ spread) / (rows.square() @ inverse)).square().sum())
        self._once = 1 - (len(families) - 1) * alone / expected if len(families) > 1 else 1.0

    def of(self, query: Float64[Tensor, "queries bands d"]) -> Float64[Tensor, "queries bands groups d"]:
        """Return vectors whose inner products with an example are the deviations of its score.

        Args:
            query: features in the eigenbasis, without the preconditioner; the result and the example are there too.
        """
        none = query.new_zeros(*query.shape[:2], 0, query.shape[2])
        return torch.cat([none, *self._deviations(query * self._inverse)], 2)

    def lasting(
        self,
        query: Float64[Tensor, "queries bands replicates d"],
        examples: Float64[Tensor, "examples bands replicates d"],
    ) -> Float64[Tensor, "queries bands groups d"]:
        """Return what `of` does, less what other draws would not have, which is in the errors of the draws already.

        How much that is of the squares is judged by the products of unlike replicates (of unlike bands, where these
        have one), over some examples.
        """
        left_out = self.of(query.mean(2))
        return left_out * self._lasting_share(query, examples, left_out).sqrt().view(-1, 1, 1, 1)

    def _lasting_share(self, query: Tensor, examples: Tensor, left_out: Tensor) -> Float64[Tensor, " queries"]:
        """Return the share of the squares that unlike replicates have in common."""
        whole = _products(left_out, examples.mean(2)).mean(0)
        if query.shape[2] > 1:
            pairs = zip(query.unbind(2), examples.unbind(2), strict=True)
            each = torch.stack([_products(self.of(own), other).mean(0) for own, other in pairs])
        else:
            each = _products(left_out, examples[:, :, 0])
        if len(each) == 1:
            return torch.ones(len(query), dtype=query.dtype)
        unlike = (each.sum(0).square() - each.square().sum(0)) / (len(each) * (len(each) - 1))
        shares: Tensor = unlike.sum((0, 2)) / whole.square().sum((0, 2)).clamp(min=1e-300)
        return shares.clamp(0, 1)

    def _deviations(self, query: Tensor) -> Iterator[Tensor]:
        """Yield those of each family of groups."""
        for groups in self._families:
            changes = [torch.cholesky_solve((query @ own.T).flatten(0, 1).T, factor).T @ own for own, factor in groups]
            moved = torch.stack(changes, 1).view(*query.shape[:2], len(groups), -1) * self._inverse
            yield (moved - moved.mean(2, keepdim=True)) * (self._once * (1 - 1 / len(groups))) ** 0.5


def _products(left_out: Tensor, examples: Tensor) -> Float64[Tensor, "bands groups queries examples"]:
    """Return the deviations of the scores of each band."""
    return torch.einsum("qbgd,nbd->bgqn", left_out, examples)
