"""LDS against planted effects, its ceiling against simulated retraining, standard errors against repetition."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from carv_attrib.errors import ArgumentError
from carv_attrib.metrics import (
    linear_datamodeling_score,
    measured,
    predicted_losses,
    ranks,
    resampled_lds,
    resampled_means,
    seed_ceiling,
    spearman,
    top_k_effect,
    top_k_overlap,
)
from carv_attrib.seeding import stream

NUM_TRAIN, NUM_QUERIES = 60, 20


def retrained(
    effects: np.ndarray, num_subsets: int, num_seeds: int, noise: float | np.ndarray, *names: str | int
) -> tuple[np.ndarray, np.ndarray]:
    """Return masks, and losses (subsets, seeds, queries) that fall by the effect of each example in a subset."""
    generator = stream(0, "retrained", *names)
    masks = generator.random((num_subsets, effects.shape[1])) < 0.5
    expected = -(masks @ effects.T)
    scaled = (expected - expected.mean(0)) / expected.std(0)
    return masks, scaled[:, None] + noise * generator.standard_normal((num_subsets, num_seeds, len(effects)))


@pytest.fixture
def effects() -> np.ndarray:
    return stream(0, "effects").standard_normal((NUM_QUERIES, NUM_TRAIN))


def test_rank_correlation_is_that_of_scipy_with_ties_and_is_zero_for_constants() -> None:
    first, second = (stream(0, name).integers(4, size=(30, 5)).astype(float) for name in "ab")
    expected = [spearmanr(a, b).statistic for a, b in zip(first.T, second.T, strict=True)]
    np.testing.assert_allclose(spearman(first, second), expected)
    second[:, 0] = 1.0
    assert spearman(first, second)[0] == 0


def test_true_effects_predict_perfectly_their_negatives_the_opposite_and_others_nothing(effects: np.ndarray) -> None:
    masks, losses = retrained(effects, 64, 1, 0.0)
    scores = {"true": effects, "negative": -effects, "other": np.roll(effects, 1, axis=0)}
    predicted = {name: predicted_losses(own, masks) for name, own in scores.items()}
    found = linear_datamodeling_score(predicted, losses[:, 0], num_bootstrap=100)
    assert found["true"].value == pytest.approx(1.0)
    assert found["negative"].value == pytest.approx(-1.0)
    assert abs(found["other"].value) < 4 * found["other"].standard_error


def test_the_ceiling_is_the_lds_of_true_effects(effects: np.ndarray) -> None:
    masks, losses = retrained(effects, 400, 2, 0.8)
    best = linear_datamodeling_score({"true": predicted_losses(effects, masks)}, losses.mean(1), num_bootstrap=100)
    seed_to_seed, ceiling = seed_ceiling(losses)
    assert seed_to_seed.value < ceiling.value
    assert ceiling.value == pytest.approx(best["true"].value, abs=0.02)
    assert 0 < ceiling.standard_error < 0.02


def test_the_ceiling_is_an_upper_bound_where_queries_differ(effects: np.ndarray) -> None:
    masks, losses = retrained(effects, 400, 2, np.geomspace(0.2, 5, NUM_QUERIES))
    best = linear_datamodeling_score({"true": predicted_losses(effects, masks)}, losses.mean(1), num_bootstrap=2)
    assert seed_ceiling(losses)[1].value > best["true"].value + 0.02


def test_opposite_seeds_have_a_ceiling_of_zero() -> None:
    losses = np.arange(4.0)[:, None, None] * np.array([1.0, -1.0])[:, None]
    seed_to_seed, ceiling = seed_ceiling(losses)
    assert (seed_to_seed.value, ceiling.value) == (-1, 0)


@pytest.mark.parametrize("qualities", [[1.0], [-0.6, 1.0]], ids=["subsets", "queries"])
def test_standard_errors_are_the_spread_over_subsets_and_queries(qualities: list[float]) -> None:
    """What differs most is either the subsets, whose luck hits all queries, or how well a query is predicted."""
    values, errors = [], []
    for repetition in range(60):
        generator = stream(0, "repetition", repetition)
        common = generator.standard_normal((1, NUM_TRAIN))
        effects = common + 0.3 * generator.standard_normal((NUM_QUERIES, NUM_TRAIN))
        masks, losses = retrained(effects, 30, 1, 0.5, repetition)
        losses = losses[:, 0] + generator.standard_normal((30, 1))
        predicted = {"ours": predicted_losses(generator.choice(qualities, size=(NUM_QUERIES, 1)) * effects, masks)}
        found = linear_datamodeling_score(predicted, losses, num_bootstrap=50)["ours"]
        values.append(found.value)
        errors.append(found.standard_error)
    assert 0.8 < np.sqrt(np.mean(np.square(errors))) / np.std(values, ddof=1) < 1.4


def test_differences_of_paired_methods_have_smaller_errors_than_the_methods(effects: np.ndarray) -> None:
    masks, losses = retrained(effects, 40, 1, 1.0)
    like = effects + 0.2 * stream(0, "errors").standard_normal(effects.shape)
    predicted = {name: predicted_losses(own, masks) for name, own in (("a", effects), ("b", like))}
    alone = linear_datamodeling_score(predicted, losses[:, 0], num_bootstrap=200)
    resampled = resampled_lds(predicted, losses[:, 0], num_bootstrap=200)
    difference = {name: measured(values - resampled["a"]) for name, values in resampled.items()}
    assert difference["a"].value == difference["a"].standard_error == 0
    assert difference["b"].value == pytest.approx(alone["b"].value - alone["a"].value)
    assert difference["b"].standard_error < 0.5 * alone["b"].standard_error


def test_errors_of_means_over_queries_are_those_of_independent_values_and_differences_are_paired() -> None:
    values = stream(0, "figures").standard_normal(200)
    resampled = resampled_means({"a": values, "b": values + 1})
    found = measured(resampled["a"])
    assert found.value == values.mean()
    assert found.standard_error == pytest.approx(values.std(ddof=1) / 200**0.5, rel=0.1)
    difference = measured(resampled["b"] - resampled["a"])
    assert (difference.value, difference.standard_error) == pytest.approx((1, 0), abs=1e-12)


def test_the_overlap_is_the_share_of_common_examples_in_the_top_k() -> None:
    first = np.array([[5.0, 4.0, 3.0, 2.0, 1.0]] * 3)
    second = np.array([[5.0, 4.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0, 5.0], [4.0, 1.0, 5.0, 2.0, 3.0]])
    np.testing.assert_allclose(top_k_overlap(first, second, 2), [1, 0, 1 / 2])
    np.testing.assert_allclose(top_k_overlap(first, second, 5), 1)
    random = [stream(0, name).random((50, 400)) for name in "ab"]
    assert top_k_overlap(random[0], random[1], 100).mean() == pytest.approx(0.25, abs=0.02)


def test_the_effect_of_a_top_k_is_its_true_sum_where_nothing_else_has_one_and_the_slope_of_a_regression_else() -> None:
    generator = stream(0, "effect of a top k")
    masks = generator.random((30, 50)) < 0.5
    scores = generator.standard_normal((3, 50))
    saved = np.where(scores >= np.sort(scores, axis=1)[:, [-7]], [[0.5], [1.0], [-2.0]], 0.0)
    alone = 4.0 - masks @ saved.T
    np.testing.assert_allclose(top_k_effect(scores, masks, alone, 7), [3.5, 7.0, -14.0])
    np.testing.assert_array_equal(top_k_effect(scores, masks[:1].repeat(4, 0), alone[:4], 7), [0.0, 0.0, 0.0])
    others = alone + generator.standard_normal((30, 3))
    counts = masks.astype(float) @ (saved != 0).T
    slopes = [np.polyfit(counts[:, query], others[:, query], 1)[0] for query in range(3)]
    np.testing.assert_allclose(top_k_effect(scores, masks, others, 7), -7 * np.array(slopes))


def test_ranks_count_from_one_and_equal_scores_count_against_an_example() -> None:
    scores = np.array([[3.0, 9.0, 5.0], [3.0, 9.0, 5.0], [2.0, 2.0, 2.0]])
    assert ranks(scores, np.array([1, 0, 0])).tolist() == [1, 3, 3]


def test_a_top_k_that_is_no_part_of_the_examples_is_refused() -> None:
    for top_k in (0, 5):
        with pytest.raises(ArgumentError, match=rf"`top_k` must be from 1 to the number .* \(=4\), got {top_k}\."):
            top_k_overlap(np.zeros((2, 4)), np.zeros((2, 4)), top_k)


def test_too_few_subsets_or_seeds_or_queries_are_refused() -> None:
    with pytest.raises(ArgumentError, match="a standard error over queries needs at least 2 of them, got 1; add some"):
        resampled_means({"a": np.zeros(1)})
    with pytest.raises(ArgumentError, match="a rank correlation over subsets needs at least 3 of them, got 2"):
        linear_datamodeling_score({"a": np.zeros((2, 4))}, np.zeros((2, 4)))
    with pytest.raises(ArgumentError, match="a ceiling needs models of at least 2 seeds for each subset, got 1"):
        seed_ceiling(np.zeros((5, 1, 4)))
