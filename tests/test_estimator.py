"""Bands, kernel vectors and random encodings: what is averaged, under which distribution, and of whose noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from carv_attrib import Attributor, featurize, load_teacher
from carv_attrib.augmentation import augment
from carv_attrib.config import EstimatorConfig, FeaturizeConfig
from carv_attrib.errors import DataError
from carv_attrib.estimator import (
    Encoded,
    Estimator,
    GradientProfile,
    average_bands,
    build_estimator,
    mean_square_products,
    root_weighted,
)
from carv_attrib.sampling import Draws, Proposal, importance_proposal, sample_draws, uniform_proposal
from carv_attrib.seeding import stream
from tests import reference
from tests.conftest import SETTINGS, TinyTeacher

NUM_TIMESTEPS = 20
LEVEL = torch.exp(-torch.arange(NUM_TIMESTEPS, dtype=torch.float64) / 5)
ONE_EACH = torch.ones(NUM_TIMESTEPS, dtype=torch.int64)
PROPOSALS = {
    "uniform": uniform_proposal(NUM_TIMESTEPS),
    "matched": importance_proposal(LEVEL),
    "mismatched": importance_proposal(LEVEL.flip(0)),
}
SEEDS = 500


def gradients(draws: Draws, slope: float) -> Tensor:
    """Return weighted gradients of one dimension; the unweighted ones have mean LEVEL and mean product 2 LEVEL^2."""
    values = LEVEL[draws.timesteps] * (1 + slope * draws.noise[..., 0].double())
    return (draws.weights * values)[..., None].float()


def draws_of(proposal: Proposal, config: EstimatorConfig) -> Draws:
    """Return the draws of 500 ids, as an estimator takes them for one encoding."""
    num_bands = 1 if config.every_draw_a_band else config.num_bands
    settings: Any = {"num_draws": config.num_draws, "num_bands": num_bands, "scheme": config.scheme}
    return sample_draws(proposal, [1], **settings, ids=range(SEEDS))


def assert_mean(values: Tensor, expected: float, precision: float = 0.1) -> None:
    """Check a mean over rows within four standard errors, small enough for that to mean something."""
    standard_error = float(values.double().std()) / len(values) ** 0.5
    assert abs(float(values.double().mean()) - expected) < 4 * standard_error
    assert standard_error < precision * abs(expected)


def test_bands_and_halves_average_the_right_draws() -> None:
    features = torch.arange(8.0).view(1, 8, 1)
    draws = sample_draws(uniform_proposal(8), [1], num_draws=8, num_bands=2)
    config = EstimatorConfig(num_draws=8, num_bands=2)
    halves = average_bands(features, draws, config).flatten(1)
    assert halves.tolist() == [[1.0, 2.0, 5.0, 6.0]]  # (0, 2), (1, 3), (4, 6), (5, 7)
    for scheme in ("antithetic", "orthogonal"):
        pairs = replace(config, scheme=scheme)
        assert average_bands(features, draws, pairs).flatten(1).tolist() == [[0.5, 2.5, 4.5, 6.5]]  # pairs together
    assert average_bands(features, draws, EstimatorConfig(num_draws=8, num_bands=8)).shape == (1, 8, 1, 1)


def test_bands_of_several_encodings_average_over_them() -> None:
    """Two encodings of six draws, in bands of five and one: means (2, 8) and (5, 11), times B n / K."""
    features = torch.arange(12.0).view(1, 12, 1)
    draws = replace(sample_draws(uniform_proposal(8), [1], num_draws=6), band_sizes=(5, 1))
    config = EstimatorConfig(num_draws=6, num_bands=2, num_encodings=2, encoding="sample")
    bands = average_bands(features, draws, config)
    torch.testing.assert_close(bands.flatten(), torch.tensor([5.0 * 5 / 3, 8.0 / 3]))


@pytest.mark.parametrize("scheme", ["stratified", "antithetic", "orthogonal"])
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_the_mean_of_a_band_is_that_under_p_whatever_the_proposal(scheme: Any, proposal: str) -> None:
    """Three bands of 20 timesteps: an edge a third and one two thirds into a timestep."""
    config = EstimatorConfig(num_draws=18, num_bands=3, scheme=scheme)
    draws = draws_of(PROPOSALS[proposal], config)
    assert (len(set(draws.band_sizes)) == 1) == (proposal == "uniform")
    halves = average_bands(gradients(draws, 1.0), draws, config)
    assert halves.shape == (SEEDS, 3, config.num_replicates, 1)
    expected = reference.band_means(LEVEL, ONE_EACH, 3)
    for band, mean in zip(halves.mean((2, 3)).T, expected, strict=True):
        assert_mean(band, float(mean))


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_both_halves_of_a_band_have_the_same_means_up_to_the_trend_between_strata(proposal: str) -> None:
    config = EstimatorConfig(num_draws=32, num_bands=2)
    draws = draws_of(PROPOSALS[proposal], config)
    halves = average_bands(gradients(draws, 1.0), draws, config)[..., 0].double().mean(0)
    expected = reference.band_means(LEVEL, ONE_EACH, 2)
    torch.testing.assert_close(halves, expected[:, None].expand(2, 2), rtol=0.3, atol=0)


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_where_each_draw_is_a_band_products_are_means_under_p(proposal: str) -> None:
    """E_p[g_q g_i], with both gradients at the same draw: each side has the root of the weight."""
    config = EstimatorConfig(num_draws=8, num_bands=8)
    draws = draws_of(PROPOSALS[proposal], config)
    query, train = (average_bands(gradients(draws, slope), draws, config)[:, :, 0, 0] for slope in (1.0, 0.5))
    assert_mean((query * train).double().mean(1), float(1.5 * LEVEL.square().mean()))


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_with_independent_noise_a_draw_a_band_is_a_mean_and_not_a_root(proposal: str) -> None:
    config = EstimatorConfig(num_draws=4, num_bands=4, noise="independent")
    draws = draws_of(PROPOSALS[proposal], config)
    bands = average_bands(gradients(draws, 1.0), draws, config)[..., 0, 0].double()
    for band, expected in zip(bands.T, reference.band_means(LEVEL, ONE_EACH, 4), strict=True):
        assert_mean(band, float(expected))


@pytest.mark.parametrize("scheme", ["iid", "stratified", "antithetic", "orthogonal"])
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_products_of_root_weighted_draws_are_means_under_p(scheme: Any, proposal: str) -> None:
    config = EstimatorConfig(num_draws=12, num_bands=2, scheme=scheme)
    draws = draws_of(PROPOSALS[proposal], config)
    vectors = root_weighted(gradients(draws, 1.0), draws)[..., 0]
    assert_mean(vectors.double().square().mean(1), float(2 * LEVEL.square().mean()), 0.15)


def sampling_estimator(folder: Path, micro_batch: int = 16, **settings: Any) -> Estimator:
    """Return an estimator of two random encodings by the tiny DiT."""
    teacher = load_teacher(folder, device="cpu", dtype=settings.get("dtype", "float32"))
    chosen = SETTINGS | {"encoding": "sample", "num_encodings": 2} | settings
    return build_estimator(teacher, FeaturizeConfig.from_flat(chosen), micro_batch, GradientProfile((10.0,), (1.0,)))


def pictures(count: int, seed: int = 0) -> Tensor:
    """Return pixels for the tiny DiT."""
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("random", [{}, {"augmentation": "crop"}, {"augmentation": "flip", "encoding": "mode"}])
def test_an_encoding_is_a_function_of_seed_id_and_number_alone(dit_folder: Path, random: dict[str, str]) -> None:
    estimator = sampling_estimator(dit_folder, **random)
    pixels, ids = pictures(5), [9, 4, -3, 12, 40]
    together = estimator.encode(pixels, [0] * 5, None, ids).latents
    alone = estimator.encode(pixels[[2, 0]], [0] * 2, None, [-3, 9]).latents
    torch.testing.assert_close(alone, together[[2, 0]])
    more = sampling_estimator(dit_folder, **random, num_encodings=3).encode(pixels, [0] * 5, None, ids).latents
    torch.testing.assert_close(more[:, :2], together)
    other_seed = sampling_estimator(dit_folder, **random, seed=1).encode(pixels, [0] * 5, None, ids).latents
    assert not torch.allclose(other_seed, together)


def test_encodings_differ_between_numbers_and_between_ids(dit_folder: Path) -> None:
    estimator = sampling_estimator(dit_folder)
    latents = estimator.encode(pictures(1).expand(20, -1, -1, -1), [0] * 20, None, range(20)).latents
    assert latents.shape == (20, 2, 2, 4, 4)
    assert len(latents.flatten(0, 1).flatten(1).unique(dim=0)) == 40


def test_augmentation_and_posterior_have_streams_of_their_own(dit_folder: Path) -> None:
    """Both at once are the posterior's noise on the augmented picture, each as it would be without the other."""
    estimator = sampling_estimator(dit_folder, augmentation="crop")
    pixels = pictures(3)
    latents = estimator.encode(pixels, [0] * 3, None, [5, 6, 7]).latents
    for r in range(2):
        moved = augment(pixels, "crop", [stream(0, "augmentation", i, r) for i in (5, 6, 7)])
        assert not torch.equal(moved, pixels)
        samples = sampling_estimator(dit_folder).encode(moved, [0] * 3, None, [5, 6, 7]).latents[:, r]
        torch.testing.assert_close(latents[:, r], samples)


def test_posterior_samples_have_the_mode_as_their_mean_and_the_posteriors_spread(dit_folder: Path) -> None:
    estimator = sampling_estimator(dit_folder, micro_batch=400)
    pixels = pictures(1)
    latents = estimator.encode(pixels.expand(400, -1, -1, -1), [0] * 400, None, range(400)).latents.flatten(0, 1)
    teacher: Any = estimator.teacher
    with torch.no_grad():
        spread = teacher.autoencoder.encode(pixels).latent_dist.std[0] * 0.3
    mode = teacher.encode(pixels)[0]
    assert float(((latents.mean(0) - mode).abs() / spread).max()) < 4 / 800**0.5
    assert float((latents.std(0) / spread - 1).abs().max()) < 4 / 1600**0.5


@pytest.mark.parametrize("num_bands", [2, 4])
@pytest.mark.parametrize("noise", ["shared", "independent"])
def test_features_of_two_encodings_are_the_mean_of_those_of_each(dit_folder: Path, num_bands: int, noise: str) -> None:
    settings = {"num_bands": num_bands, "noise": noise, "weighting": "uniform", "dtype": "float64"}
    both = sampling_estimator(dit_folder, **settings)
    ids = [3, 8]
    encoded, draws = both.encode(pictures(2), [0, 1], None, ids), both.draws(ids)
    assert draws.timesteps.shape[1] == 8
    alike = num_bands == 4 and noise == "shared"  # products are taken draw by draw, for all encodings at once
    assert torch.equal(draws.noise[:, :4], draws.noise[:, 4:]) == alike
    features = average_bands(both.features(encoded, draws), draws, both.config)
    one = replace(both, config=replace(both.config, num_encodings=1))
    parts = []
    for r, columns in enumerate((slice(0, 4), slice(4, 8))):
        own = replace(
            draws,
            timesteps=draws.timesteps[:, columns],
            noise=draws.noise[:, columns],
            weights=draws.weights[:, columns],
        )
        latents = Encoded(encoded.latents[:, r : r + 1], encoded.condition)
        parts.append(average_bands(one.features(latents, own), own, one.config))
    torch.testing.assert_close(features, (parts[0] + parts[1]) / 2)
    first = one.draws(ids)
    assert torch.equal(first.noise, draws.noise[:, :4])
    assert not torch.allclose(parts[0], parts[1])


def test_a_teacher_in_pixel_space_can_flip_its_pictures(linear_teacher: TinyTeacher) -> None:
    config = FeaturizeConfig.from_flat({"augmentation": "flip", "num_encodings": 2, "num_draws": 4})
    estimator = build_estimator(linear_teacher, config, 8, None)
    pixels = torch.rand(60, 1, 2, 2, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    latents = estimator.encode(pixels, None, None, range(60)).latents.float()
    turned = (latents == pixels.flip(-1)[:, None]).flatten(2).all(2)
    assert bool((turned | (latents == pixels[:, None]).flatten(2).all(2)).all())
    assert 15 < int((turned[:, 0] != turned[:, 1]).sum()) < 45  # each encoding by its own coin


def test_mean_square_products_are_those_of_pairs_at_the_same_draw() -> None:
    vectors = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    blocks = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3))
    kernel = torch.einsum("ikd,ike->de", vectors, vectors) / 12 * blocks
    means = kernel.diagonal().view(2, 3).mean(1).repeat_interleave(3)
    inverse = torch.linalg.inv(kernel + 0.1 * means.diag())
    for k in range(3):
        products = [float(vectors[i, k] @ inverse @ vectors[j, k]) for i in range(4) for j in range(4) if i != j]
        expected = sum(p**2 for p in products) / 12
        assert float(mean_square_products(vectors, 3)[k]) == pytest.approx(expected, rel=1e-6)


def test_the_scores_proposal_is_measured_once_and_kept(tmp_path: Path, dit_folder: Path, digits_folder: Path) -> None:
    settings = SETTINGS | {"proposal": "scores", "num_draws": 8, "num_bands": 2}
    store = featurize(dit_folder, digits_folder, tmp_path / "index", **settings)
    pilot = store.manifest["pilot"]
    assert len(pilot["rms_products"]) == len(pilot["timesteps"])
    estimator = Attributor.open(tmp_path / "index").estimator
    profile = GradientProfile(**{name: tuple(values) for name, values in pilot.items()})
    products = profile.products_at_every_timestep(estimator.teacher.noise_schedule.num_timesteps)
    torch.testing.assert_close(estimator.proposal.density, importance_proposal(products).density)
    assert not torch.allclose(estimator.proposal.density, uniform_proposal(len(products)).density)


def test_the_scores_proposal_needs_two_examples(tmp_path: Path, ddpm_folder: Path, digits_folder: Path) -> None:
    one = tmp_path / "one" / "0"
    one.mkdir(parents=True)
    picture = next((digits_folder / "0").glob("*.png"))
    (one / picture.name).write_bytes(picture.read_bytes())
    with pytest.raises(DataError, match="`proposal` scores compares examples, and only one could be read for its"):
        featurize(ddpm_folder, tmp_path / "one", tmp_path / "index", **SETTINGS | {"proposal": "scores"})


@pytest.mark.parametrize("augmentation", ["flip", "crop"])
def test_a_mask_is_augmented_as_the_picture_is(augmentation: Any) -> None:
    """In pixel space a picture is its own latents, so a picture that is its own mask comes out the same."""
    config = FeaturizeConfig.from_flat({"augmentation": augmentation, "num_encodings": 6})
    teacher = load_teacher("demo-pixels", device="cpu")
    estimator = build_estimator(teacher, config, 4, profile=None)
    pixels = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encodings = estimator.encode(pixels, None, None, [-5, -6]).latents[:, :, 0]
    assert len({tuple(encoding.flatten().tolist()) for encoding in encodings[0]}) > 1
    torch.testing.assert_close(estimator.mask(pixels, [-5, -6]) * 2 - 1, encodings, rtol=0, atol=1e-6)


def test_a_mask_is_averaged_over_the_area_of_each_latent_position(dit_folder: Path) -> None:
    estimator = build_estimator(load_teacher(dit_folder, device="cpu"), FeaturizeConfig.from_flat({}), 4, profile=None)
    white = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = white.view(4, 2, 4, 2).mean((1, 3))
    torch.testing.assert_close(estimator.mask(white * 2 - 1, [-5])[0, 0], expected)
