"""`scripts/make_counterfactuals.py`: what it removes and trains, what it keeps, and how it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import make_counterfactuals
import make_lds_ground_truth
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from make_counterfactuals import ALL_QUERIES, RANDOM, Model, removed

from carv_attrib.evaluation import Counterfactuals, counterfactual
from carv_attrib.seeding import stream

NUM_QUERIES, NUM_TRAIN = 8, 100


@pytest.fixture
def effects() -> np.ndarray:
    """Return by how much each example lowers the loss of each query."""
    return stream(0, "effects").standard_normal((NUM_QUERIES, NUM_TRAIN))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, effects: np.ndarray) -> list[tuple[int, int]]:
    """Put sums of effects in the place of training; return how many examples were removed, and the seed, of each."""
    trained: list[tuple[int, int]] = []

    def losses_without(name: str, folder: Path, positions: np.ndarray, seed: int, epochs: float) -> np.ndarray:
        trained.append((len(positions), seed))
        return 100 + 10 * seed + np.arange(NUM_QUERIES) + effects[:, positions].sum(1)

    def one_by_one(
        work: Callable[..., Any], arguments: Mapping[Any, tuple[Any, ...]], processes: int
    ) -> Iterator[tuple[Any, Any]]:
        yield from ((key, work(*own)) for key, own in arguments.items())

    monkeypatch.setattr(make_counterfactuals, "losses_without", losses_without)
    monkeypatch.setattr(make_counterfactuals, "in_processes", one_by_one)
    return trained


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Result]:
    """Return a function that runs the script on some scores, by the name of their method."""
    (tmp_path / "demo").mkdir()
    labels, ids = np.zeros(NUM_QUERIES, int), np.arange(NUM_TRAIN)
    np.savez(tmp_path / "demo" / "ground-truth.npz", query_labels=labels, train_ids=ids)

    def run(scores: dict[str, np.ndarray], *flags: object) -> Result:
        np.savez(tmp_path / "scores.npz", **scores)
        command = ["--task", "demo", "--folder", tmp_path, "--scores", tmp_path / "scores.npz", "--seeds", 2, *flags]
        return CliRunner().invoke(make_counterfactuals.main, [str(word) for word in command])

    return run


def load(folder: Path) -> Counterfactuals:
    return Counterfactuals.load(folder / "demo" / "counterfactual.npz")


def test_removal_of_what_lowers_the_loss_raises_it_by_the_sum_of_effects(
    tmp_path: Path, make: Callable[..., Result], trained: list[Any], effects: np.ndarray
) -> None:
    done = make({"ours": effects, "opposite": -effects}, "--queries", 5)
    assert done.exit_code == 0, done.output
    assert len(trained) == 2 * (1 + 3) + 5 * 3 * 2 * 2  # seeds: everything, random; queries, fractions, methods, seeds
    found = load(tmp_path)
    assert found.whole.sum(1).tolist() == [[5, 5]] * 3
    rises = np.sort(effects)
    with np.load(tmp_path / "demo" / "counterfactual.npz") as file:
        chosen = ~np.isnan(file["losses"][0, 0, :, 0])
        assert not np.isnan(file["losses"][2]).any()
    table = counterfactual(found)
    assert list(table) == ["1 %, 5 queries", "5 %, 5 queries", "10 %, 5 queries"]
    for group, count in zip(table, (1, 5, 10), strict=True):
        assert table[group]["ours"].value == pytest.approx(rises[chosen, -count:].sum(1).mean())
        assert table[group]["opposite"].value == pytest.approx(rises[chosen, :count].sum(1).mean())
        assert abs(table[group]["random"].value) < table[group]["ours"].value


def test_a_killed_run_goes_on_and_more_is_added(
    tmp_path: Path,
    make: Callable[..., Result],
    trained: list[Any],
    effects: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stub = make_counterfactuals.losses_without

    def killed_at_the_tenth(*arguments: Any) -> np.ndarray:
        if len(trained) == 9:
            raise KeyboardInterrupt
        return stub(*arguments)

    flags = ("--queries", 3, "--fraction", 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(make_counterfactuals, "losses_without", killed_at_the_tenth)
        assert make({"ours": effects}, *flags).exit_code != 0
    assert make({"ours": effects}, *flags).exit_code == 0
    assert len(trained) == 4 + 3 * 2  # nothing was trained twice
    whole = load(tmp_path)
    assert make({"ours": effects}, *flags).exit_code == 0
    assert len(trained) == 10
    assert make({"opposite": -effects}, *flags).exit_code == 0
    assert len(trained) == 10 + 3 * 2
    assert make({"ours": effects, "opposite": -effects}, *flags, "--fraction", 0.2, "--seeds", 3).exit_code == 0
    assert len(trained) == 16 + 2 + (3 + 3 * 2 * 3) + 3 * 2  # random and everything; the new fraction; the new seed
    grown = load(tmp_path)
    assert grown.methods == ["ours", RANDOM, "opposite"]
    assert grown.fractions == [0.1, 0.2]
    np.testing.assert_array_equal(grown.losses[:2, :1, :, :2], whole.losses)


def test_random_examples_are_others_for_each_seed_and_nested(effects: np.ndarray) -> None:
    few, many, other = (
        removed(Model(RANDOM, fraction, ALL_QUERIES, seed), {}, NUM_TRAIN)
        for fraction, seed in ((0.1, 0), (0.5, 0), (0.5, 1))
    )
    assert (len(few), len(many)) == (10, 50)
    assert set(few) < set(many)
    assert set(many) != set(other)
    assert len(removed(Model("", 0.0, ALL_QUERIES, 0), {}, NUM_TRAIN)) == 0
    assert removed(Model("ours", 0.02, 3, 0), {"ours": effects}, NUM_TRAIN).tolist() == [
        effects[3].argmax(),
        effects[3].argsort()[-2],
    ]


def test_what_would_mix_results_up_is_refused(
    tmp_path: Path, make: Callable[..., Result], trained: list[Any], effects: np.ndarray
) -> None:
    flags = ("--queries", 2, "--fraction", 0.1)
    assert make({"ours": effects}, *flags).exit_code == 0
    for scores, more, message in (
        ({"ours": -effects}, (), "has models by other scores that are called ours; rename these."),
        ({"random": effects}, (), "must not have the name 'random', which is taken; rename it."),
        ({"ours": effects[:, 1:]}, (), "(queries, train) = (8, 100), ours is (8, 99); score all queries of"),
        ({"ours": effects}, ("--folder", tmp_path / "none"), "has no ground-truth.npz; run make_lds_ground_truth.py"),
    ):
        refused = make(scores, *flags, *more)
        assert refused.exit_code == 2
        assert message in refused.output
    assert len(trained) == 4 + 4


def test_models_of_other_epochs_have_a_file_of_their_own(
    tmp_path: Path, make: Callable[..., Result], trained: list[Any], effects: np.ndarray
) -> None:
    flags = ("--queries", 2, "--fraction", 0.1)
    for epochs in ((), ("--epochs", 3)):
        assert make({"ours": effects}, *flags, *epochs).exit_code == 0
    assert len(trained) == 2 * (4 + 4)
    losses, few = (
        np.load(tmp_path / "demo" / name)["losses"] for name in ("counterfactual.npz", "counterfactual-3-epochs.npz")
    )
    np.testing.assert_array_equal(losses, few)


def test_a_model_that_diverged_is_not_kept(
    tmp_path: Path,
    make: Callable[..., Result],
    trained: list[Any],
    effects: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(make_counterfactuals, "losses_without", lambda *arguments: np.full(NUM_QUERIES, np.nan))
    failed = make({"ours": effects})
    assert failed.exit_code == 1
    assert "has losses that are not finite: its training diverged." in failed.output
    assert not (tmp_path / "demo" / "counterfactual.npz").exists()


@pytest.mark.slow
def test_models_of_one_seed_differ_by_what_was_removed(tmp_path: Path) -> None:
    digits = make_lds_ground_truth.load_digits("pixels")
    pictures = np.stack([np.full((8, 8), 100 * i, np.uint8) for i in range(3)])
    np.savez(tmp_path / "ground-truth.npz", query_images=pictures, query_labels=np.full(3, -1))
    everything, again, without, other_seed = (
        make_counterfactuals.losses_without("pixels", tmp_path, np.arange(count), seed, 0.1)
        for count, seed in ((0, 0), (0, 0), (500, 0), (0, 1))
    )
    assert everything.shape == (3,)
    np.testing.assert_array_equal(everything, again)
    assert (everything != without).all()
    assert (everything != other_seed).all()
    rows = digits.train_ids[torch.arange(500, len(digits.train_ids))]
    denoiser = make_lds_ground_truth.train_on("pixels", rows, "pixels", "counterfactual", 0, epochs=0.1)
    expected = make_lds_ground_truth.query_losses("pixels", denoiser, pictures, np.full(3, -1)).mean(1)
    np.testing.assert_array_equal(without, expected)
