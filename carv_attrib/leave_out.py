"""How scores vary with the random projection: its coordinates, left out in groups (`docs/method.md`, eq. (10'''))."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from carv_attrib.kernel import Kernel
from carv_attrib.projection.layer import NUM_GROUPS

_NUM_ASKED = 16  # examples that stand for queries, to judge what lasts


class LeaveOut:
    """A jackknife over groups of coordinates, whose squares sum to the variance of scores over projections.

    Leaving a group S out of query, examples and kernel changes `q A x` by `(A q)_S (A_SS)^-1 (A x)_S`, exactly, at the
    same lambda. Coordinates that share random numbers must be left out together; where they share some with one
    family of groups and some with another, both are needed, and what they share with none would count twice. What
    other draws would not have is in the errors of the draws, and must not be counted either.
    """

    def __init__(
        self,
        kernel: Kernel,
        inverse: Float64[Tensor, " d"],
        families: Int64[Tensor, "families d"],
        examples: Float[Tensor, "examples bands replicates d"],
    ) -> None:
        """Prepare a kernel and a damping.

        Args:
            kernel: of the scores.
            inverse: diagonal of its preconditioner.
            families: groups of coordinates by number, as `Projector.families` has them.
            examples: features of some examples, as `Kernel.averaged` returns them.
        """
        self._rows, self._inverse = kernel.eigenvectors, inverse
        spread = inverse.square() * kernel.eigenvalues  # A H A
        self._families: list[list[tuple[int, Tensor, Tensor]]] = []
        expected = 0.0
        for family in families:
            groups = []
            for number in range(NUM_GROUPS):
                chosen = (family == number).nonzero()[:, 0]
                if len(chosen) == 0:
                    continue
                own = self._rows[chosen]
                factor = torch.linalg.cholesky((own * inverse) @ own.T)
                ratio = torch.cholesky_solve((own * spread) @ own.T, factor)
                expected += float((ratio * ratio.T).sum())
                groups.append((number, chosen, factor))
            self._families.append(groups)
        alone = (self._rows.square() @ spread) / (self._rows.square() @ inverse)
        in_all = alone[(families >= 0).all(0)].square().sum()
        once = 1 - (len(families) - 1) * float(in_all) / expected if expected else 0.0
        self._scale = once**0.5
        self._scale *= self._lasting_share(examples.double() @ self._rows) ** 0.5

    def of(self, query: Float64[Tensor, "queries bands d"]) -> Float64[Tensor, "queries bands groups d"]:
        """Return vectors whose inner products with an example are the deviations of its score in a band.

        Args:
            query: features in the eigenbasis, without the preconditioner; the result and the example are there too.
        """
        query = query * self._inverse
        found: Tensor = query.new_zeros(*query.shape[:2], len(self._families), NUM_GROUPS, query.shape[2])
        for family, groups in enumerate(self._families):
            if len(groups) < 2:
                continue
            for number, chosen, factor in groups:
                own = self._rows[chosen]
                change = torch.cholesky_solve((query @ own.T).flatten(0, 1).T, factor).T @ own
                found[:, :, family, number] = change.view_as(query) * self._inverse
            numbers = [number for number, _, _ in groups]
            sizes = torch.tensor([len(chosen) for _, chosen, _ in groups]).double()
            means = found[:, :, family].sum(2, keepdim=True) * (sizes / sizes.sum())[:, None]
            found[:, :, family, numbers] = (found[:, :, family, numbers] - means) * (1 - 1 / len(groups)) ** 0.5
        found = found.flatten(2, 3) * self._scale
        return found

    def _lasting_share(self, examples: Float64[Tensor, "examples bands replicates d"]) -> float:
        """Return the share of the squares that unlike replicates have in common: what other draws would have too.

        Unlike bands, where these have one replicate. Some of the examples stand for queries.
        """
        num_asked = min(_NUM_ASKED, len(examples) // 2)
        query, train = examples[:num_asked], examples[num_asked:]

        def deviations(left_out: Tensor, other: Tensor) -> Float64[Tensor, "bands groups queries examples"]:
            return torch.einsum("qbgd,nbd->bgqn", left_out, other)

        found, total = [], torch.zeros(())
        for own, other in zip(query.unbind(2), train.unbind(2), strict=True):
            left_out = self.of(own)
            total = total + left_out
            found.append(deviations(left_out, other))
        each = torch.stack([bands.mean(0) for bands in found]) if len(found) > 1 else found[0]
        whole = deviations(total / len(found), train.mean(2)).mean(0).square().sum()
        if len(each) == 1 or not whole > 0:
            return 1.0
        unlike = (each.sum(0).square() - each.square().sum(0)).sum() / (len(each) * (len(each) - 1))
        return float((unlike / whole).clamp(0, 1))
