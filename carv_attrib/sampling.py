"""Which (timestep, noise) draws to take, and what each one weighs (`docs/method.md`, eq. (2) to (5)).

Nothing here knows about images or gradients: the estimator of `E_{t~p, eps}[f(t, eps)]` is
`mean_k weights[k] * f(timesteps[k], noise[k])` for any `f`, be it a teacher's gradient, a score that is distilled into
a scene, or one that trains a one-step generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from carv_attrib.errors import ArgumentError
from carv_attrib.seeding import stream

Scheme = Literal["stratified", "antithetic", "orthogonal", "iid", "grid"]

DEFENSIVE_SHARE = 0.1
"""Share of p mixed into every proposal, so that importance weights never exceed its inverse."""


_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: its multiples fill a circle most evenly


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
        return torch.searchsorted(cdf, uniforms.contiguous(), right=True).clamp(max=len(cdf) - 1)

    def band_edges(self, num_bands: int) -> Float[Tensor, " edges"]:
        """Return the shares of q that lie below the edges of `num_bands` bands of equal mass under p, 0 and 1 included.

        A timestep across an edge belongs to both bands, in shares.
        """
        grid = np.concatenate([[0.0], self.target.cumsum(0).numpy()])
        below = np.concatenate([[0.0], self.density.cumsum(0).numpy()])
        edges = np.interp(np.linspace(0, grid[-1], num_bands + 1), grid, below / below[-1])
        return torch.from_numpy(edges)

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
    """K draws for each row of a batch, band after band; one row serves all when shared.

    Attributes:
        timesteps: in [0, num_train_timesteps), increasing.
        noise: N(0, 1), float32.
        weights: such that `mean_k weights[k] * f(k)` estimates the mean of f under p, float64: p/q for one band.
        band_sizes: how many draws each band of timesteps has; bands have equal mass under p.
    """

    timesteps: Int[Tensor, "batch draws"]
    noise: Float[Tensor, "batch draws ..."]
    weights: Float[Tensor, "batch draws"]
    band_sizes: tuple[int, ...]

    def expand(self, batch: int) -> Draws:
        """Return the same draws for `batch` examples (no copy)."""
        return replace(
            self,
            timesteps=self.timesteps.expand(batch, *self.timesteps.shape[1:]),
            noise=self.noise.expand(batch, *self.noise.shape[1:]),
            weights=self.weights.expand(batch, *self.weights.shape[1:]),
        )


def sample_draws(
    proposal: Proposal,
    latent_shape: Sequence[int],
    *,
    num_draws: int,
    num_bands: int = 1,
    scheme: Scheme = "stratified",
    seed: int = 0,
    purpose: str = "features",
    ids: Sequence[int] | None = None,
) -> Draws:
    """Return K draws for each id, or one row of K draws shared by all when `ids` is None (eq. (4), (5)).

    Unbiased for all schemes but `grid`, D-TRAK's fixed grid, which is there for comparison: over seeds, each timestep
    is q-distributed within its stratum, each noise is N(0, I), and the weights undo q and the sizes of the bands, so
    that `E[mean_k w_k f(t_k, eps_k)] = sum_t p(t) E[f(t, eps)]`.

    With one stratum there is nothing to stratify within an example, so that examples are stratified together: the
    point of an id is one random number moved on by the id times the golden ratio. Neighbouring ids fill [0, 1) evenly,
    whichever batch they are in. Queries, whose ids are negative, have a number of their own, so that they are
    independent of examples.

    Args:
        proposal: q(t) and p(t).
        latent_shape: shape of one noise tensor.
        num_draws: K.
        num_bands: bands of equal mass under p. Each gets draws in proportion to its mass under q, but at least as many
            as form a unit (`band_sizes`), so that the mean over each band is estimated whatever q is.
        scheme: how the K timesteps and noises depend on one another.
        seed: names the streams, with `purpose`, the id if given, and nothing else.
        purpose: keeps streams for different uses apart.
        ids: example ids for independent draws.

    Raises:
        ArgumentError: for a scheme that is not known, or if `num_draws` does not fit it.
    """
    sizes = band_sizes(proposal, num_draws, num_bands, scheme)
    names = [None] if ids is None else [int(id_) for id_ in ids]
    noise = torch.stack([_noise(latent_shape, num_draws, scheme, seed, purpose, id_) for id_ in names])
    if scheme == "grid":
        timesteps = (torch.arange(num_draws) * len(proposal.density) // num_draws).expand(len(names), -1)
        return Draws(timesteps, noise, torch.ones(timesteps.shape, dtype=torch.float64), sizes)
    uniforms = torch.stack([_uniforms(num_draws, scheme, seed, purpose, id_) for id_ in names])
    if scheme == "iid":
        timesteps = proposal.inverse_cdf(uniforms.sort().values)
        return Draws(timesteps, noise, proposal.importance_weights(timesteps), sizes)
    edges, pair = proposal.band_edges(num_bands), pair_size(scheme)
    points = _strata(uniforms, edges, torch.tensor(sizes) // pair)
    timesteps = proposal.inverse_cdf(points).repeat_interleave(pair, dim=1)
    # the mass of a draw's band under q, over the share of the draws that the band has
    shares = (edges.diff() * num_draws / torch.tensor(sizes)).repeat_interleave(torch.tensor(sizes))
    return Draws(timesteps, noise, proposal.importance_weights(timesteps) * shares, sizes)


def band_sizes(proposal: Proposal, num_draws: int, num_bands: int, scheme: Scheme) -> tuple[int, ...]:
    """Return how many of K draws each band gets: in proportion to its mass under q, in units, one at least.

    With q ∝ p * standard deviation this is Neyman's allocation. A unit is a draw or, for schemes with antithetic pairs,
    a pair; where bands have an even number of units on average it is two of them, so that a band has two halves.

    Raises:
        ArgumentError: for a scheme that is not known, or if `num_draws` does not fit it or the bands.
    """
    if scheme not in get_args(Scheme):
        raise ArgumentError(f"`scheme` must be one of {', '.join(get_args(Scheme))}, got {scheme!r}.")
    if num_draws < 1:
        raise ArgumentError(f"`num_draws` must be at least 1, got {num_draws}; 8 is the default.")
    if num_bands < 1:
        raise ArgumentError(f"`num_bands` must be at least 1, got {num_bands}; 4 is the default.")
    if num_draws % pair_size(scheme):
        raise ArgumentError(f"`num_draws` must be even for `scheme` {scheme}, got {num_draws}; use {num_draws + 1}.")
    if scheme == "grid" and num_draws > len(proposal.density):
        raise ArgumentError(
            f"`num_draws` must be at most the number of timesteps (={len(proposal.density)}) for `scheme` grid, "
            f"got {num_draws}; use fewer."
        )
    if num_draws % (num_bands * pair_size(scheme)):
        raise ArgumentError(
            f"`num_bands` must divide the number of draws (pairs, for `scheme` {scheme}), "
            f"got {num_bands} for {num_draws} draws; use 1."
        )
    unit = pair_size(scheme) * num_halves(num_draws, num_bands, scheme)
    if num_bands == 1 or scheme in ("grid", "iid"):
        return (num_draws // num_bands,) * num_bands
    spare = num_draws // unit - num_bands
    wanted = proposal.band_edges(num_bands).diff() * num_draws / unit - 1
    wanted = wanted.clamp(min=0) * (spare / max(float(wanted.clamp(min=0).sum()), 1e-12))
    units = wanted.floor().long()
    largest = (wanted - units).argsort(descending=True, stable=True)[: spare - int(units.sum())]
    units[largest] += 1
    return tuple(((units + 1) * unit).tolist())


def pair_size(scheme: Scheme) -> int:
    """Return how many draws belong together: 2 where noise comes in antithetic pairs."""
    return 2 if scheme in ("antithetic", "orthogonal") else 1


def num_halves(num_draws: int, num_bands: int, scheme: Scheme) -> int:
    """Return 2 where every band has an even number of draws (pairs), which give a standard error, else 1."""
    return 2 if num_draws // num_bands // pair_size(scheme) % 2 == 0 else 1


def _noise(
    latent_shape: Sequence[int], num_draws: int, scheme: Scheme, seed: int, purpose: str, id_: int | None
) -> Float[Tensor, "draws *latent"]:
    """Return the noises of one row: one stream each, or one for each antithetic pair."""
    pair, name = pair_size(scheme), (purpose,) if id_ is None else (purpose, id_)
    streams = [stream(seed, *name, "noise", k) for k in range(num_draws // pair)]
    noise = torch.from_numpy(np.stack([s.standard_normal(latent_shape, np.float32) for s in streams]))
    if scheme == "orthogonal":
        noise = orthogonalise(noise)
    return noise if pair == 1 else torch.stack([noise, -noise], dim=1).flatten(0, 1)


def _uniforms(num_draws: int, scheme: Scheme, seed: int, purpose: str, id_: int | None) -> Float[Tensor, " points"]:
    """Return the random numbers of one row, one for each draw or pair; a lone one is moved on by the id."""
    num_points = num_draws // pair_size(scheme)
    if id_ is None or num_points > 1 or scheme == "iid":
        name = (purpose,) if id_ is None else (purpose, id_)
        return torch.from_numpy(stream(seed, *name, "timesteps").random(num_points))
    common = (purpose,) if id_ >= 0 else (purpose, "queries")
    moved = stream(seed, *common, "timesteps").random(1) + (id_ * _GOLDEN % 2**64) / 2**64
    return torch.from_numpy(moved % 1.0)


def orthogonalise(noise: Float[Tensor, "draws ..."]) -> Float[Tensor, "draws ..."]:
    """Return the noises turned at right angles to one another, as many at a time as there are dimensions.

    Each keeps its length, and an orthonormal basis made from Gaussian vectors (QR, with a positive diagonal) is
    uniformly distributed, so that each is still N(0, I). Exact for the part of f that is quadratic in a whole basis.
    """
    flat, blocks = noise.flatten(1).double(), []
    for start in range(0, len(flat), flat.shape[1]):
        block = flat[start : start + flat.shape[1]]
        basis, upper = torch.linalg.qr(block.T)
        blocks.append((basis * upper.diagonal().sign()).T * block.norm(dim=1, keepdim=True))
    return torch.cat(blocks).to(noise).view_as(noise)


def _strata(
    uniforms: Float[Tensor, "batch strata"], edges: Float[Tensor, " edges"], sizes: Int[Tensor, " bands"]
) -> Float[Tensor, "batch strata"]:
    """Return u_k = (k + U_k)/n, one point in each of n equal strata, scaled into each band in turn."""
    low, width, n = (per_band.repeat_interleave(sizes) for per_band in (edges[:-1], edges.diff(), sizes))
    k = torch.cat([torch.arange(size) for size in sizes.tolist()])
    return low + width * (k + uniforms) / n
