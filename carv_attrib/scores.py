"""Scores band by band, their Monte-Carlo errors, and what is known of a ranking (`docs/method.md`, eq. (9), (10))."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int, Int64
from scipy.stats import t as student_t
from torch import Tensor

from carv_attrib.seeding import stream

CONFIDENCE = 0.9
"""Of the intervals that are reported; their coverage is measured (`docs/benchmarks.md`)."""
NUM_RESAMPLES = 1000
_CHUNK = 50  # resamples at a time


@dataclass(frozen=True)
class BandScores:
    """Scores of queries and training examples in every band, and what is known of their errors.

    All tensors are linear in the training examples: sums over groups of them are `BandScores` too, and so are means
    over checkpoints and choices of bands.

    Attributes:
        bands: scores in each band; the score is their mean.
        crossed: with two replicates, halves of three contrasts of their four products: between those of like
            replicates, between those of unlike ones, and of like less unlike ones; None where a band has one replicate,
            or replicates that are not independent.
        projection: what leaving out each group of coordinates of the projection does to the score, scaled so that its
            squares sum to the variance over projections; None where it is not known.
        spread: whether, with one replicate, the differences between bands may stand in for them.
    """

    bands: Float64[Tensor, "bands queries train"]
    crossed: Float64[Tensor, "3 bands queries train"] | None = None
    projection: Float64[Tensor, "groups queries train"] | None = None
    spread: bool = True

    @cached_property
    def scores(self) -> Float64[Tensor, "queries train"]:
        """Means over bands."""
        return self.bands.mean(0)

    @cached_property
    def draw_deviations(self) -> Float64[Tensor, "deviations queries train"]:
        """Independent parts of the error from the draws, which all examples share; none where nothing is known.

        With two replicates of each band, eq. (10); with one, (10'), the deviations of bands from their mean, which also
        hold the trend over timesteps.
        """
        num_bands = len(self.bands)
        if self.crossed is not None:
            return self._crossed_deviations(self.crossed)
        if not self.spread or num_bands == 1:
            return self.bands[:0]
        parts: Tensor = (self.bands - self.scores) / (num_bands * (num_bands - 1)) ** 0.5
        return parts

    def _crossed_deviations(self, crossed: Float64[Tensor, "3 bands queries train"]) -> Tensor:
        """Return the parts that are known from products of two replicates, of the variance of eq. (10)."""
        num_bands = len(self.bands)
        parts: Tensor = crossed[:2].flatten(0, 1) / num_bands
        alike, unlike = torch.stack(parts.square().chunk(2)).sum(1)
        excess = crossed[2].var(0) / num_bands if num_bands > 1 else torch.zeros_like(alike)
        both = alike + unlike
        variance = torch.stack([both / 2 - excess / 4, alike - 3 * excess / 4, (both + excess) / 8]).amax(0)
        parts = parts * (variance / both.clamp(min=1e-300)).sqrt()
        return parts

    @cached_property
    def deviations(self) -> Float64[Tensor, "deviations queries train"]:
        """Independent parts of the error of a score, from the draws and from the projection."""
        own = self.draw_deviations
        return own if self.projection is None else torch.cat([own, self.projection])

    @property
    def standard_errors(self) -> Float64[Tensor, "queries train"]:
        """Standard errors of the scores, over the draws and the projection; NaN where nothing is known of the draws."""
        if self.degrees_of_freedom == 0:
            return torch.full_like(self.scores, float("nan"))
        return (self.draw_deviations.square().sum(0) + self.projection_errors.square()).sqrt()

    @property
    def projection_errors(self) -> Float64[Tensor, "queries train"]:
        """Standard errors over the projection alone, which more draws do not lower; zero if it is not known."""
        if self.projection is None:
            return torch.zeros_like(self.scores)
        return self.projection.square().sum(0).sqrt()

    @property
    def degrees_of_freedom(self) -> int:
        """Number of independent squares in the part of a standard error that is from the draws."""
        if self.crossed is not None:
            return len(self.bands)
        return len(self.bands) - 1 if self.spread else 0

    @property
    def effective_degrees_of_freedom(self) -> Float64[Tensor, "queries train"]:
        """Satterthwaite's: fewer than the squares, where some of them have most of the variance (eq. (10''))."""
        variance = self.draw_deviations.square().sum(0)
        found = self._draw_degrees_of_freedom()
        if self.projection is None:
            return found
        other = self.projection.square().sum(0)
        together = variance.square() / found + other.square() / (len(self.projection) - 2)
        return ((variance + other).square() / together.clamp(min=1e-300)).clamp(min=1)

    def _draw_degrees_of_freedom(self) -> Float64[Tensor, "queries train"]:
        """Return those of the part that is from the draws."""
        if self.crossed is None:
            return torch.full_like(self.scores, float(self.degrees_of_freedom))
        squares = self.draw_deviations.square()
        kinds = torch.stack(squares.chunk(2)).sum(1)
        most = self.degrees_of_freedom * kinds.sum(0).square() / kinds.square().sum(0).clamp(min=1e-300)
        ratio = squares.sum(0).square() / squares.square().sum(0).clamp(min=1e-300)
        return (3 * ratio - 2).clamp(min=1).minimum(most.clamp(min=1))

    @property
    def half_widths(self) -> Float64[Tensor, "queries train"]:
        """Half the widths of `CONFIDENCE` intervals: standard errors times a quantile of Student's t."""
        quantiles = student_t.ppf((1 + CONFIDENCE) / 2, self.effective_degrees_of_freedom.numpy())
        return self.standard_errors * torch.from_numpy(quantiles)

    def scaled(self, factor: float | Tensor) -> BandScores:
        """Return the scores times a factor: one number, or one for each query and example."""
        return self._changed(lambda values: values * factor)

    def positive(self) -> BandScores:
        """Return the scores with zeros in place of those that are not positive."""
        return self.scaled((self.scores > 0).double())

    def shares(self) -> BandScores:
        """Return each column's share of the sum of all columns of its query, to first order in the errors.

        An error of the sum moves all shares. NaN where the sum is zero.
        """
        total = self.scores.sum(-1, keepdim=True)
        shares = self.scores / total

        def moved(errors: Tensor) -> Tensor:
            return (errors - shares * errors.sum(-1, keepdim=True)) / total

        return replace(self._changed(moved), bands=shares + moved(self.bands - self.scores))

    def select(self, train: Int[np.ndarray, " selected"]) -> BandScores:
        """Return the scores of some training examples, in the given order."""
        return self._changed(lambda values: values[..., train])

    def add_up(self, groups: Int64[Tensor, " train"], num_groups: int) -> BandScores:
        """Return the sums of the scores of the examples of each group, whose errors add up with their signs."""
        return self._changed(
            lambda values: torch.zeros(*values.shape[:-1], num_groups, dtype=values.dtype).index_add_(
                -1, groups, values
            )
        )

    def __add__(self, other: BandScores) -> BandScores:
        """Return sums of scores of the same columns."""
        return _combined([self, other], lambda values: torch.stack(values).sum(0))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> BandScores:
        """Return the same with all tensors changed alike, by a function that is linear in the training examples."""
        return _combined([self], lambda values: change(values[0]))

    def top_probabilities(self, top_k: int) -> Float64[Tensor, "queries train"]:
        """Return the probability that each example is among the `top_k` with the largest expected scores.

        The share of resamples in which it is: each adds the deviations times normal numbers that are the same for all
        examples, as their draws are. NaN where there are no deviations.
        """
        if self.degrees_of_freedom == 0:
            return torch.full_like(self.scores, float("nan"))
        generator = stream(0, "resamples of scores")
        counts = torch.zeros_like(self.scores)
        for _ in range(NUM_RESAMPLES // _CHUNK):
            weights = torch.from_numpy(generator.standard_normal((_CHUNK, len(self.deviations))))
            resampled = self.scores + torch.einsum("md,dqn->mqn", weights, self.deviations)
            best = resampled.topk(min(top_k, resampled.shape[2]), dim=2).indices
            counts += torch.zeros_like(resampled).scatter_(2, best, 1.0).sum(0)
        return counts / NUM_RESAMPLES


def score_bands(
    query: Float64[Tensor, "queries bands replicates d"],
    train: Float64[Tensor, "train bands replicates d"],
    inverse: Float64[Tensor, "*bands d"],
    left_out: Float64[Tensor, "queries bands groups d"] | None = None,
    *,
    normalise: bool = False,
    independent: bool = True,
) -> BandScores:
    """Return the scores of features in the kernel's eigenbasis, band by band, and what is known of their errors.

    Args:
        query: features of queries.
        train: features of training examples.
        inverse: diagonal of the preconditioner, of each band or of all.
        left_out: of the queries, as `LeaveOut.of` returns it; None: no errors from the projection.
        normalise: divide by the norms, for cosines; they are taken as fixed.
        independent: whether replicates, and bands, are of independent draws.
    """
    unweighted, query = query, query * inverse.unsqueeze(-2)
    query_mean, train_mean = query.mean(2), train.mean(2)
    bands = torch.einsum("qbd,nbd->bqn", query_mean, train_mean)
    projection = None if left_out is None else torch.einsum("qbgd,nbd->gqn", left_out, train_mean) / len(bands)
    crossed = None
    if independent and train.shape[2] == 2:
        like, unlike = (torch.einsum("qbrd,nbrd->rbqn", side, train) for side in (query, query.flip(2)))
        crossed = torch.stack([like[0] - like[1], unlike[0] - unlike[1], (like - unlike).sum(0)]) / 2
    found = BandScores(bands, crossed, projection, spread=independent)
    if not normalise:
        return found
    norms = [(x.mean(2).square() * inverse).sum(2).mean(1).sqrt().clamp(min=1e-300) for x in (unweighted, train)]
    return found.scaled(1 / (norms[0][:, None] * norms[1]))


def join(parts: list[BandScores]) -> BandScores:
    """Return the scores of all training examples, from those of parts of them."""
    return _combined(parts, lambda values: torch.cat(values, dim=-1))


def mean(members: Sequence[BandScores]) -> BandScores:
    """Return the mean of scores of the same examples by several teachers, whose draws, and errors, go together."""
    first, *others = members
    return sum(others, start=first).scaled(1 / len(members)) if others else first


def _combined(parts: Sequence[BandScores], combine: Callable[[list[Tensor]], Tensor]) -> BandScores:
    """Return scores whose tensors are those of the parts combined, of those that all parts have."""
    found: dict[str, Any] = {}
    for name in ("bands", "crossed", "projection"):
        values = [getattr(part, name) for part in parts]
        found[name] = None if any(value is None for value in values) else combine(values)
    return BandScores(spread=parts[0].spread, **found)
