"""How scores vary with the random projection: its coordinates, left out in groups (`docs/method.md`, eq. (10'''))."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from carv_attrib.kernel import Kernel
from carv_attrib.projection.layer import NUM_GROUPS

_NUM_ASKED = 16  # examples that stand for queries, to judge what lasts


@dataclass(frozen=True)
class _Group:
    """Coordinates that are left out together.

    Attributes:
        number: of the group.
        places: of its coordinates in each block.
        chosen: whether a block has so many.
        factor: of `A_SS` in each block, with ones for those that are not there.
    """

    number: int
    places: Int64[Tensor, "blocks most"]
    chosen: Bool[Tensor, "blocks most"]
    factor: Float64[Tensor, "bands blocks most most"]


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
        inverse: Float64[Tensor, "bands d"],
        families: Int64[Tensor, "families d"],
        examples: Float[Tensor, "examples all_bands replicates d"],
    ) -> None:
        """Prepare a kernel and a damping.

        Args:
            kernel: of the scores.
            inverse: diagonal of its preconditioner.
            families: groups of coordinates by number, as `Projector.families` has them.
            examples: features of some examples.
        """
        self._rows = kernel.eigenvectors  # a row for each coordinate
        self._inverse = inverse.view_as(kernel.eigenvalues)
        spread = self._inverse.square() * kernel.eigenvalues  # A H A
        self._families: list[list[_Group]] = []
        expected = 0.0
        for family in families:
            of_blocks = family.view(kernel.eigenvalues.shape[1:])
            groups = [self._group(n, of_blocks == n) for n in range(NUM_GROUPS) if (family == n).any()]
            for group in groups:
                own = self._rows_of(group.places, group.chosen)
                ratio = torch.cholesky_solve((own * spread[:, :, None]) @ own.mT, group.factor)
                expected += float((ratio * ratio.mT).sum())
            self._families.append(groups)
        alone = (self._rows.square() @ spread[..., None]) / (self._rows.square() @ self._inverse[..., None])
        in_all = alone.flatten(1)[:, (families >= 0).all(0)].square().sum()
        once = 1 - (len(families) - 1) * float(in_all) / expected if expected else 0.0
        self._scale = once**0.5
        self._scale *= self._lasting_share(kernel.banded(examples)) ** 0.5

    def of(
        self, query: Float64[Tensor, "queries bands d"], window: slice = slice(None)
    ) -> Float64[Tensor, "queries bands groups d"]:
        """Return vectors whose inner products with an example are the deviations of its score in a band.

        Args:
            query: features in the eigenbasis, without the preconditioner; the result and the example are there too.
            window: the bands that these are of.
        """
        inverse = self._inverse[window]
        asked = query.view(len(query), *inverse.shape).permute(1, 2, 0, 3) * inverse[:, :, None]
        found: Tensor = query.new_zeros(*query.shape[:2], len(self._families), NUM_GROUPS, query.shape[2])
        for family, groups in enumerate(self._families):
            if len(groups) < 2:
                continue
            for group in groups:
                own = self._rows_of(group.places, group.chosen)[window]
                change = torch.cholesky_solve(own @ asked.mT, group.factor[window]).mT @ own * inverse[:, :, None]
                found[:, :, family, group.number] = change.permute(2, 0, 1, 3).flatten(2)
            numbers = [group.number for group in groups]
            sizes = torch.stack([group.chosen.sum() for group in groups]).double()
            means = found[:, :, family].sum(2, keepdim=True) * (sizes / sizes.sum())[:, None]
            found[:, :, family, numbers] = (found[:, :, family, numbers] - means) * (1 - 1 / len(groups)) ** 0.5
        found = found.flatten(2, 3) * self._scale
        return found

    def _group(self, number: int, members: Bool[Tensor, "blocks size"]) -> _Group:
        """Return a group, with what is needed to leave it out of each block."""
        most = int(members.sum(1).max())
        places = (~members).int().sort(dim=1, stable=True).indices[:, :most]
        chosen = members.gather(1, places)
        own = self._rows_of(places, chosen)
        product = (own * self._inverse[:, :, None]) @ own.mT + torch.diag_embed((~chosen).double())
        return _Group(number, places, chosen, torch.linalg.cholesky(product))

    def _rows_of(
        self, places: Int64[Tensor, "blocks most"], chosen: Bool[Tensor, "blocks most"]
    ) -> Float64[Tensor, "bands blocks most size"]:
        """Return the rows of coordinates; zeros where a block has fewer than another."""
        return self._rows[:, torch.arange(len(places))[:, None], places] * chosen[..., None]

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
