"""Draws of timesteps and noise: what they estimate, and what they depend on."""

from __future__ import annotations

import functools
import inspect
import itertools

import pytest
import torch
from torch import Tensor

from carv_attrib.errors import ArgumentError
from carv_attrib.sampling import Draws, Proposal, Scheme, importance_proposal, sample_draws, uniform_proposal

NUM_TIMESTEPS = 50
SEEDS = 2000
LEVEL = torch.exp(-torch.arange(NUM_TIMESTEPS, dtype=torch.float64) / 8)
"""A magnitude that falls 500 times over the timesteps, as raw loss gradients do."""

PROPOSALS = {
    "uniform": uniform_proposal(NUM_TIMESTEPS),
    "fine": uniform_proposal(1000),
    "matched": importance_proposal(LEVEL),
    "mismatched": importance_proposal(LEVEL.flip(0)),
    "with zeros": importance_proposal(torch.arange(NUM_TIMESTEPS) % 2 * 1.0),
}


def integrand(timesteps: Tensor, noise: Tensor) -> Tensor:
    """Return f(t, eps) with even and odd parts in the noise; `E[f | t] = 3 LEVEL[t]`."""
    eps = noise[..., 0].double()
    return LEVEL[timesteps] * (1 + 2 * eps**2 + eps)


@functools.cache
def many_draws(proposal: str, scheme: str = "stratified") -> Draws:
    """Return four draws for each of 2000 ids."""
    return sample_draws(PROPOSALS[proposal], [1], num_draws=4, scheme=scheme, ids=range(SEEDS))  # type: ignore[arg-type]


def estimate(draws: Draws) -> Tensor:
    """Return `mean_k w_k f(t_k, eps_k)` for each row."""
    return (draws.weights * integrand(draws.timesteps, draws.noise)).mean(1)


def assert_unbiased(estimates: Tensor) -> None:
    """Check the mean against the closed form within four standard errors, small enough for that to mean something."""
    expected = float((3 * LEVEL).mean())
    standard_error = float(estimates.std()) / SEEDS**0.5
    assert abs(float(estimates.mean()) - expected) < 4 * standard_error
    assert standard_error < 0.15 * expected


@pytest.mark.parametrize("scheme", ["iid", "stratified", "antithetic"])
def test_shared_draws_are_unbiased_over_seeds(scheme: Scheme) -> None:
    proposal = PROPOSALS["matched"]
    draws = [sample_draws(proposal, [1], num_draws=4, scheme=scheme, seed=seed) for seed in range(SEEDS)]
    assert_unbiased(torch.cat([estimate(d) for d in draws]))


@pytest.mark.parametrize("scheme", ["iid", "stratified", "antithetic"])
@pytest.mark.parametrize("proposal", ["uniform", "matched", "mismatched", "with zeros"])
def test_independent_draws_are_unbiased_over_ids(scheme: str, proposal: str) -> None:
    assert_unbiased(estimate(many_draws(proposal, scheme)))


def test_every_stratum_is_uniform_inside() -> None:
    draws = many_draws("fine")
    inside = (draws.timesteps.double() + 0.5) / 250 - torch.arange(4)
    assert bool(((inside > 0) & (inside < 1)).all())
    assert bool(((inside.mean(0) - 0.5).abs() < 4 * (1 / 12 / SEEDS) ** 0.5).all())
    assert bool(((inside.var(0) - 1 / 12).abs() < 4 * (1 / 180 / SEEDS) ** 0.5).all())


def test_points_of_different_strata_are_independent() -> None:
    draws = many_draws("fine")
    correlations = torch.corrcoef(draws.timesteps.double().T) - torch.eye(4)
    assert float(correlations.abs().max()) < 4 / SEEDS**0.5


def test_strata_leave_a_share_of_one_over_k_squared_of_the_variance() -> None:
    def variance(scheme: str) -> float:
        return float(many_draws("fine", scheme).timesteps.double().mean(1).var())

    assert variance("stratified") == pytest.approx(variance("iid") / 16, rel=6 * (2 / SEEDS) ** 0.5)


def test_the_optimal_proposal_has_less_variance_than_the_uniform_one() -> None:
    spread = [float(estimate(many_draws(proposal, "iid")).var()) for proposal in ("matched", "uniform")]
    assert spread[0] < 0.5 * spread[1]


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_one_point_falls_in_each_stratum_of_the_proposal(proposal: str) -> None:
    draws = sample_draws(PROPOSALS[proposal], [1], num_draws=10, ids=range(200))
    upper = PROPOSALS[proposal].density.cumsum(0)
    lower = upper - PROPOSALS[proposal].density
    strata = torch.arange(10)
    assert bool((upper[draws.timesteps] > strata / 10 - 1e-12).all())
    assert bool((lower[draws.timesteps] < (strata + 1) / 10 + 1e-12).all())


@pytest.mark.parametrize("scheme", ["iid", "stratified", "antithetic", "grid"])
def test_timesteps_are_sorted(scheme: str) -> None:
    timesteps = many_draws("matched", scheme).timesteps
    assert bool((timesteps.diff(dim=1) >= 0).all())


def test_antithetic_pairs_have_opposite_noise_at_the_same_timestep() -> None:
    draws = sample_draws(uniform_proposal(NUM_TIMESTEPS), [2, 3], num_draws=6, scheme="antithetic")
    assert torch.equal(draws.timesteps[:, ::2], draws.timesteps[:, 1::2])
    assert torch.equal(draws.noise[:, ::2], -draws.noise[:, 1::2])


def test_antithetic_pairs_lie_one_in_each_of_their_strata() -> None:
    timesteps = sample_draws(uniform_proposal(40), [1], num_draws=8, scheme="antithetic", ids=range(50)).timesteps
    assert bool((timesteps[:, ::2] // 10 == torch.arange(4)).all())


def test_noise_is_standard_normal_and_differs_between_draws_and_ids() -> None:
    noise = many_draws("fine").noise.flatten(1).double()
    covariance = torch.cov(noise.T)
    assert float((covariance - torch.eye(4)).abs().max()) < 4.5 * (2 / SEEDS) ** 0.5
    assert (
        len(set(noise.flatten().tolist())) > 0.999 * noise.numel()
    )  # float32 has few enough values for a chance match


def test_noise_has_the_shape_of_the_latents_in_float32() -> None:
    noise = sample_draws(uniform_proposal(10), (3, 4, 5), num_draws=2, ids=[7, 8, 9]).noise
    assert noise.shape == (3, 2, 3, 4, 5)
    assert noise.dtype == torch.float32


def test_shared_draws_are_one_row() -> None:
    assert sample_draws(uniform_proposal(10), [1], num_draws=4).timesteps.shape == (1, 4)


def test_expand_gives_every_example_the_same_draws() -> None:
    draws = sample_draws(uniform_proposal(10), [2, 2], num_draws=4)
    expanded = draws.expand(3)
    for name in ("timesteps", "noise", "weights"):
        assert torch.equal(getattr(expanded, name), torch.cat([getattr(draws, name)] * 3))


def test_draws_belong_to_an_id_and_not_to_its_place_in_a_batch() -> None:
    together = sample_draws(PROPOSALS["matched"], [2], num_draws=4, ids=[11, 5, 7])
    alone = sample_draws(PROPOSALS["matched"], [2], num_draws=4, ids=[7])
    for name in ("timesteps", "noise", "weights"):
        assert torch.equal(getattr(together, name)[2:], getattr(alone, name))


def test_seed_purpose_and_id_each_name_other_draws() -> None:
    named = [
        sample_draws(uniform_proposal(1000), [2], num_draws=4, **names)
        for names in ({}, {"seed": 1}, {"purpose": "pilot"}, {"ids": [0]}, {"ids": [1]}, {"ids": [0], "seed": 1})
    ]
    for one, other in itertools.combinations(named, 2):
        assert not torch.equal(one.timesteps, other.timesteps)
        assert not bool((one.noise == other.noise).any())


def test_the_first_noises_stay_the_same_when_draws_are_added() -> None:
    few, many = (sample_draws(uniform_proposal(10), [2], num_draws=k) for k in (2, 5))
    assert torch.equal(few.noise, many.noise[:, :2])


def test_inverse_cdf_frequencies_equal_the_density_exactly() -> None:
    counts = torch.tensor([1, 0, 7, 100, 20, 128])
    proposal = Proposal(torch.full((6,), 1 / 6, dtype=torch.float64), counts.double() / 256)
    uniforms = (torch.arange(256 * 4, dtype=torch.float64) + 0.5) / (256 * 4)
    assert torch.equal(torch.bincount(proposal.inverse_cdf(uniforms), minlength=6), counts * 4)


def test_inverse_cdf_stays_in_range_at_both_ends() -> None:
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert uniform_proposal(1000).inverse_cdf(ends).tolist() == [0, 999]


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_importance_weights_are_bounded_and_average_to_one_under_the_proposal(proposal: str) -> None:
    weights = PROPOSALS[proposal].importance_weights(torch.arange(len(PROPOSALS[proposal].density)))
    assert float((weights * PROPOSALS[proposal].density).sum()) == pytest.approx(1, abs=1e-12)
    assert float(weights.max()) <= 10 + 1e-9


def test_a_defensive_share_of_one_is_the_target() -> None:
    assert torch.allclose(importance_proposal(LEVEL, 1.0).density, uniform_proposal(NUM_TIMESTEPS).density, atol=1e-15)


def test_the_proposal_is_proportional_to_the_magnitude_beside_the_defensive_share() -> None:
    density = importance_proposal(LEVEL, 0.25).density
    assert torch.allclose(density, 0.75 * LEVEL / LEVEL.sum() + 0.25 / NUM_TIMESTEPS, atol=1e-15)


@pytest.mark.parametrize(("num_draws", "num_timesteps"), [(10, 1000), (7, 50), (50, 50)])
def test_grid_is_d_traks(num_draws: int, num_timesteps: int) -> None:
    proposal = importance_proposal(1.0 + torch.arange(num_timesteps))
    draws = sample_draws(proposal, [1], num_draws=num_draws, scheme="grid")
    assert draws.timesteps.tolist() == [[int(k * num_timesteps / num_draws) for k in range(num_draws)]]
    assert torch.equal(draws.weights, torch.ones(1, num_draws, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_draws": 0}, r"`num_draws` must be at least 1, got 0; 8 is the default\."),
        ({"num_draws": 3, "scheme": "antithetic"}, r"`num_draws` must be even for `scheme` antithetic, got 3; use 4\."),
        (
            {"num_draws": 51, "scheme": "grid"},
            r"`num_draws` must be at most the number of timesteps \(=50\) for `scheme` grid, got 51; use fewer\.",
        ),
        ({"num_draws": 2, "scheme": "sobol"}, r"`scheme` must be one of stratified, .*, got 'sobol'\."),
    ],
)
def test_what_does_not_fit_the_scheme_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        inspect.unwrap(sample_draws)(uniform_proposal(50), [1], **arguments)


@pytest.mark.parametrize("values", [[1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")], [0.0, 0.0]])
def test_a_magnitude_must_be_finite_and_positive_somewhere(values: list[float]) -> None:
    with pytest.raises(ArgumentError, match="`magnitude` must be finite, not negative and not zero everywhere"):
        importance_proposal(torch.tensor(values))


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_the_defensive_share_must_be_a_share(share: float) -> None:
    with pytest.raises(ArgumentError, match=rf"`defensive_share` must be in \(0, 1\], got {share}; use 0.1\."):
        importance_proposal(LEVEL, share)
