"""Which (timestep, noise) draws to take, and what each one weighs (`docs/method.md`, eq. (2) to (5)).

Nothing here knows about images or gradients: the estimator of `E_{t~p, eps}[f(t, eps)]` is
`mean_k weights[k] * f(timesteps[k], noise[k])` for any `f`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from carv_attrib.errors import ArgumentError
from carv_attrib.seeding import stream

Scheme = Literal["stratified", "antithetic", "iid", "grid"]

DEFENSIVE_SHARE = 0.1
"""Share of p mixed into every proposal, so that importance weights never exceed its inverse."""


@dataclass(frozen=True)
class Proposal:
    """The distribution q(t) that timesteps are drawn from, beside the one they are averaged over, p(t).

    Attributes:
        target: p(t), float64, sums to one.
        density: q(t), float64, sums to one, positive wherever p is.
    """

    target: Float[Tensor, " timesteps"]
    density: Float[Tensor, " timesteps"]

    def inverse_cdf(self, uniforms: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Return the timestep below which a share `u` in [0, 1) of q lies: exactly q-distributed for uniform u."""
        cdf = self.density.cumsum(0) / self.density.sum()
        return torch.searchsorted(cdf, uniforms, right=True).clamp(max=len(cdf) - 1)

    def importance_weights(self, timesteps: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return p(t)/q(t), float64: multiplying by it keeps the mean over draws unbiased for the mean under p."""
        return (self.target / self.density)[timesteps]


def uniform_proposal(num_timesteps: int) -> Proposal:
    """Return p = q = uniform, what diffusion training uses."""
    p = torch.full((num_timesteps,), 1 / num_timesteps, dtype=torch.float64)
    return Proposal(p, p)


def importance_proposal(magnitude: Float[Tensor, " timesteps"], defensive_share: float = DEFENSIVE_SHARE) -> Proposal:
    """Return q ∝ p * magnitude, mixed with a share of p (eq. (3)).

    The variance of the weighted mean is least when `magnitude(t) = sqrt(E[||f||^2 | t])`.

    Raises:
        ArgumentError: if a magnitude is negative or not finite, or the share is outside (0, 1].
    """
    if not bool(torch.isfinite(magnitude).all()) or bool((magnitude < 0).any()) or float(magnitude.sum()) == 0:
        raise ArgumentError("`magnitude` must be finite, not negative and not zero everywhere; re-run the pilot.")
    if not 0 < defensive_share <= 1:
        raise ArgumentError(f"`defensive_share` must be in (0, 1], got {defensive_share}; use {DEFENSIVE_SHARE}.")
    p = uniform_proposal(len(magnitude)).target
    q = magnitude.double() * p
    return Proposal(p, (1 - defensive_share) * q / q.sum() + defensive_share * p)


@dataclass(frozen=True)
class Draws:
    """K draws for each row of a batch, in increasing order of timestep; one row serves all when shared.

    Attributes:
        timesteps: in [0, num_train_timesteps).
        noise: N(0, 1), float32.
        weights: importance weights p/q, float64.
    """

    timesteps: Int[Tensor, "batch draws"]
    noise: Float[Tensor, "batch draws *latent"]
    weights: Float[Tensor, "batch draws"]

    def expand(self, batch: int) -> Draws:
        """Return the same draws for `batch` examples (no copy)."""
        return Draws(
            self.timesteps.expand(batch, *self.timesteps.shape[1:]),
            self.noise.expand(batch, *self.noise.shape[1:]),
            self.weights.expand(batch, *self.weights.shape[1:]),
        )


def sample_draws(
    proposal: Proposal,
    latent_shape: Sequence[int],
    *,
    num_draws: int,
    scheme: Scheme = "stratified",
    seed: int = 0,
    purpose: str = "features",
    ids: Sequence[int] | None = None,
) -> Draws:
    """Return K draws for each id, or one row of K draws shared by all when `ids` is None (eq. (4), (5)).

    Unbiased for `stratified`, `antithetic` and `iid`: each timestep is, over seeds, q-distributed within its stratum
    and strata have equal mass, so `E[mean_k w_k f(t_k, eps_k)] = sum_t p(t) E[f(t, eps)]`. `grid` is D-TRAK's fixed
    grid, which is biased, for comparison.

    Args:
        proposal: q(t) and p(t).
        latent_shape: shape of one noise tensor.
        num_draws: K; even for `antithetic`.
        scheme: how the K timesteps and noises depend on one another.
        seed: names the streams, with `purpose`, the id if given, and nothing else.
        purpose: keeps streams for different uses apart.
        ids: example ids for independent draws.

    Raises:
        ArgumentError: for a scheme that is not known, or if `num_draws` does not fit it.
    """
    _check_num_draws(num_draws, scheme, len(proposal.density))
    rows = [
        _one_row(proposal, latent_shape, num_draws, scheme, seed, (purpose, *name))
        for name in ([()] if ids is None else [(int(i),) for i in ids])
    ]
    timesteps, noise = (torch.stack(parts) for parts in zip(*rows, strict=True))
    weights = (
        torch.ones(timesteps.shape, dtype=torch.float64) if scheme == "grid" else proposal.importance_weights(timesteps)
    )
    return Draws(timesteps, noise, weights)


def _check_num_draws(num_draws: int, scheme: str, num_timesteps: int) -> None:
    if scheme not in get_args(Scheme):
        raise ArgumentError(f"`scheme` must be one of {', '.join(get_args(Scheme))}, got {scheme!r}.")
    if num_draws < 1:
        raise ArgumentError(f"`num_draws` must be at least 1, got {num_draws}; 8 is the default.")
    if scheme == "antithetic" and num_draws % 2:
        raise ArgumentError(f"`num_draws` must be even for `scheme` antithetic, got {num_draws}; use {num_draws + 1}.")
    if scheme == "grid" and num_draws > num_timesteps:
        raise ArgumentError(
            f"`num_draws` must be at most the number of timesteps (={num_timesteps}) for `scheme` grid, "
            f"got {num_draws}; use fewer."
        )


def _one_row(
    proposal: Proposal,
    latent_shape: Sequence[int],
    num_draws: int,
    scheme: Scheme,
    seed: int,
    name: tuple[str | int, ...],
) -> tuple[Tensor, Tensor]:
    """Return K timesteps in increasing order and their noises."""
    uniforms = torch.from_numpy(stream(seed, *name, "timesteps").random(num_draws))
    noise = torch.from_numpy(
        np.stack([stream(seed, *name, "noise", k).standard_normal(latent_shape, np.float32) for k in range(num_draws)])
    )
    if scheme == "grid":
        return torch.arange(num_draws) * len(proposal.density) // num_draws, noise
    if scheme == "antithetic":
        half = num_draws // 2
        timesteps = proposal.inverse_cdf(_strata(uniforms[:half])).repeat_interleave(2)
        return timesteps, torch.stack([noise[:half], -noise[:half]], dim=1).flatten(0, 1)
    if scheme == "stratified":
        return proposal.inverse_cdf(_strata(uniforms)), noise
    return proposal.inverse_cdf(uniforms.sort().values), noise


def _strata(uniforms: Float[Tensor, " strata"]) -> Float[Tensor, " strata"]:
    """Return u_k = (k + U_k)/K: one point in each of K equal strata of [0, 1)."""
    return (torch.arange(len(uniforms)) + uniforms) / len(uniforms)
