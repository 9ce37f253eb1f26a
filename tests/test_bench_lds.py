"""What can break in `scripts/bench_lds.py`: that peers compute what they are said to, and that nothing else differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_first_examples
import bench_lds
import click
import lds_peers
import lds_tables
import lds_unprojected
import numpy as np
import pytest
import torch
from bench_lds import final_scores, merged, methods, scores_at
from lds_inputs import kept, take
from torch import Tensor

from carv_attrib import load_teacher
from carv_attrib.config import FeaturizeConfig
from carv_attrib.estimator import Encoded, Estimator, GradientProfile, average_bands, build_estimator
from carv_attrib.evaluation import GroundTruth
from carv_attrib.kernel import kernel_of
from carv_attrib.scores import score_bands
from carv_attrib.teacher import Teacher

IDS = [3, 5, 11, -1, -2]
NUM_TRAIN = 3
PROFILE = GradientProfile((0.0, 99.0), (4.0, 0.5))


@pytest.fixture(scope="module")
def teacher(dit_folder: Path) -> Teacher:
    return load_teacher(dit_folder, device="cpu")


@pytest.fixture(scope="module")
def encoded(teacher: Teacher) -> Encoded:
    latents = torch.randn(len(IDS), 1, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    return Encoded(latents, teacher.condition([0, 1, 2, 0, 1], None))


def estimator_of(teacher: Teacher, **settings: Any) -> Estimator:
    """Return an estimator that projects nothing."""
    config = FeaturizeConfig.from_flat(settings)
    estimator = build_estimator(teacher, config, 8, PROFILE)
    return replace(estimator, projector=lds_unprojected.Unprojected(estimator.layers))


def attributed(teacher: Teacher, estimator: Estimator, gradients: Tensor) -> Tensor:
    """Return the columns of gradients of all parameters that are of attributed layers, in our order."""
    denoiser, columns = teacher.denoiser, {}
    sizes = [p.numel() for p in denoiser.parameters()]
    for (name, parameter), values in zip(denoiser.named_parameters(), gradients.split(sizes, dim=1), strict=True):
        columns[name] = values.view(len(gradients), *parameter.shape)
    pieces = []
    for layer in estimator.layers:
        weight = columns[f"{layer.name}.weight"].flatten(2)
        bias = columns[f"{layer.name}.bias"].unsqueeze(-1) if layer.has_bias else weight[..., :0]
        pieces.append(torch.cat([weight, bias], dim=2).flatten(1))
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("recipe", [lds_peers.trak_recipe, lds_peers.dtrak_recipe])
def test_peers_differentiate_what_our_recipe_does(
    teacher: Teacher, encoded: Encoded, recipe: Callable[[int], lds_peers.Peer]
) -> None:
    peer = recipe(6)
    settings = {"scheme": peer.scheme, "noise": peer.noise, "objective": peer.objective}
    estimator = estimator_of(teacher, num_draws=6, num_bands=1, weighting="uniform", **settings)
    ours = estimator.features(encoded, estimator.draws(IDS)).mean(1)
    peers = attributed(teacher, estimator, lds_peers.mean_gradients(peer, teacher, encoded, IDS))
    torch.testing.assert_close(peers, ours, rtol=1e-3, atol=1e-5 * float(ours.abs().max()))
    assert not any(p.requires_grad for p in teacher.denoiser.parameters())


def test_recipes_are_those_of_the_papers(teacher: Teacher) -> None:
    trak = lds_peers.peer_draws(lds_peers.trak_recipe(16), teacher, [1, 2])
    assert not torch.equal(trak.timesteps[0], trak.timesteps[1])
    assert not torch.equal(trak.noise[0], trak.noise[1])
    dtrak = lds_peers.peer_draws(lds_peers.dtrak_recipe(10), teacher, [1, 2])
    assert dtrak.timesteps.tolist() == [list(range(0, 100, 10))] * 2
    torch.testing.assert_close(dtrak.noise[0], dtrak.noise[1])


def test_scores_of_trak_are_those_of_its_paper() -> None:
    features = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)
    found = lds_peers.score(features, 9, [0.01, 1.0])
    train, query = features[:9].double(), features[9:].double()
    gram = train.T @ train
    for damping in (0.01, 1.0):
        inverse = torch.linalg.inv(gram + damping * torch.linalg.eigvalsh(gram).mean() * torch.eye(6))
        expected = (query @ inverse @ train.T) / inverse.abs().mean()
        np.testing.assert_allclose(found[str(damping)], expected, rtol=1e-3, atol=1e-4 * expected.abs().max())


def test_chunks_change_no_feature(
    teacher: Teacher, encoded: Encoded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class TinyInputs:
        ids = IDS
        num_train = NUM_TRAIN

    inputs: Any = TinyInputs()
    inputs.teacher, inputs.encoded = teacher, encoded
    peer = replace(lds_peers.trak_recipe(2), proj_dim=300)
    whole = lds_peers.project(inputs, peer, tmp_path / "whole")
    num_params = sum(p.numel() for p in teacher.denoiser.parameters())
    monkeypatch.setattr(lds_peers, "GRADIENT_BYTES", 2 * 4 * num_params)
    torch.testing.assert_close(lds_peers.project(inputs, peer, tmp_path / "chunks"), whole, rtol=1e-3, atol=1e-3)
    assert len(list((tmp_path / "chunks").iterdir())) == 3
    monkeypatch.setattr(lds_peers, "mean_gradients", None)
    lds_peers.project(inputs, peer, tmp_path / "chunks")  # nothing is computed again
    assert whole.shape == (len(IDS), 300)


def test_projection_keeps_inner_products_but_for_the_scale() -> None:
    gradients = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    projected = lds_peers.projector(50, 20_000).project(gradients, model_id=0)
    torch.testing.assert_close(projected @ projected.T / 20_000, gradients @ gradients.T, rtol=0.1, atol=2.0)


def test_dual_scores_are_those_of_the_kernel_over_draws(teacher: Teacher, encoded: Encoded, tmp_path: Path) -> None:
    estimator = estimator_of(teacher, num_draws=4, num_bands=4, layers=["pos_embed*", "proj_out*"])
    draws = estimator.draws(IDS)
    values = estimator.features(encoded, draws).double()
    vectors = values[:NUM_TRAIN].flatten(0, 1)
    kernel = kernel_of(vectors[:, None, None], vectors.shape[1])  # one for all bands
    lam = 0.1 * float((vectors @ vectors.T).trace()) / len(vectors) ** 2
    bands = kernel.banded(average_bands(values.float(), draws, estimator.config))
    expected = score_bands(bands[NUM_TRAIN:], bands[:NUM_TRAIN], 1 / (kernel.eigenvalues[0] + lam)).scores
    gram = lds_unprojected.inner_products(estimator, encoded, IDS, NUM_TRAIN, tmp_path / "gram.npz")
    found = lds_unprojected.score(gram, 4, 0.1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_another_projection_changes_nothing_else(
    teacher: Teacher, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"num_draws": 4, "num_bands": 4, "rank": 4, "proj_dim": 64, "block_dim": 32}
    estimator = build_estimator(teacher, FeaturizeConfig.from_flat(settings), 8, PROFILE)
    monkeypatch.setattr(bench_lds, "restore_estimator", lambda *_: estimator)
    inputs: Any = SimpleNamespace(teacher=teacher, encoded=encoded, ids=IDS, num_train=NUM_TRAIN)
    same, other = (
        bench_lds.OtherProjection(4, seed).scores_of(inputs, {"config": settings})["0.1"]
        for seed in (estimator.config.seed, estimator.config.seed + 1)
    )
    draws = estimator.draws(IDS)
    bands = average_bands(estimator.features(encoded, draws), draws, estimator.config).double()
    kernel = kernel_of(bands[:NUM_TRAIN], 32)
    train, query = kernel.banded(bands[:NUM_TRAIN]), kernel.banded(bands[NUM_TRAIN:])
    expected = score_bands(query, train, kernel.inverse("preconditioned", 0.1)).scores.numpy()
    np.testing.assert_allclose(same, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
    assert not np.allclose(other, expected, rtol=1e-2)


def test_inner_products_do_not_depend_on_groups_panels_or_a_kill(
    teacher: Teacher, encoded: Encoded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimator = estimator_of(teacher, num_draws=4, num_bands=4)
    values = estimator.features(encoded, estimator.draws(IDS)).double().flatten(0, 1)
    monkeypatch.setattr(lds_unprojected, "GRADIENT_BYTES", 4 * len(values) * 300)
    monkeypatch.setattr(lds_unprojected, "PANEL", 5)
    monkeypatch.setattr(lds_unprojected, "CHUNK", 2)
    whole, calls = lds_unprojected.draw_gradients, 0

    def killed(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return whole(*arguments)

    arguments = (estimator, encoded, IDS, NUM_TRAIN, tmp_path / "gram.npz")
    with monkeypatch.context() as patch:
        patch.setattr(lds_unprojected, "draw_gradients", killed)
        with pytest.raises(KeyboardInterrupt):
            lds_unprojected.inner_products(*arguments)
    gram = lds_unprojected.inner_products(*arguments)
    expected = values @ values[: 4 * NUM_TRAIN].T
    torch.testing.assert_close(gram, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert len(lds_unprojected.layer_groups(estimator.layers, 300)) > 3


def test_what_is_kept_is_not_made_again(tmp_path: Path) -> None:
    file = tmp_path / "new" / "scores.npz"
    made = kept(file, lambda: {"0.1": np.arange(3)})
    again = kept(file, lambda: pytest.fail("made again"))
    np.testing.assert_array_equal(made["0.1"], again["0.1"])


def test_rows_have_equal_numbers_of_draws_as_their_names_say() -> None:
    for name, method in methods().items():
        assert f"{method.num_draws} draws" in name


def test_luck_is_over_the_default_and_its_other_runs() -> None:
    lds = {"ours, 4 draws": 0.1, "ours, 4 draws, seed 1": 0.3, "ours, 4 draws, projection 1": 0.9}
    kinds = {"demo: held-out": {"rows": {name: {"lds": [value, 0.01]} for name, value in lds.items()}}}
    assert lds_tables.luck(kinds, "seed") == "| 4 draws, 2 seeds | 0.200 (sd 0.141) |"


def test_take_takes_conditions_along(encoded: Encoded) -> None:
    part = take(encoded, slice(1, 3))
    assert part.latents.shape[0] == 2
    assert part.condition["class_labels"].tolist() == [1, 2]


def test_the_scores_for_counterfactuals_are_at_the_automatic_damping_or_at_the_best_of_even_subsets() -> None:
    """The even subsets' losses fall as the scores at 0.1 say; those of the odd ones as the others, which count not."""
    generator = np.random.default_rng(0)
    masks, good = generator.random((8, 20)) < 0.5, generator.standard_normal((4, 20))
    losses = -np.where(np.arange(8)[:, None] % 2, -1, 1) * (masks @ good.T)
    truth = GroundTruth(
        masks,
        losses[:, None, :, None],
        np.arange(20),
        query_images=np.zeros((4, 8, 8), np.uint8),
        query_labels=np.zeros(4, np.int64),
        query_kinds=np.array(["held-out", "held-out", "generated", "generated"]),
    )
    found = final_scores({"peer": {"0.1": good, "1.0": -good}, "ours": {"0.1": good, "auto": 2 * good}}, truth)
    np.testing.assert_array_equal(found["peer"], good)
    np.testing.assert_array_equal(found["ours"], 2 * good)


def test_differences_to_another_default_are_not_kept() -> None:
    """Differences to the default of rows that stay are gone where the default is another."""
    default = {"lds": [5, 1], "less_default": [0, 0]}
    rows = {"ours, 4 draws": default, "a": {"lds": 1, "less_default": 4}, "b": {}}
    old = {"subsets": 4, "seeds": 2, "queries": {"held-out": {"rows": {name: dict(row) for name, row in rows.items()}}}}
    as_measured = {"lds": (5, 1), "less_default": (0, 0)}  # tuples, which a file has as lists
    new = {"subsets": 4, "seeds": 2, "queries": {"held-out": {"rows": {"b": {"lds": 3}, "ours, 4 draws": as_measured}}}}
    rows["ours, 4 draws"] = as_measured
    assert merged(old, new)["queries"]["held-out"]["rows"] == rows | {"b": {"lds": 3}}
    other = {"lds": 6, "less_default": 0}
    new["queries"]["held-out"]["rows"] = {"ours, 4 draws": other}
    found = merged(old, new)["queries"]["held-out"]["rows"]
    assert (found["ours, 4 draws"], found["a"]) == (other, {"lds": 1, "less_default": None})


def test_scores_at_a_damping_are_of_the_methods_that_have_one() -> None:
    good = np.ones((4, 20))
    found = scores_at({"latent cosine": {"": good}, "ours": {"0.1": 2 * good, "auto": good}}, "0.1")
    assert list(found) == ["ours, damping 0.1"]
    np.testing.assert_array_equal(found["ours, damping 0.1"], 2 * good)


def test_effects_of_first_examples_are_on_the_odd_subsets_and_those_of_peers_at_their_best_damping_on_the_even() -> (
    None
):
    generator = np.random.default_rng(0)
    masks = generator.random((40, 30)) < 0.5
    good = generator.standard_normal((4, 30))
    losses = np.where(np.arange(40)[:, None] % 2, -2.0, -1.0) * (
        masks @ (good >= np.sort(good)[:, [-5]]).T.astype(float)
    )
    truth = GroundTruth(
        masks=masks,
        losses=losses[:, None, :, None],
        train_ids=np.arange(30),
        query_kinds=np.full(4, "held-out"),
        query_labels=np.zeros(4, int),
        query_images=np.zeros((4, 2, 2), np.uint8),
    )
    peer = {"0.1": -good, "1.0": good}
    found = bench_first_examples.effects({bench_first_examples.REFERENCE: peer, "worse": {"": -good}}, truth, 5)
    assert found[bench_first_examples.REFERENCE] == {
        "effect": (pytest.approx(10.0), pytest.approx(0.0, abs=1e-9)),
        "less_reference": (0.0, 0.0),
    }
    effect, error = found["worse"]["effect"]
    assert effect < 5
    assert error > 0
    assert found["worse"]["less_reference"] == (pytest.approx(effect - 10), pytest.approx(error))


def test_some_methods_change_their_own_rows_only_and_only_of_the_same_models() -> None:
    old = {"subsets": 4, "seeds": 2, "queries": {"held-out": {"rows": {"a": 1, "b": 2}, "ceiling": 0.7}}}
    new = {"subsets": 4, "seeds": 2, "queries": {"held-out": {"rows": {"b": 3, "c": 4}, "ceiling": 0.7}}}
    assert merged(old, new)["queries"]["held-out"] == {"rows": {"a": 1, "b": 3, "c": 4}, "ceiling": 0.7}
    with pytest.raises(click.ClickException, match="run all methods again"):
        merged(old, new | {"subsets": 6})
