"""Variances against torch, a known hierarchy of Gaussians, and brute force over K."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from carv_attrib.errors import ArgumentError
from carv_attrib.variance import (
    Costs,
    Measured,
    RunningVariance,
    VarianceComponents,
    effective_compute_multiplier,
    mean_and_error,
    relative_efficiency,
    variance_components,
)


def normals(*shape: int, seed: int = 0) -> Tensor:
    """Return N(0, 1) numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def running(replicates: Tensor) -> RunningVariance:
    """Return the variance of replicates added one by one."""
    result = RunningVariance()
    for replicate in replicates:
        result.add(replicate)
    return result


def test_the_running_variance_is_that_of_all_replicates_at_once() -> None:
    replicates = normals(50, 4, 3) * torch.tensor([1.0, 10.0, 0.1]) + 5
    torch.testing.assert_close(running(replicates).total_variance(), replicates.var(0).sum(-1))
    torch.testing.assert_close(running(replicates).mean, replicates.mean(0))
    assert running(replicates[:2]).total_variance().shape == (4,)


def test_the_running_variance_of_one_vector_is_a_number() -> None:
    replicates = normals(7, 3)
    torch.testing.assert_close(running(replicates).total_variance(), replicates.var(0).sum())


def test_the_order_of_replicates_changes_rounding_only() -> None:
    replicates = normals(200, 2, 3)
    backwards = running(replicates.flip(0)).total_variance()
    torch.testing.assert_close(backwards, running(replicates).total_variance(), rtol=1e-12, atol=0)


def test_a_mean_a_billion_times_the_spread_leaves_the_variance_right() -> None:
    replicates = normals(1000, 1, 2)
    far = running(replicates + 1e9).total_variance()
    torch.testing.assert_close(far, replicates.var(0).sum(-1), rtol=1e-6, atol=0)


def test_float32_replicates_are_summed_in_float64() -> None:
    replicates = normals(1000, 1, 2).float() + 100
    torch.testing.assert_close(running(replicates).total_variance(), replicates.double().var(0).sum(-1))


@pytest.mark.parametrize("count", [0, 1])
def test_a_variance_needs_two_replicates(count: int) -> None:
    with pytest.raises(ArgumentError, match=rf"a variance needs at least 2 replicates, got {count}; add more\."):
        running(normals(count, 2, 3)).total_variance()


def hierarchy(examples: int, num_upstream: int, num_draws: int, seed: int) -> Tensor:
    """Return draws with V_up = 3 and V_draw = 8 * 1.25: spreads of (1, 1, 1) and of (2, 2, 0) or half as much more."""
    centre = 100 * normals(examples, 1, 1, 3, seed=seed)
    upstream = normals(examples, num_upstream, 1, 3, seed=seed + 1)
    scale = torch.tensor([1.0, 1.5**0.5]).repeat_interleave((examples + 1) // 2)[:examples]  # mean square 1.25
    spread = torch.tensor([2.0, 2.0, 0.0], dtype=torch.float64)
    draws = normals(examples, num_upstream, num_draws, 3, seed=seed + 2) * scale.view(-1, 1, 1, 1) * spread
    return centre + upstream + draws


@pytest.mark.parametrize(("num_upstream", "num_draws"), [(3, 2), (2, 5)])
def test_variance_components_are_those_of_the_hierarchy_on_average(num_upstream: int, num_draws: int) -> None:
    found = [variance_components(hierarchy(100, num_upstream, num_draws, 3 * i)) for i in range(400)]
    for name, expected in (("upstream", 3.0), ("draw", 10.0)):
        values = torch.tensor([getattr(x, name) for x in found], dtype=torch.float64)
        assert float(values.min()) > 0  # none cut off at zero, which would be a bias
        standard_error = float(values.std()) / 20
        assert abs(float(values.mean()) - expected) < 4 * standard_error
        assert standard_error < 0.02 * expected


def test_the_components_foretell_the_variance_of_a_mean_over_both() -> None:
    components = VarianceComponents(upstream=3.0, draw=10.0)
    means = hierarchy(20_000, 4, 5, 0).mean((1, 2)) - 100 * normals(20_000, 3, seed=0).view(20_000, 3)
    squares = means.square().sum(-1)
    assert abs(float(squares.mean()) - components.variance(4.0, 5.0)) < 4 * float(squares.std()) / 20_000**0.5


def test_without_upstream_variance_the_component_is_not_negative() -> None:
    found = [variance_components(normals(3, 3, 2, 2, seed=i)) for i in range(100)]
    assert min(x.upstream for x in found) == 0
    assert 20 < sum(x.upstream == 0 for x in found) < 80


@pytest.mark.parametrize(("num_upstream", "num_draws"), [(1, 4), (4, 1)])
def test_components_need_two_of_each(num_upstream: int, num_draws: int) -> None:
    message = rf"need at least 2 upstream draws of 2 noise draws, got {num_upstream} of {num_draws}\."
    with pytest.raises(ArgumentError, match=message):
        variance_components(normals(3, num_upstream, num_draws, 2))


@pytest.mark.parametrize(("upstream", "draw"), [(3.0, 10.0), (0.1, 10.0), (5.0, 0.5)])
@pytest.mark.parametrize("costs", [Costs(1.0, 1.0), Costs(7.0, 0.3), Costs(0.2, 1.0)])
def test_the_optimal_number_of_draws_has_the_least_variance_times_cost(
    upstream: float, draw: float, costs: Costs
) -> None:
    components = VarianceComponents(upstream, draw)
    candidates = torch.linspace(1, 100, 9_901, dtype=torch.float64).tolist()
    products = torch.tensor([components.variance(1.0, k) * costs.of(1.0, k) for k in candidates], dtype=torch.float64)
    assert components.optimal_num_draws(costs) == pytest.approx(candidates[int(products.argmin())], abs=0.01)


def test_more_upstream_draws_buy_as_much_variance_as_they_cost() -> None:
    components, costs = VarianceComponents(3.0, 10.0), Costs(7.0, 0.3)
    assert costs.of(1.0, 4.0) == pytest.approx(8.2)
    assert components.variance(6.0, 4.0) * costs.of(6.0, 4.0) == pytest.approx(
        components.variance(1.0, 4.0) * costs.of(1.0, 4.0)
    )


def test_without_upstream_variance_one_encoding_takes_all_draws() -> None:
    assert VarianceComponents(0.0, 1.0).optimal_num_draws(Costs(1.0, 1.0)) == math.inf


def test_relative_efficiency_is_the_ratio_of_mean_variances() -> None:
    measured = relative_efficiency(torch.tensor([1.0, 7.0]), torch.tensor([1.0, 1.0]))
    assert measured.value == 4.0
    assert relative_efficiency(torch.tensor([6.0, 2.0]), torch.tensor([3.0, 1.0])) == Measured(2.0, 0.0)


def test_the_bootstrap_error_of_an_efficiency_is_its_spread_over_new_examples() -> None:
    def measure(seed: int) -> Measured:
        common, own = normals(60, seed=2 * seed).exp(), normals(60, seed=2 * seed + 1)
        return relative_efficiency(3 * common * (0.3 * own).exp(), common, num_bootstrap=300)

    found = [measure(seed) for seed in range(300)]
    values = torch.tensor([x.value for x in found])
    errors = torch.tensor([x.standard_error for x in found])
    assert float(errors.square().mean().sqrt()) == pytest.approx(float(values.std()), rel=0.2)
    assert float(values.mean()) == pytest.approx(3 * math.exp(0.045), rel=0.03)


def test_a_multiplier_is_the_efficiency_times_the_ratio_of_costs() -> None:
    assert effective_compute_multiplier(Measured(3.0, 0.5), 2.0, 8.0) == Measured(0.75, 0.125)


def test_the_mean_of_independent_values_comes_with_its_standard_error() -> None:
    measured = mean_and_error([1.0, 2.0, 3.0, 6.0])
    assert measured.value == 3.0
    assert measured.standard_error == pytest.approx((14 / 3 / 4) ** 0.5)
