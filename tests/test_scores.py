"""Errors of scores against the spread of fresh draws, and probabilities against how often they come true."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from carv_attrib.scores import CONFIDENCE, BandScores, join, mean, score_bands

DIM = 3
ONES = torch.ones(DIM).double()


def noisy_features(
    runs: int,
    *,
    replicates: int,
    queries: int = 1,
    train: int = 1,
    noise: float = 0.5,
    of_bands: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return features (runs, examples, bands, replicates, DIM) whose noise all examples share, and expected scores."""
    generator, bands = torch.Generator().manual_seed(seed), len(of_bands)
    scale = noise * torch.tensor(of_bands).double().view(-1, 1, 1)
    means = torch.randn(queries + train, bands, 1, DIM, generator=generator).double()
    loadings = torch.rand(queries + train, 1, 1, 1, generator=generator).double() + 0.5
    shared = torch.randn(runs, 1, bands, replicates, DIM, generator=generator).double() * scale
    features = means + loadings * shared
    query, examples = features[:, :queries], features[:, queries:]
    expected = torch.einsum("qbd,nbd->qn", means[:queries, :, 0], means[queries:, :, 0]) / bands
    product = loadings[:queries].view(-1, 1) * loadings[queries:].view(1, -1)
    return query, examples, expected + product * DIM * scale.square().mean() / replicates


def test_standard_errors_meet_the_spread_over_fresh_draws() -> None:
    query, train, expected = noisy_features(4000, replicates=2)
    found = [score_bands(q, t, ONES) for q, t in zip(query, train, strict=True)]
    scores = torch.cat([each.scores for each in found])
    estimate = torch.cat([each.standard_errors for each in found]).square().mean().sqrt()
    assert scores.mean() == pytest.approx(float(expected), abs=4 * float(scores.std()) / 4000**0.5)
    assert 0.97 < estimate / scores.std() < 1.12  # to first order equal; from above to second
    assert found[0].degrees_of_freedom == 4


@pytest.mark.parametrize("kind", ["linear", "noise", "both"])
def test_products_of_two_replicates_tell_the_variance_of_their_mean(kind: str) -> None:
    """Noise of its own on each side, in many dimensions: halves differ far more than their mean where it multiplies."""
    generator, runs, dim = torch.Generator().manual_seed(0), 4000, 40
    sizes = {"linear": (3.0, 0.1), "noise": (0.0, 1.0), "both": (1.0, 1.0)}[kind]
    means = sizes[0] * torch.randn(2, 1, 4, 1, dim, generator=generator).double()
    query, train = means + sizes[1] * torch.randn(2, runs, 4, 2, dim, generator=generator).double()
    every = [score_bands(q[None], t[None], torch.ones(dim).double()) for q, t in zip(query, train, strict=True)]
    variance = torch.cat([each.scores for each in every]).var()
    estimate = torch.cat([each.standard_errors for each in every]).square().mean()
    assert 0.95 < estimate / variance < 1.9  # from above: the largest of three


def test_two_replicates_are_the_contrasts_of_equation_10() -> None:
    query, train, _ = noisy_features(1, replicates=2, queries=2, train=5)
    found = score_bands(query[0], train[0], ONES)
    products = torch.einsum("qbrd,nbsd->rsbqn", query[0], train[0])
    like, unlike = (
        pair.square().sum(0) / 64 for pair in (products[0, 0] - products[1, 1], products[0, 1] - products[1, 0])
    )
    excess = ((products[0, 0] + products[1, 1] - products[0, 1] - products[1, 0]) / 2).var(0) / 4
    both = like + unlike
    expected = torch.stack([both / 2 - excess / 4, like - 3 * excess / 4, (both + excess) / 8]).amax(0)
    torch.testing.assert_close(found.standard_errors, expected.sqrt())


@pytest.mark.parametrize("of_bands", [(1.0, 1.0, 1.0, 1.0), (1.0, 0.5, 0.1, 0.1), (1.0, 0.0, 0.0, 0.0)])
def test_intervals_hold_the_expected_score_as_often_as_they_say(of_bands: tuple[float, ...]) -> None:
    query, train, expected = noisy_features(3000, replicates=2, noise=0.3, of_bands=of_bands)
    inside = []
    for q, t in zip(query, train, strict=True):
        found = score_bands(q, t, ONES)
        inside.append(bool((found.scores - expected).abs() <= found.half_widths))
    assert -0.03 < sum(inside) / 3000 - CONFIDENCE < 0.06  # a standard error of 0.005


def test_probabilities_come_true_as_often_as_they_say() -> None:
    query, train, expected = noisy_features(300, replicates=2, train=30, noise=0.4)
    true = torch.zeros(30)
    true[expected[0].topk(5).indices] = 1
    probabilities = torch.stack(
        [score_bands(q, t, ONES).top_probabilities(5)[0] for q, t in zip(query, train, strict=True)]
    )
    torch.testing.assert_close(probabilities.sum(1), torch.full((300,), 5.0).double())
    for low, high in ((0.05, 0.35), (0.35, 0.65), (0.65, 0.95), (0.95, 1.01)):
        chosen = (probabilities >= low) & (probabilities < high)
        assert abs(probabilities[chosen].mean() - true.expand(300, 30)[chosen].mean()) < 0.12


def test_noise_that_lifts_all_examples_alike_leaves_the_ranking_sure() -> None:
    """Draws are shared: what moves every score by as much does not change who is first."""
    bands = torch.tensor([[5.0, 4.0, 1.0, 0.0]]).double().expand(4, 1, 4).clone()
    shift = torch.tensor([3.0, 0.0, 0.0]).double().view(3, 1, 1, 1).expand(3, 4, 1, 4)
    sure = BandScores(bands, shift).top_probabilities(2)
    assert sure.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    unsure = BandScores(bands, shift * torch.tensor([1.0, 1.0, 1.0, -1.0])).top_probabilities(2)
    assert 0 < float(unsure[0, 3]) < 1


def test_without_replicates_bands_stand_in_and_one_band_has_no_error() -> None:
    query = torch.ones(1, 4, 1, 1).double()
    train = torch.tensor([1.0, 3.0, 1.0, 3.0]).double().view(1, 4, 1, 1)
    found = score_bands(query, train, torch.ones(1).double())
    assert found.standard_errors.item() == pytest.approx((4 / 3) ** 0.5 / 2)
    assert found.degrees_of_freedom == 3
    for missing in (
        score_bands(query[:, :1], train[:, :1], torch.ones(1).double()),
        score_bands(query, train, torch.ones(1).double(), independent=False),
    ):
        assert missing.degrees_of_freedom == 0
        for values in (missing.standard_errors, missing.half_widths, missing.top_probabilities(1)):
            assert math.isnan(values.item())


def test_parts_are_joined_and_chosen_from_and_scaled() -> None:
    query, train, _ = noisy_features(1, replicates=2, queries=2, train=5)
    whole = score_bands(query[0], train[0], ONES)
    joined = join([score_bands(query[0], rows, ONES) for rows in train[0].split(2)])
    torch.testing.assert_close(joined.scores, whole.scores)
    torch.testing.assert_close(joined.standard_errors, whole.standard_errors)
    chosen = whole.select(torch.tensor([4, 0]).numpy()).scaled(-1.0)
    torch.testing.assert_close(chosen.scores, -whole.scores[:, [4, 0]])
    torch.testing.assert_close(chosen.standard_errors, whole.standard_errors[:, [4, 0]])


def test_sums_of_groups_have_the_errors_of_sums() -> None:
    """Draws are shared, so errors add up with their signs; as the scores of summed features."""
    query, train, _ = noisy_features(1, replicates=2, queries=2, train=9)
    groups = torch.tensor([0, 1, 0, 2, 1, 0, 2, 2, 0])
    summed = torch.zeros(3, *train[0].shape[1:]).double().index_add_(0, groups, train[0])
    expected = score_bands(query[0], summed, ONES)
    first, second = (score_bands(query[0], train[0][rows], ONES) for rows in (slice(2), slice(2, 9)))
    found = first.add_up(groups[:2], 3) + second.add_up(groups[2:], 3)
    torch.testing.assert_close(found.scores, expected.scores)
    torch.testing.assert_close(found.standard_errors, expected.standard_errors)


def test_the_mean_of_two_teachers_has_the_errors_of_draws_that_they_share() -> None:
    query, train, _ = noisy_features(1, replicates=2, queries=2, train=5)
    one = score_bands(query[0], train[0], ONES)
    torch.testing.assert_close(mean([one, one]).standard_errors, one.standard_errors)  # not smaller by a root of two
    assert (mean([one, one.scaled(-1.0)]).standard_errors == 0).all()
    torch.testing.assert_close(mean([one, one.scaled(3.0)]).scores, 2 * one.scores)


@pytest.mark.parametrize("replicates", [1, 2])
def test_shares_sum_to_one_and_have_the_errors_of_a_ratio(replicates: int) -> None:
    """Against a numeric derivative of the ratio along each deviation, or contrast of products."""
    query, train, _ = noisy_features(1, replicates=replicates, queries=2, train=6)
    whole = score_bands(query[0], train[0], ONES)
    kept = whole.positive()
    assert (kept.scores == whole.scores.clamp(min=0)).all()
    shares = kept.shares()
    torch.testing.assert_close(shares.scores.sum(1), torch.ones(2).double())
    of_both = [each.deviations if each.crossed is None else each.crossed.flatten(0, 1) for each in (kept, shares)]
    for deviation, moved in zip(*of_both, strict=True):
        step = 1e-6 * deviation
        up, down = ((kept.scores + s) / (kept.scores + s).sum(1, keepdim=True) for s in (step, -step))
        torch.testing.assert_close(moved, (up - down) / 2e-6, rtol=1e-4, atol=1e-8)


def test_thousands_of_groups() -> None:
    num = 20_000
    bands = torch.arange(4 * num).double().view(4, 1, num)
    groups = torch.arange(num) % 5000
    found = BandScores(bands, None).add_up(groups, 5000)
    torch.testing.assert_close(found.scores[0, 7], bands.mean(0)[0, 7::5000].sum())
    assert found.standard_errors.shape == (1, 5000)
