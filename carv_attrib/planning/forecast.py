"""What the replicates of a pilot foretell: error and score SNR of a scheme at any (R, K) (`docs/plan.md`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from carv_attrib.config import ProposalKind
from carv_attrib.sampling import Scheme
from carv_attrib.variance import Measured


@dataclass(frozen=True)
class Decay:
    """A Monte-Carlo variance that falls with the number of draws: `V(K) = first / K + second / K^2`.

    `first` is what independent draws inside strata leave; `second` what strata take away faster.
    """

    first: float
    second: float

    def __call__(self, num_draws: int) -> float:
        """Return `V(K)`."""
        return self.first / num_draws + self.second / num_draws**2


def fit_decay(num_draws: tuple[int, int], variances: tuple[float, float]) -> Decay:
    """Return the decay through two measured variances, neither coefficient below zero.

    Where one of them would be, the other alone is fitted, to the mean.

    >>> fit_decay((4, 16), (0.3125, 0.06640625))
    Decay(first=1.0, second=1.0)
    """
    (k, l), (v, w) = num_draws, variances  # noqa: E741
    second = (k * v - l * w) / (1 / k - 1 / l)
    first = l * w - second / l
    if second < 0:
        return Decay((k * v + l * w) / 2, 0.0)
    if first < 0:
        return Decay(0.0, (k * k * v + l * l * w) / 2)
    return Decay(first, second)


@dataclass(frozen=True)
class Moments:
    """What error and SNR of one scheme follow from; every expectation without bias.

    Attributes:
        pilot_draws: the two K that replicates were taken at.
        squared_norm: `|E f|^2` of the features f, a mean over examples.
        features: tr Cov of a feature at K draws, given the encoding.
        features_upstream: what one random encoding adds.
        scores: variance of a score at K draws, given the encodings.
        scores_upstream: what random encodings of both sides add.
        spread: covariances over examples of the expected scores at the first K with themselves, with those at the
            second, and of those with themselves; a mean over queries.
    """

    pilot_draws: tuple[int, int]
    squared_norm: float
    features: Decay
    features_upstream: float
    scores: Decay
    scores_upstream: float
    spread: tuple[float, float, float]

    def feature_variance(self, num_encodings: int, num_draws: int) -> float:
        """Return `(V_up + V(K)) / R`."""
        return (self.features_upstream + self.features(num_draws)) / num_encodings

    def feature_error(self, num_encodings: int, num_draws: int) -> float:
        """Return the Monte-Carlo standard error of a feature over its norm."""
        if self.squared_norm <= 0:
            return math.inf
        return math.sqrt(self.feature_variance(num_encodings, num_draws) / self.squared_norm)

    def score_snr(self, num_encodings: int, num_draws: int) -> float:
        """Return the spread of a query's expected scores over examples, over the standard error of a score.

        With shared draws the expected score is linear in one over the number of draws: a product of two means
        over n shared draws holds a share 1/n of their covariance.
        """
        k, l = self.pilot_draws  # noqa: E741
        share = (1 / (num_encodings * num_draws) - 1 / l) / (1 / k - 1 / l)
        spread = (
            share**2 * self.spread[0] + 2 * share * (1 - share) * self.spread[1] + (1 - share) ** 2 * self.spread[2]
        )
        variance = (self.scores_upstream + self.scores(num_draws)) / num_encodings
        return math.sqrt(max(spread, 0.0) / variance) if variance > 0 else math.inf


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to draw, with what the pilot says about it.

    Attributes:
        scheme: how draws depend on one another.
        proposal: what timesteps are drawn from.
        moments: from all replicates.
        left_out: from all replicates but one each, for jackknife standard errors.
    """

    scheme: Scheme
    proposal: ProposalKind
    moments: Moments
    left_out: Sequence[Moments]

    def measured(self, quantity: Callable[[Moments], float]) -> Measured:
        """Return a quantity and its jackknife standard error over replicates."""
        return Measured(quantity(self.moments), jackknife_error([quantity(moments) for moments in self.left_out]))

    def feature_error(self, num_encodings: int, num_draws: int) -> Measured:
        """Return the relative Monte-Carlo error of a feature."""
        return self.measured(lambda moments: moments.feature_error(num_encodings, num_draws))

    def score_snr(self, num_encodings: int, num_draws: int) -> Measured:
        """Return the signal-to-noise ratio of scores."""
        return self.measured(lambda moments: moments.score_snr(num_encodings, num_draws))


def jackknife_error(left_out: Sequence[float]) -> float:
    """Return the standard error of a quantity from its values with each replicate left out in turn (Tukey, 1958).

    >>> round(jackknife_error([2.0, 2.5, 3.0]), 3)  # the mean of 4, 3 and 2
    0.577
    """
    values = torch.tensor(left_out, dtype=torch.float64)
    return float(((len(values) - 1) * values.var(correction=0)).sqrt())


def sampling_variance(replicates: Float[Tensor, "replicates *items dims"]) -> float:
    """Return tr Cov over replicates, a mean over items."""
    return float(replicates.double().var(0).sum(-1).mean())


def mean_product(left: Float[Tensor, "replicates ..."], right: Float[Tensor, "replicates ..."]) -> float:
    """Return the mean over different replicates m, n of `<left_m, right_n>`: unbiased for `<E left, E right>`."""
    count = len(left)
    left, right = left.double().flatten(1), right.double().flatten(1)
    return float(left.sum(0) @ right.sum(0) - (left * right).sum()) / (count * (count - 1))


def upstream_variance(values: Float[Tensor, "draws encodings items dims"]) -> float:
    """Return tr Cov of the mean over draws that encodings cause, a mean over items, without bias; at least 0.

    The same draws serve all encodings, so that what draws do to all of them alike cancels; products of different
    draws hold no noise of either.
    """
    _, num_encodings, num_items, _ = values.shape
    centred = values.double() - values.double().mean(1, keepdim=True)
    return max(0.0, mean_product(centred, centred) / ((num_encodings - 1) * num_items))


def moments(
    pilot_draws: tuple[int, int],
    features: Sequence[Float[Tensor, "replicates examples dims"]],
    scores: Sequence[Float[Tensor, "replicates queries train"]],
    features_upstream: float,
    scores_upstream: float,
) -> Moments:
    """Return the moments of one scheme from independent replicates at two K."""

    def decay(replicates: Sequence[Tensor]) -> Decay:
        return fit_decay(pilot_draws, (sampling_variance(replicates[0]), sampling_variance(replicates[1])))

    _, num_queries, num_train = scores[0].shape
    centred = [x.double() - x.double().mean(2, keepdim=True) for x in scores]
    degrees = num_queries * (num_train - 1)
    products = [mean_product(centred[i], centred[j]) / degrees for i, j in ((0, 0), (0, 1), (1, 1))]
    squared_norms = [mean_product(x, x) / x.shape[1] for x in features]
    return Moments(
        pilot_draws=pilot_draws,
        squared_norm=sum(squared_norms) / 2,
        features=decay(features),
        features_upstream=features_upstream,
        scores=decay([x[..., None] for x in scores]),
        scores_upstream=scores_upstream,
        spread=(products[0], products[1], products[2]),
    )


Replicates = tuple[Tensor, Tensor]
"""Independent replicates at two K, each (replicates, items, dims)."""


def build_candidate(
    scheme: Scheme,
    proposal: ProposalKind,
    pilot_draws: tuple[int, int],
    features: Replicates,
    scores: Replicates,
    features_upstream: float,
    scores_upstream: float,
) -> Candidate:
    """Return a way to draw with its moments from all replicates, and from all but each one."""

    def fit(kept: list[int]) -> Moments:
        few_and_many = [tuple(x[kept] for x in pair) for pair in (features, scores)]
        return moments(pilot_draws, few_and_many[0], few_and_many[1], features_upstream, scores_upstream)

    everything = list(range(len(features[0])))
    left_out = [fit([m for m in everything if m != one]) for one in everything]
    return Candidate(scheme, proposal, fit(everything), left_out)
