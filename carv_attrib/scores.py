"""Scores band by band, their Monte-Carlo errors, and what is known of a ranking (`docs/method.md`, eq. (9), (10))."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

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
    """Scores of queries and training examples in every band, and what each group of draws adds to them.

    Everything is linear in the training examples: sums over groups of them are `BandScores` too, and so are means over
    checkpoints and choices of bands.

    Attributes:
        bands: scores in each band; the score is their mean.
        influences: of each replicate of each band on the score of the band, in the mean zero over replicates; None
            where a band has one replicate, or replicates that are not independent.
        spread: whether, without influences, the differences between bands may stand in for them.
    """

    bands: Float64[Tensor, "bands queries train"]
    influences: Float64[Tensor, "replicates bands queries train"] | None
    spread: bool = True

    @cached_property
    def scores(self) -> Float64[Tensor, "queries train"]:
        """Means over bands."""
        return self.bands.mean(0)

    @cached_property
    def deviations(self) -> Float64[Tensor, "deviations queries train"]:
        """Independent parts of the error of a score, the same draws for all examples; none where nothing is known.

        With R replicates of each of B bands, a jackknife over replicates; with one replicate, the deviations of bands
        from their mean, which also hold the trend over timesteps.
        """
        num_bands = len(self.bands)
        parts: Tensor = self.bands[:0]
        if self.influences is not None:
            replicates = len(self.influences)
            parts = self.influences.flatten(0, 1) / (num_bands * (replicates * (replicates - 1)) ** 0.5)
        elif self.spread and num_bands > 1:
            parts = (self.bands - self.scores) / (num_bands * (num_bands - 1)) ** 0.5
        return parts

    @property
    def standard_errors(self) -> Float64[Tensor, "queries train"]:
        """Monte-Carlo standard errors of the scores, over the draws; NaN where nothing is known of them."""
        if self.degrees_of_freedom == 0:
            return torch.full_like(self.scores, float("nan"))
        return self.deviations.square().sum(0).sqrt()

    @property
    def degrees_of_freedom(self) -> int:
        """Number of independent squares in a standard error."""
        if self.influences is not None:
            return len(self.bands) * (len(self.influences) - 1)
        return len(self.bands) - 1 if self.spread else 0

    @property
    def effective_degrees_of_freedom(self) -> Float64[Tensor, "queries train"]:
        """Satterthwaite's: fewer than the squares, where some bands have most of the variance (eq. (10''))."""
        if self.influences is None:
            return torch.full_like(self.scores, float(self.degrees_of_freedom))
        of_band = len(self.influences) - 1
        variances = self.influences.square().sum(0)
        ratio = variances.sum(0).square() / variances.square().sum(0).clamp(min=1e-300)
        return ((of_band + 2) * ratio - 2).clamp(of_band, self.degrees_of_freedom)

    @property
    def half_widths(self) -> Float64[Tensor, "queries train"]:
        """Half the widths of `CONFIDENCE` intervals: standard errors times a quantile of Student's t."""
        quantiles = student_t.ppf((1 + CONFIDENCE) / 2, self.effective_degrees_of_freedom.numpy())
        return self.standard_errors * torch.from_numpy(quantiles)

    def scaled(self, factor: float | Tensor) -> BandScores:
        """Return the scores times a factor: one number, or one for each query and example."""
        influences = None if self.influences is None else self.influences * factor
        return BandScores(self.bands * factor, influences, self.spread)

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

        influences = None if self.influences is None else moved(self.influences)
        return BandScores(shares + moved(self.bands - self.scores), influences, self.spread)

    def select(self, train: Int[np.ndarray, " selected"]) -> BandScores:
        """Return the scores of some training examples, in the given order."""
        influences = None if self.influences is None else self.influences[..., train]
        return BandScores(self.bands[..., train], influences, self.spread)

    def add_up(self, groups: Int64[Tensor, " train"], num_groups: int) -> BandScores:
        """Return the sums of the scores of the examples of each group, whose errors add up with their signs."""

        def sums(values: Tensor) -> Tensor:
            return torch.zeros(*values.shape[:-1], num_groups, dtype=values.dtype).index_add_(-1, groups, values)

        influences = None if self.influences is None else sums(self.influences)
        return BandScores(sums(self.bands), influences, self.spread)

    def __add__(self, other: BandScores) -> BandScores:
        """Return sums of scores of the same columns."""
        influences = None
        if self.influences is not None and other.influences is not None:
            influences = self.influences + other.influences
        return BandScores(self.bands + other.bands, influences, self.spread)

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
    inverse: Float64[Tensor, " d"],
    *,
    normalise: bool = False,
    independent: bool = True,
) -> BandScores:
    """Return the scores of features in the kernel's eigenbasis, band by band, with the influence of each replicate.

    With means over replicates q and t, the influence of replicate r on `q . t` is `q_r . t + q . t_r - 2 q . t`.

    Args:
        query: features of queries.
        train: features of training examples.
        inverse: diagonal of the preconditioner.
        normalise: divide by the norms, for cosines.
        independent: whether replicates, and bands, are of independent draws.
    """
    num_bands, num_replicates = train.shape[1:3]
    query, train = query * inverse.sqrt(), train * inverse.sqrt()
    if normalise:
        query, train = (
            x / x.mean(2).flatten(1).norm(dim=1).clamp(min=1e-300).view(-1, 1, 1, 1) for x in (query, train)
        )
        query, train = query * num_bands**0.5, train * num_bands**0.5
    query_mean, train_mean = query.mean(2), train.mean(2)
    bands = torch.einsum("qbd,nbd->bqn", query_mean, train_mean)
    if num_replicates == 1 or not independent:
        return BandScores(bands, None, spread=independent)
    influences = torch.einsum("qbrd,nbd->rbqn", query, train_mean) + torch.einsum("qbd,nbrd->rbqn", query_mean, train)
    return BandScores(bands, influences - 2 * bands)


def join(parts: list[BandScores]) -> BandScores:
    """Return the scores of all training examples, from those of parts of them."""
    first = parts[0]
    influences = None
    if first.influences is not None:
        influences = torch.cat([part.influences for part in parts if part.influences is not None], dim=3)
    return BandScores(torch.cat([part.bands for part in parts], dim=2), influences, first.spread)


def mean(members: Sequence[BandScores]) -> BandScores:
    """Return the mean of scores of the same examples by several teachers, whose draws, and errors, go together."""
    first, *others = members
    return sum(others, start=first).scaled(1 / len(members)) if others else first
