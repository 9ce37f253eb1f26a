"""Draws of timesteps and noise: what they estimate, and what they depend on."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from carv_attrib.errors import ArgumentError
from carv_attrib.sampling import (
    Draws,
    Proposal,
    Scheme,
    band_sizes,
    importance_proposal,
    orthogonalise,
    sample_draws,
    uniform_proposal,
)
from tests import reference

NUM_TIMESTEPS = 50
SEEDS = 500
UNBIASED: tuple[Scheme, ...] = ("iid", "stratified", "antithetic", "orthogonal")
ONE_EACH = torch.ones(NUM_TIMESTEPS, dtype=torch.int64)
LEVEL = torch.exp(-torch.arange(NUM_TIMESTEPS, dtype=torch.float64) / 8)
"""A magnitude that falls 500 times over the timesteps, as raw loss gradients do."""

PROPOSALS = {
    "uniform": uniform_proposal(NUM_TIMESTEPS),
    "fine": uniform_proposal(1000),
    "matched": importance_proposal(LEVEL),
    "mismatched": importance_proposal(LEVEL.flip(0)),
    "with zeros": importance_proposal(torch.arange(NUM_TIMESTEPS) % 2 * 1.0),
}

PRECISIONS = {"uniform": 0.05, "matched": 0.05, "mismatched": 0.2, "with zeros": 0.2}
"""Standard errors, relative to the mean, that 500 estimates surely reach."""


def integrand(timesteps: Tensor, noise: Tensor) -> Tensor:
    """Return f(t, eps) with even, odd and mixed parts in the noise; `E[f | t] = 3 LEVEL[t]`."""
    first, second, third = noise.double().unbind(-1)
    return LEVEL[timesteps] * (1 + 2 * first**2 + second + first * third)


@functools.cache
def many_draws(proposal: str, scheme: Scheme = "stratified", num_draws: int = 4, num_bands: int = 1) -> Draws:
    """Return draws for each of 500 ids."""
    return sample_draws(
        PROPOSALS[proposal], [3], num_draws=num_draws, num_bands=num_bands, scheme=scheme, ids=range(SEEDS)
    )


def over_seeds(proposal: str, **settings: Any) -> Draws:
    """Return one row of draws for each of 500 seeds."""
    rows = [sample_draws(PROPOSALS[proposal], [3], seed=seed, **settings) for seed in range(SEEDS)]
    columns = {name: torch.cat([getattr(row, name) for row in rows]) for name in ("timesteps", "noise", "weights")}
    return replace(rows[0], **columns)


def estimate(draws: Draws) -> Tensor:
    """Return `mean_k w_k f(t_k, eps_k)` for each row."""
    return (draws.weights * integrand(draws.timesteps, draws.noise)).mean(1)


def assert_unbiased(estimates: Tensor, expected: float = float((3 * LEVEL).mean()), precision: float = 0.05) -> None:
    """Check the mean against the closed form within four standard errors, small enough for that to mean something."""
    standard_error = float(estimates.std()) / len(estimates) ** 0.5
    assert abs(float(estimates.mean()) - expected) < 4 * standard_error
    assert standard_error < precision * expected


@pytest.mark.parametrize("scheme", UNBIASED)
@pytest.mark.parametrize(("num_draws", "num_bands"), [(4, 1), (12, 2)])
def test_shared_draws_are_unbiased_over_seeds(scheme: Scheme, num_draws: int, num_bands: int) -> None:
    draws = over_seeds("matched", num_draws=num_draws, num_bands=num_bands, scheme=scheme)
    assert_unbiased(estimate(draws))


@pytest.mark.parametrize("scheme", UNBIASED)
@pytest.mark.parametrize("proposal", ["uniform", "matched", "mismatched", "with zeros"])
def test_independent_draws_are_unbiased_over_ids(scheme: Scheme, proposal: str) -> None:
    assert_unbiased(estimate(many_draws(proposal, scheme, 8)), precision=PRECISIONS[proposal])


@pytest.mark.parametrize("scheme", ["stratified", "antithetic", "orthogonal"])
@pytest.mark.parametrize("proposal", ["uniform", "matched", "mismatched"])
def test_draws_are_unbiased_whether_bands_have_as_many_or_not(scheme: Scheme, proposal: str) -> None:
    draws = many_draws(proposal, scheme, 12, 2)
    assert (len(set(draws.band_sizes)) == 1) == (proposal == "uniform")
    assert_unbiased(estimate(draws), precision=PRECISIONS[proposal])


@pytest.mark.parametrize(("scheme", "num_draws"), [("iid", 1), ("stratified", 1), ("antithetic", 2), ("orthogonal", 2)])
def test_one_draw_or_pair_for_each_id_is_unbiased_over_ids_and_over_seeds(scheme: Scheme, num_draws: int) -> None:
    assert_unbiased(estimate(many_draws("matched", scheme, num_draws)))
    assert_unbiased(estimate(over_seeds("matched", num_draws=num_draws, scheme=scheme, ids=[7])))


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


@pytest.mark.parametrize("scheme", [*UNBIASED, "grid"])
@pytest.mark.parametrize(("num_draws", "num_bands"), [(4, 1), (12, 2)])
def test_timesteps_are_sorted(scheme: Scheme, num_draws: int, num_bands: int) -> None:
    draws = sample_draws(
        PROPOSALS["matched"], [1], num_draws=num_draws, num_bands=num_bands, scheme=scheme, ids=range(100)
    )
    assert bool((draws.timesteps.diff(dim=1) >= 0).all())


@pytest.mark.parametrize("scheme", ["antithetic", "orthogonal"])
def test_pairs_have_opposite_noise_at_the_same_timestep(scheme: Scheme) -> None:
    draws = sample_draws(uniform_proposal(NUM_TIMESTEPS), [2, 3], num_draws=6, scheme=scheme)
    assert torch.equal(draws.timesteps[:, ::2], draws.timesteps[:, 1::2])
    assert torch.equal(draws.noise[:, ::2], -draws.noise[:, 1::2])


@pytest.mark.parametrize("scheme", ["antithetic", "orthogonal"])
def test_pairs_lie_one_in_each_of_their_strata(scheme: Scheme) -> None:
    timesteps = sample_draws(uniform_proposal(40), [1], num_draws=8, scheme=scheme, ids=range(50)).timesteps
    assert bool((timesteps[:, ::2] // 10 == torch.arange(4)).all())


@pytest.mark.parametrize("scheme", ["antithetic", "orthogonal"])
def test_no_two_pairs_and_no_two_ids_have_the_same_noise(scheme: Scheme) -> None:
    noise = many_draws("uniform", scheme, 12, 2).noise[:, ::2]
    assert len(noise.flatten(0, 1).unique(dim=0)) == SEEDS * 6


def test_noises_of_a_basis_are_at_right_angles_and_those_of_two_bases_are_independent() -> None:
    noise = many_draws("uniform", "orthogonal", 12, 2).noise[:, ::2].double()  # six pairs in three dimensions
    directions = noise / noise.norm(dim=-1, keepdim=True)
    cosines = directions @ directions.mT
    off_diagonal = 1 - torch.eye(3)
    assert float((cosines[:, :3, :3] * off_diagonal).abs().max()) < 1e-6
    assert float((cosines[:, 3:, 3:] * off_diagonal).abs().max()) < 1e-6
    squares = cosines[:, 3:, :3].square().mean(0)  # of directions in three dimensions: mean 1/3, variance 4/45
    assert float((squares - 1 / 3).abs().max()) < 4 * (4 / 45 / SEEDS) ** 0.5


def test_orthogonal_noise_keeps_its_lengths() -> None:
    before = many_draws("uniform", "antithetic", 12, 2).noise
    after = many_draws("uniform", "orthogonal", 12, 2).noise
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
    assert bool((after[:, 2:6] != before[:, 2:6]).any(-1).all())


def test_every_orthogonal_noise_is_standard_normal_by_itself() -> None:
    for noise in many_draws("uniform", "orthogonal", 12, 2).noise[:, ::2].double().unbind(1):
        assert float(noise.mean(0).abs().max()) < 4 * SEEDS**-0.5
        assert float((torch.cov(noise.T) - torch.eye(3)).abs().max()) < 4.5 * (2 / SEEDS) ** 0.5
        assert float(((noise**4).mean(0) - 3).abs().max()) < 4.5 * (96 / SEEDS) ** 0.5


def test_a_whole_orthogonal_basis_leaves_a_quadratic_form_no_variance_but_that_of_lengths() -> None:
    generator = torch.Generator().manual_seed(0)
    noise, form = torch.randn(4, 2, 2, generator=generator), torch.randn(4, 4, generator=generator)
    turned = orthogonalise(noise).flatten(1)
    directions = turned / turned.norm(dim=1, keepdim=True)
    torch.testing.assert_close(((directions @ form) * directions).sum(), form.trace())
    torch.testing.assert_close(orthogonalise(noise[:1]), noise[:1])


def test_noise_is_standard_normal_and_differs_between_draws_and_ids() -> None:
    noise = many_draws("fine").noise.flatten(1).double()
    covariance = torch.cov(noise.T)
    assert float((covariance - torch.eye(12)).abs().max()) < 4.5 * (2 / SEEDS) ** 0.5
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


def test_band_edges_share_out_a_timestep_that_lies_across_one() -> None:
    """p = (3, 1, 4, 2)/10 in three bands: one edge a third into timestep 1, the other two thirds into timestep 2."""
    counts, density = torch.tensor([3, 1, 4, 2]), torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    edges = Proposal(counts.double() / 10, density).band_edges(3)
    torch.testing.assert_close(edges, torch.tensor([0, 0.4 + 0.3 / 3, 0.7 + 0.2 * 2 / 3, 1], dtype=torch.float64))
    torch.testing.assert_close(edges.diff(), reference.band_masses(density, counts, 3))


@pytest.mark.parametrize("proposal", ["uniform", "matched", "mismatched", "with zeros"])
@pytest.mark.parametrize("num_bands", [1, 2, 3, 7])
def test_bands_hold_equal_shares_of_p_whatever_the_proposal(proposal: str, num_bands: int) -> None:
    expected = reference.band_masses(PROPOSALS[proposal].density, ONE_EACH, num_bands)
    torch.testing.assert_close(PROPOSALS[proposal].band_edges(num_bands).diff(), expected)


@pytest.mark.parametrize("scheme", ["stratified", "antithetic", "orthogonal"])
@pytest.mark.parametrize("proposal", ["uniform", "matched", "mismatched", "with zeros"])
def test_each_band_estimates_its_mean_under_p_whatever_the_proposal(scheme: Scheme, proposal: str) -> None:
    """Three bands of 50 timesteps, so that two timesteps lie across edges."""
    draws = many_draws(proposal, scheme, 18, 3)
    terms = (draws.weights * integrand(draws.timesteps, draws.noise)).split(draws.band_sizes, dim=1)
    expected = reference.band_means(3 * LEVEL, ONE_EACH, 3)
    for term, mean in zip(terms, expected, strict=True):
        assert_unbiased(term.sum(1) * 3 / 18, float(mean), 0.15)


@pytest.mark.parametrize("proposal", ["uniform", "matched", "mismatched", "with zeros"])
@pytest.mark.parametrize(("scheme", "pair"), [("stratified", 1), ("antithetic", 2)])
def test_one_point_falls_in_each_stratum_of_each_band(proposal: str, scheme: Scheme, pair: int) -> None:
    draws = sample_draws(PROPOSALS[proposal], [1], num_draws=18, num_bands=3, scheme=scheme, ids=range(200))
    num_strata = torch.tensor(draws.band_sizes) // pair
    masses = reference.band_masses(PROPOSALS[proposal].density, ONE_EACH, 3)
    widths = (masses / num_strata).repeat_interleave(num_strata)
    stops = widths.cumsum(0)
    upper = PROPOSALS[proposal].density.cumsum(0)
    lower = upper - PROPOSALS[proposal].density
    timesteps = draws.timesteps[:, ::pair]
    assert bool((upper[timesteps] > stops - widths - 1e-12).all())
    assert bool((lower[timesteps] < stops + 1e-12).all())


SLOPED = Proposal(
    torch.full((8,), 0.125, dtype=torch.float64), torch.tensor([6, 6, 1, 1, 0.5, 0.5, 0.5, 0.5]).double() / 16
)
"""Four bands of two timesteps with 12, 2, 1 and 1 sixteenths of q."""


@pytest.mark.parametrize(
    ("num_draws", "scheme", "expected"),
    [
        (4, "stratified", (1, 1, 1, 1)),
        (8, "stratified", (2, 2, 2, 2)),  # two halves of a draw each are all there is
        (12, "stratified", (9, 1, 1, 1)),
        (20, "stratified", (15, 3, 1, 1)),
        (32, "stratified", (24, 4, 2, 2)),
        (64, "stratified", (48, 8, 4, 4)),
        (64, "orthogonal", (48, 8, 4, 4)),
        (40, "antithetic", (30, 6, 2, 2)),
        (64, "iid", (16, 16, 16, 16)),
        (8, "grid", (2, 2, 2, 2)),
    ],
)
def test_bands_get_draws_in_proportion_to_their_mass_in_units_and_a_unit_at_least(
    num_draws: int, scheme: Scheme, expected: tuple[int, ...]
) -> None:
    assert band_sizes(SLOPED, num_draws, 4, scheme) == expected


@pytest.mark.parametrize("scheme", UNBIASED)
def test_the_uniform_proposal_gives_all_bands_as_many_draws(scheme: Scheme) -> None:
    for num_bands, per_band in itertools.product((1, 3, 5), (2, 4, 6)):
        assert band_sizes(uniform_proposal(7), num_bands * per_band, num_bands, scheme) == (per_band,) * num_bands


@pytest.mark.parametrize("scheme", ["stratified", "antithetic", "orthogonal"])
@pytest.mark.parametrize("proposal", ["matched", "mismatched", "with zeros"])
def test_band_sizes_are_whole_units_that_add_up_to_all_draws(scheme: Scheme, proposal: str) -> None:
    pair = 1 if scheme == "stratified" else 2
    for num_bands, units in itertools.product((1, 2, 5, 8), (1, 2, 3, 4, 7, 8)):
        sizes = band_sizes(PROPOSALS[proposal], num_bands * units * pair, num_bands, scheme)
        unit = pair * (2 if units % 2 == 0 else 1)
        assert (len(sizes), sum(sizes)) == (num_bands, num_bands * units * pair)
        assert min(sizes) >= unit
        assert not any(size % unit for size in sizes)


def test_bands_in_proportion_to_the_proposal_have_less_variance_than_equal_ones() -> None:
    loud_first, equal = many_draws("matched", "stratified", 12, 4), many_draws("uniform", "stratified", 12, 4)
    assert loud_first.band_sizes[0] > equal.band_sizes[0]
    assert float(estimate(loud_first).var()) < 0.5 * float(estimate(equal).var())


FINE = 2**12


def points_of(ids: range, scheme: Scheme, num_draws: int, **names: Any) -> Tensor:
    """Return where in [0, 1) the first draw of each id fell, to one part in 4096, in increasing order."""
    draws = sample_draws(uniform_proposal(FINE), [1], num_draws=num_draws, scheme=scheme, ids=ids, **names)
    return (draws.timesteps[:, 0].double() + 0.5).sort().values / FINE


def discrepancy(points: Tensor) -> float:
    """Return the star discrepancy of sorted points: how far their distribution function is from the uniform one."""
    ranks = torch.arange(len(points) + 1, dtype=torch.float64) / len(points)
    return float(torch.maximum((ranks[1:] - points).max(), (points - ranks[:-1]).max()))


@pytest.mark.parametrize(("scheme", "num_draws"), [("stratified", 1), ("antithetic", 2), ("orthogonal", 2)])
@pytest.mark.parametrize("start", [0, 2**40])
def test_neighbouring_ids_with_one_draw_each_fill_the_timesteps_evenly(
    scheme: Scheme, num_draws: int, start: int
) -> None:
    ids = range(start, start + 500)
    assert discrepancy(points_of(ids, scheme, num_draws)) < 4 / 500
    assert discrepancy(points_of(ids, "iid", num_draws)) > 8 / 500  # 19/500 is usual for independent points


def test_ids_with_several_draws_are_independent_of_one_another() -> None:
    assert discrepancy(2 * points_of(range(500), "stratified", 2)) > 8 / 500


def test_one_draw_belongs_to_an_id_and_not_to_its_batch() -> None:
    together = sample_draws(PROPOSALS["matched"], [2], num_draws=1, ids=[11, 5, -7])
    alone = sample_draws(PROPOSALS["matched"], [2], num_draws=1, ids=[-7])
    for name in ("timesteps", "noise", "weights"):
        assert torch.equal(getattr(together, name)[2:], getattr(alone, name))


@pytest.mark.parametrize("id_", [7, -(2**55)])
def test_one_draw_of_an_id_is_uniform_over_seeds(id_: int) -> None:
    points = torch.cat([points_of(range(id_, id_ + 1), "stratified", 1, seed=seed) for seed in range(SEEDS)])
    assert discrepancy(points.sort().values) < 2 / SEEDS**0.5  # exceeded by chance once in 1,500


def test_one_draw_of_each_id_has_a_noise_of_its_own() -> None:
    noise = sample_draws(uniform_proposal(10), [2], num_draws=1, ids=range(SEEDS)).noise[:, 0].double()
    assert len(noise.unique(dim=0)) == SEEDS
    assert abs(float((noise[1:] * noise[:-1]).mean())) < 4 / (2 * SEEDS) ** 0.5


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
        ({"num_draws": 1, "scheme": "orthogonal"}, r"`num_draws` must be even for `scheme` orthogonal, got 1; use 2\."),
        (
            {"num_draws": 6, "num_bands": 4},
            r"`num_bands` must divide the number of draws \(pairs, for `scheme` stratified\), got 4 for 6 draws; use",
        ),
        (
            {"num_draws": 6, "num_bands": 6, "scheme": "antithetic"},
            r"`num_bands` must divide the number of draws \(pairs, for `scheme` antithetic\), got 6 for 6 draws; use",
        ),
        (
            {"num_draws": 51, "scheme": "grid"},
            r"`num_draws` must be at most the number of timesteps \(=50\) for `scheme` grid, got 51; use fewer\.",
        ),
        ({"num_draws": 2, "scheme": "sobol"}, r"`scheme` must be one of stratified, .*, got 'sobol'\."),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_what_does_not_fit_the_scheme_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        sample_draws(uniform_proposal(50), [1], **arguments)


@pytest.mark.parametrize("values", [[1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")], [0.0, 0.0]])
def test_a_magnitude_must_be_finite_and_positive_somewhere(values: list[float]) -> None:
    with pytest.raises(ArgumentError, match="`magnitude` must be finite, not negative and not zero everywhere"):
        importance_proposal(torch.tensor(values))


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_the_defensive_share_must_be_a_share(share: float) -> None:
    with pytest.raises(ArgumentError, match=rf"`defensive_share` must be in \(0, 1\], got {share}; use 0.1\."):
        importance_proposal(LEVEL, share)


def test_a_query_and_an_example_have_independent_points_where_examples_are_stratified_together() -> None:
    """A product of two features is then an estimate of the product of their means."""
    waves = []
    for seed in range(SEEDS):
        draws = sample_draws(uniform_proposal(NUM_TIMESTEPS), [1], num_draws=1, seed=seed, ids=[-987654321987654, 5])
        waves.append(torch.sin(2 * torch.pi * draws.timesteps[:, 0].double() / NUM_TIMESTEPS).prod())
    products = torch.stack(waves)
    assert abs(float(products.mean())) < 4 * float(products.std()) / SEEDS**0.5


@pytest.mark.usefixtures("as_users_run_it")
def test_fewer_than_one_band_is_refused() -> None:
    with pytest.raises(ArgumentError, match="`num_bands` must be at least 1, got 0; 4 is the default"):
        sample_draws(uniform_proposal(50), [1], num_draws=2, num_bands=0)
