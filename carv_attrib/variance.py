"""How much an estimate varies, what it cost, and how to split a budget (`docs/method.md`, eq. (6)).

Everything here is about vector estimators, whose variance is the trace of their covariance, and takes plain tensors: it
serves attribution, score distillation and one-step distillation alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from carv_attrib.errors import ArgumentError
from carv_attrib.seeding import stream


class RunningVariance:
    """The variance of vectors that come one by one, without keeping them (Welford, 1962; Chan et al., 1979).

    >>> running = RunningVariance()
    >>> for replicate in torch.tensor([[[0.0, 0.0]], [[2.0, 2.0]]]):  # one example, two dimensions
    ...     running.add(replicate)
    >>> running.total_variance().tolist()
    [4.0]
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, values: Float[Tensor, "*examples dims"]) -> None:
        """Add one replicate of the estimate of each example."""
        values = values.double()
        self.count += 1
        delta = values - self._mean
        self._mean = self._mean + delta / self.count
        self._squares = self._squares + (delta * (values - self._mean)).sum(-1)

    @property
    def mean(self) -> Float[Tensor, "*examples dims"]:
        """Mean over replicates."""
        return self._mean

    def total_variance(self) -> Float[Tensor, " *examples"]:
        """Return tr Cov of the estimate of each example, without bias.

        Raises:
            ArgumentError: for fewer than two replicates.
        """
        if self.count < 2:
            raise ArgumentError(f"a variance needs at least 2 replicates, got {self.count}; add more.")
        return self._squares / (self.count - 1)


@dataclass(frozen=True)
class Measured:
    """A figure and its standard error."""

    value: float
    standard_error: float


def mean_and_error(values: Sequence[float] | np.ndarray | Tensor) -> Measured:
    """Return the mean of independent values and its standard error."""
    values = np.asarray(values, dtype=np.float64)
    return Measured(float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5))


@dataclass(frozen=True)
class Costs:
    """What an upstream draw and a noise draw cost, in any one unit: seconds, or network evaluations.

    Attributes:
        upstream: of reading, augmenting, encoding or rendering once.
        draw: of one (timestep, noise) draw.
    """

    upstream: int | float
    draw: int | float

    def of(self, num_upstream: int | float, num_draws: int | float) -> float:
        """Return `R (c_up + K c_draw)`."""
        return num_upstream * (self.upstream + num_draws * self.draw)


@dataclass(frozen=True)
class VarianceComponents:
    """The law of total variance: tr Cov that comes from one upstream draw, and from one noise draw given it.

    Attributes:
        upstream: tr Cov of the conditional mean; 0 for a deterministic encoding.
        draw: mean tr Cov of one draw, given the upstream.
    """

    upstream: float
    draw: float

    def variance(self, num_upstream: int | float, num_draws: int | float) -> float:
        """Return `V_up / R + V_draw / (R K)`."""
        return (self.upstream + self.draw / num_draws) / num_upstream

    def optimal_num_draws(self, costs: Costs) -> float:
        """Return `K* = sqrt(c_up V_draw / (c_draw V_up))`, infinite without upstream variance, at least 1."""
        if self.upstream <= 0:
            return math.inf
        return max(1.0, math.sqrt(costs.upstream * self.draw / (costs.draw * self.upstream)))


def variance_components(values: Float[Tensor, "examples upstream draws dims"]) -> VarianceComponents:
    """Return the mean components over examples, without bias: nested analysis of variance.

    The variance of means over draws is `V_up + V_draw / K`, so that a K-th of the variance within is taken off the
    variance between; by chance this can come out below zero, and is zero then.

    Args:
        values: one vector for each example, upstream draw and (independent) noise draw.

    Raises:
        ArgumentError: for fewer than two upstream draws or noise draws.
    """
    _, num_upstream, num_draws, _ = values.shape
    if num_upstream < 2 or num_draws < 2:
        raise ArgumentError(
            f"variance components need at least 2 upstream draws of 2 noise draws, got {num_upstream} of {num_draws}."
        )
    values = values.double()
    within = values.var(2).sum(-1).mean()
    between = values.mean(2).var(1).sum(-1).mean() - within / num_draws
    return VarianceComponents(upstream=max(0.0, float(between)), draw=float(within))


def relative_efficiency(
    baseline: Float[Tensor, " examples"], method: Float[Tensor, " examples"], *, num_bootstrap: int = 1000
) -> Measured:
    """Return RE = mean variance of the baseline over that of the method, with a paired bootstrap over examples."""
    pairs = torch.stack([baseline, method]).double().cpu().numpy()
    rows = stream(0, "bootstrap").integers(pairs.shape[1], size=(num_bootstrap, pairs.shape[1]))
    ratios = pairs[0][rows].mean(1) / pairs[1][rows].mean(1)
    return Measured(float(pairs[0].mean() / pairs[1].mean()), float(np.std(ratios, ddof=1)))


def effective_compute_multiplier(
    efficiency: Measured, baseline_cost: int | float, method_cost: int | float
) -> Measured:
    """Return ECM = RE times the ratio of costs: how many times dearer the baseline is at equal variance.

    The variance of the baseline falls as its cost rises, since it can be repeated independently.
    """
    ratio = baseline_cost / method_cost
    return Measured(efficiency.value * ratio, efficiency.standard_error * ratio)
