"""A small index against losses that its own scores explain, other scores and itself; and files that are wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from carv_attrib import Attributor, featurize
from carv_attrib.cli import main
from carv_attrib.data import open_dataset
from carv_attrib.errors import ArgumentError, CarvError, DataError, StoreMismatchError
from carv_attrib.evaluation import (
    Counterfactuals,
    GroundTruth,
    Queries,
    agreement,
    check_same_examples,
    counterfactual,
    lds,
    self_retrieval,
)
from carv_attrib.files import read_sealed, write_sealed
from carv_attrib.report.measures import draw_bars, save_bars
from carv_attrib.seeding import stream
from carv_attrib.variance import Measured
from tests.conftest import SETTINGS

NUM_QUERIES = 6


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def attributor(tiny_index: Path) -> Attributor:
    return Attributor.open(tiny_index, device="cpu")


@pytest.fixture(scope="module")
def arrays(attributor: Attributor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Return ground truth in which every loss is minus the sum of the scores, in two strata; seeds are alike."""
    generator = stream(0, "ground truth of a test")
    pixels = generator.integers(256, size=(NUM_QUERIES, 8, 8)).astype(np.uint8)
    labels = generator.integers(3, size=NUM_QUERIES)
    masks = np.repeat(generator.random((10, len(attributor.ids))) < 0.5, 2, axis=0)
    truth = GroundTruth(masks, np.zeros((20, 1, NUM_QUERIES, 2)), attributor.ids, pixels, labels, np.empty(0))
    losses = -(masks @ truth.scores(attributor).T)
    return {
        "masks": masks,
        "losses": np.stack([losses + 1, losses - 1], axis=2).astype(np.float32),
        "subsets": np.arange(20) // 2,
        "seeds": np.arange(20) % 2,
        "train_ids": attributor.ids,
        "query_images": pixels,
        "query_labels": labels,
        "query_kinds": np.array(["held-out"] * 3 + ["generated"] * 3),
    }


@pytest.fixture
def save(arrays: dict[str, np.ndarray], tmp_path: Path) -> Any:
    """Return a function that writes the ground truth with changes; None leaves an array out."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "ground-truth.npz"
        np.savez(path, **{name: value for name, value in (arrays | changes).items() if value is not None})
        return path

    return write


def test_scores_that_made_the_losses_have_an_lds_of_one(attributor: Attributor, save: Any) -> None:
    truth = GroundTruth.load(save())
    assert truth.losses.shape == (10, 2, NUM_QUERIES, 2)
    scores = truth.scores(attributor)
    table = lds(truth, {"ours": scores, "opposite": -scores})
    assert list(table) == ["held-out", "generated"]
    for rows in table.values():
        assert [rows[name].value for name in ("ours", "opposite", "seed to seed", "ceiling")] == pytest.approx(
            [1, -1, 1, 1]
        )


def test_models_are_put_together_by_subset_and_seed_and_unfinished_subsets_left_out(
    arrays: dict[str, np.ndarray], save: Any
) -> None:
    order = stream(0, "order").permutation(19)  # the last model is missing
    losses = arrays["losses"] + np.arange(20, dtype=np.float32)[:, None, None]
    per_model = {name: arrays[name][order] for name in ("masks", "subsets", "seeds")}
    truth = GroundTruth.load(save(losses=losses[order], **per_model))
    assert len(truth.masks) == 9
    np.testing.assert_array_equal(truth.losses.reshape(18, NUM_QUERIES, 2), losses[:18])
    np.testing.assert_array_equal(truth.masks, arrays["masks"][:18:2])


def test_a_score_is_compared_on_the_queries_of_its_kind(attributor: Attributor, save: Any) -> None:
    truth = GroundTruth.load(save())
    scores = truth.scores(attributor)
    scores[3:] *= -1
    table = lds(truth, {"ours": scores})
    assert table["held-out"]["ours"].value == pytest.approx(1)
    assert table["generated"]["ours"].value == pytest.approx(-1)


def test_the_lds_command_prints_a_table_or_json(tiny_index: Path, save: Any) -> None:
    command = ("lds", tiny_index, "--ground-truth", save(), "--device", "cpu")
    shown = run(*command)
    assert shown.exit_code == 0
    assert "10 subsets" in shown.output
    assert "1.000 ± 0.000" in shown.output
    printed = json.loads(run(*command, "--json", "--score", "dot").stdout)
    assert printed["generated"]["LDS"]["value"] < 0.999


def test_ground_truth_that_is_wrong_is_one_line(tiny_index: Path, tmp_path: Path, save: Any) -> None:
    (tmp_path / "text.npz").write_text("losses")
    with pytest.raises(DataError, match="`ground_truth` .*text.npz must be an .npz file; see docs/evaluation.md"):
        GroundTruth.load(tmp_path / "text.npz")
    with pytest.raises(DataError, match="`ground_truth` .*none.npz cannot be read: .*No such file"):
        GroundTruth.load(tmp_path / "none.npz")
    whole = save().read_bytes()
    (tmp_path / "damaged.npz").write_bytes(whole[:200] + b"x" * 100 + whole[300:])
    with pytest.raises(DataError, match="`ground_truth` .*damaged.npz cannot be read: "):
        GroundTruth.load(tmp_path / "damaged.npz")
    with pytest.raises(
        DataError, match="has no array masks, but losses, .*; see docs/evaluation.md, and whether it is"
    ):
        GroundTruth.load(save(masks=None))
    for images in (np.zeros((6, 4, 4), np.float32), np.zeros((6, 4, 4, 4), np.uint8), np.zeros((6, 4), np.uint8)):
        with pytest.raises(
            DataError, match=r"must have query_images \(queries, height, width\) or .* in uint8, they are"
        ):
            GroundTruth.load(save(query_images=images))
    with pytest.raises(DataError, match=r"must have an array losses \(models, queries, strata\)"):
        GroundTruth.load(save(losses=np.zeros((20, 6))))
    with pytest.raises(DataError, match=r"has queries \(=6\) in losses, but \(=5\) in query_labels; one of them lacks"):
        GroundTruth.load(save(query_labels=np.zeros(5, int)))
    with pytest.raises(DataError, match="must have finite losses"):
        GroundTruth.load(save(losses=np.full((20, 6, 2), np.nan)))
    with pytest.raises(DataError, match="must have one mask for a subset and one model .* subset 0 has several"):
        GroundTruth.load(save(seeds=np.zeros(20, int)))
    with pytest.raises(DataError, match="must have one mask for a subset"):
        GroundTruth.load(save(masks=np.eye(20, 20, dtype=bool)))
    with pytest.raises(DataError, match="must have at least 3 whole subsets, has 2"):
        GroundTruth.load(save(subsets=np.arange(20) // 2 // 5, seeds=np.arange(20) % 10, masks=np.ones((20, 20), bool)))
    path = save(train_ids=np.arange(20) + 5)
    shown = run("lds", tiny_index, "--ground-truth", path)
    assert shown.exit_code == 1
    assert shown.output.count("\n") == 1
    assert "are not the `train_ids` of the ground truth (=20), 0 is in one of them only" in shown.output
    shown = run("lds", tiny_index, "--ground-truth", save(train_ids=np.arange(20)[::-1]))
    assert shown.output.endswith("must be increasing; sort them, and `masks` alike.\n")


# Two indexes of the same examples.


@pytest.fixture(scope="module")
def other_index(tmp_path_factory: pytest.TempPathFactory, dit_folder: Path, digits_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("index") / "more-draws"
    featurize(dit_folder, digits_folder, path, **SETTINGS | {"num_draws": 16})
    return path


def test_scores_agree_with_themselves_and_not_with_their_opposite() -> None:
    scores = stream(0, "scores").standard_normal((7, 40))
    for name, other, expected in (("same", scores, [1, 1]), ("reversed", -scores, [-1, 0])):
        found = agreement(scores, other, top_k=5)["all"]
        assert list(found) == ["rank correlation", "overlap of top 5"], name
        assert [x.value for x in found.values()] == pytest.approx(expected), name
        assert [x.standard_error for x in found.values()] == pytest.approx([0, 0], abs=1e-12), name


def test_agreement_is_a_mean_over_the_queries_of_a_kind() -> None:
    scores = stream(0, "scores").standard_normal((6, 40))
    other = scores * np.array([1, 1, 1, 1, -1, -1])[:, None]
    found = agreement(scores, other, top_k=5, kinds=["held-out"] * 2 + ["generated"] * 4)
    assert found["held-out"]["rank correlation"].value == pytest.approx(1)
    assert found["generated"]["rank correlation"].value == pytest.approx(0)
    assert found["generated"]["rank correlation"].standard_error == pytest.approx(0.5, rel=0.1)
    assert found["generated"]["overlap of top 5"].value == pytest.approx(0.5)


def test_more_draws_agree_with_fewer_on_pictures_and_on_the_queries_of_a_ground_truth(
    tiny_index: Path, other_index: Path, digits_folder: Path, save: Any
) -> None:
    command = ("agreement", tiny_index, other_index, "--device", "cpu", "--top-k", 5)
    shown = run(*command, "--images", digits_folder, "--num-queries", 8)
    assert shown.exit_code == 0, shown.output
    assert "8 queries, 20 examples" in shown.output
    found = json.loads(run(*command, "--ground-truth", save(), "--json").stdout)
    assert list(found) == ["held-out", "generated"]
    for rows in found.values():
        assert 0.3 < rows["rank correlation"]["value"] < 0.999
        assert 0 < rows["rank correlation"]["standard_error"] < 0.3
    itself = run("agreement", tiny_index, tiny_index, "--device", "cpu", "--images", digits_folder, "--json")
    assert json.loads(itself.stdout)["all"]["rank correlation"]["value"] == pytest.approx(1)


def test_queries_are_chosen_by_a_hash_of_their_ids(digits_folder: Path) -> None:
    chosen = Queries.sample(digits_folder, 5)
    assert len(chosen.images) == len(chosen.labels or ()) == 5
    all_of_them = Queries.read(open_dataset(digits_folder), range(20))
    assert all_of_them.choose(5).labels == chosen.labels
    for image, again in zip(chosen.images, all_of_them.choose(5).images, strict=True):
        np.testing.assert_array_equal(image, again)
    assert all_of_them.choose(50).labels == all_of_them.labels
    with pytest.raises(ArgumentError, match="`num_queries` must be a whole number of at least 2, got 1"):
        all_of_them.choose(1)


def test_classes_are_matched_by_name_where_they_have_names(attributor: Attributor, digits_folder: Path) -> None:
    images = [Image.open(path) for path in sorted(digits_folder.glob("2/*.png"))[:3]]
    expected = attributor.scores(images, labels=[2, 2, 2])
    for class_names, label in ((None, 2), (["2"], 0), (["x", "2"], 1)):
        queries = Queries(images, labels=[label] * 3, class_names=class_names)
        np.testing.assert_array_equal(queries.scores(attributor), expected)
    with pytest.raises(DataError, match=r"the queries have a class 'cat', those of .* are called 0, 1, 2; rename it"):
        Queries(images, labels=[0] * 3, class_names=["cat"]).scores(attributor)
    for labels in (None, [2, None, 2]):
        with pytest.raises(DataError, match=r"the teacher of .* needs a class for every query; sort them into folders"):
            Queries(images, labels=labels).scores(attributor)


def test_names_of_classes_that_an_index_knows_by_number(
    tmp_path: Path, attributor: Attributor, tiny_index: Path, digits_folder: Path
) -> None:
    shutil.copytree(tiny_index, tmp_path / "index")
    manifest = read_sealed(tmp_path / "index" / "manifest.json")
    manifest["dataset"]["label_names"] = None
    write_sealed(tmp_path / "index" / "manifest.json", manifest)
    numbered = Attributor.open(tmp_path / "index", device="cpu")
    images = [Image.open(path) for path in sorted(digits_folder.glob("2/*.png"))[:2]]
    found = Queries(images, labels=[0, 0], class_names=["2"]).scores(numbered)
    np.testing.assert_array_equal(found, attributor.scores(images, labels=[2, 2]))
    with pytest.raises(DataError, match="a class 'cat', those of .* are called by whole numbers; rename it"):
        Queries(images, labels=[0, 0], class_names=["cat"]).scores(numbered)


def test_a_text_conditional_teacher_needs_prompts(tmp_path: Path, sd_folder: Path, digits_folder: Path) -> None:
    paths = [str(path) for path in sorted(digits_folder.glob("*/*.png"))[:6]]
    rows = {"image": paths, "text": ["a b", "b", "c", "d", "e", "f"]}
    captioned = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    featurize(sd_folder, captioned, tmp_path / "index", **SETTINGS)
    attributor = Attributor.open(tmp_path / "index", device="cpu")
    assert Queries.sample(captioned, 3).scores(attributor).shape == (3, 6)
    with pytest.raises(DataError, match=r"the teacher of .* needs a prompt for every query; add a metadata\.csv"):
        Queries.sample(str(digits_folder), 3).scores(attributor)
    found = self_retrieval(attributor, captioned, num_queries=6, top_k=1, score="preconditioned-cosine")
    assert found["training examples"]["first"].value == 1


def test_indexes_of_other_examples_are_refused(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, tiny_index: Path, attributor: Attributor
) -> None:
    digits = datasets.load_dataset("imagefolder", data_dir=str(digits_folder), split="train")
    few = SETTINGS | {"num_draws": 2}
    featurize(dit_folder, digits.select(range(9)), tmp_path / "nine", **few)
    shown = run("agreement", tiny_index, tmp_path / "nine", "--images", digits_folder)
    assert shown.exit_code == 1
    assert shown.output.count("\n") == 1
    assert "nine must be an index of the same examples as" in shown.output
    assert "the ids (=20 and 9) differ; featurize the same dataset." in shown.output
    featurize(dit_folder, digits.select(list(range(19, -1, -1))), tmp_path / "turned", **few)
    with pytest.raises(StoreMismatchError, match=r"turned must be .*, the contents of the datasets differ; featurize"):
        check_same_examples(attributor, Attributor.open(tmp_path / "turned"))


def test_agreement_needs_one_source_of_queries(tiny_index: Path, digits_folder: Path, save: Any) -> None:
    for flags in ((), ("--images", digits_folder, "--ground-truth", save())):
        shown = run("agreement", tiny_index, tiny_index, *flags)
        assert shown.exit_code == 2
        assert "give the queries by --images or by --ground-truth, one of them." in shown.output
    with pytest.raises(ArgumentError, match=r"`top_k` must be from 1 to the number of training examples \(=4\), got 5"):
        agreement(np.zeros((2, 4)), np.zeros((2, 4)), top_k=5)


# An index and its own examples.


def test_an_index_finds_its_own_examples_where_features_are_normalised(tiny_index: Path) -> None:
    command = ("self-retrieval", tiny_index, "--device", "cpu", "--num-queries", 12, "--top-k", 3)
    shown = run(*command, "--score", "preconditioned-cosine")
    assert shown.exit_code == 0, shown.output
    assert "12 of 20 examples" in shown.output
    assert shown.output.count("1.000 ± 0.000") == 3
    found = json.loads(run(*command, "--score", "dot", "--json").stdout)["training examples"]
    assert list(found) == ["first", "in top 3", "mean reciprocal rank"]
    assert found["first"]["value"] < found["mean reciprocal rank"]["value"] < found["in top 3"]["value"]


def test_the_rank_of_an_example_is_that_of_its_own_column(
    attributor: Attributor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores fall with the id, for every query: the rank of an example is its id, from 1."""
    falling = -np.tile(attributor.ids.astype(float), (20, 1))
    monkeypatch.setattr(Queries, "scores", lambda queries, index: falling)
    found = self_retrieval(attributor, num_queries=50, top_k=4)["training examples"]
    expected = [1 / 20, 4 / 20, np.mean(1 / np.arange(1, 21))]
    assert [x.value for x in found.values()] == pytest.approx(expected)
    assert found["in top 4"].standard_error == pytest.approx((0.2 * 0.8 / 20) ** 0.5, rel=0.1)


def test_self_retrieval_needs_the_dataset_of_the_index(
    tmp_path: Path, attributor: Attributor, digits_folder: Path
) -> None:
    shutil.copytree(digits_folder, tmp_path / "moved")
    assert self_retrieval(attributor, tmp_path / "moved", num_queries=2)
    next((tmp_path / "moved").rglob("*.png")).unlink()
    with pytest.raises(
        StoreMismatchError,
        match=r"the index was made from another data set .*, not from .*moved; their fingerprints differ",
    ):
        self_retrieval(attributor, tmp_path / "moved")
    with pytest.raises(ArgumentError, match=r"`top_k` must be from 1 .* \(=20\), got 21"):
        self_retrieval(attributor, top_k=21)
    with pytest.raises(ArgumentError, match="`num_queries` must be a whole number of at least 2, got 0"):
        self_retrieval(attributor, num_queries=0)


# Losses after removal.


@pytest.fixture
def save_results(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes losses of 5 queries with changes; None leaves an array out.

    Losses of the seeds differ by 10. Removal by "ours" costs query q 2 + q, by "random" 1; of the larger part, twice
    as much.
    """
    full = np.arange(5.0)[:, None] + np.array([0.0, 10.0])
    rises = np.stack([2 + np.arange(5.0), np.ones(5)])[:, None] * np.array([1.0, 2.0])[:, None]
    results = {
        "methods": np.array(["ours", "random"]),
        "fractions": np.array([0.01, 0.07]),
        "seeds": np.arange(2),
        "losses": full + rises[..., None],
        "full_losses": full,
    }

    def write(**changes: Any) -> Path:
        path = tmp_path / "results.npz"
        np.savez(path, **{name: value for name, value in (results | changes).items() if value is not None})
        return path

    return write


def test_rises_and_their_differences_are_means_over_queries(save_results: Callable[..., Path]) -> None:
    found = counterfactual(Counterfactuals.load(save_results()))
    small, large = "1 %, 5 queries", "7 %, 5 queries"
    assert list(found) == [small, large]
    assert list(found[small]) == ["ours", "random", "random less ours"]
    assert [x.value for x in found[small].values()] == pytest.approx([4, 1, -3])
    assert [x.value for x in found[large].values()] == pytest.approx([8, 2, -6])
    spread = np.arange(5).std() / 5**0.5
    assert [x.standard_error for x in found[small].values()] == pytest.approx([spread, 0, spread], rel=0.1, abs=1e-12)


def test_fractions_are_in_order_whenever_they_were_added(save_results: Callable[..., Path]) -> None:
    with np.load(save_results()) as file:
        changes = {"fractions": file["fractions"][::-1], "losses": file["losses"][:, ::-1]}
    sorted_ = counterfactual(Counterfactuals.load(save_results()))
    assert list(found := counterfactual(Counterfactuals.load(save_results(**changes)))) == list(sorted_)
    assert found == sorted_


def test_methods_are_compared_with_the_one_that_is_named(save_results: Callable[..., Path]) -> None:
    results = Counterfactuals.load(save_results())
    found = counterfactual(results, "random")["7 %, 5 queries"]
    assert {name: x.value for name, x in found.items()} == pytest.approx(
        {"ours": 8, "random": 2, "ours less random": 6}
    )
    with pytest.raises(ArgumentError, match="`against` must be one of 'ours', 'random', got 'theirs'"):
        counterfactual(results, "theirs")


def test_a_query_counts_with_the_seeds_that_have_all_models(save_results: Callable[..., Path]) -> None:
    with np.load(save_results()) as file:
        losses, full = file["losses"], file["full_losses"]
    losses[0, 1, 4, 1] = np.nan  # a seed of query 4
    losses[1, 1, 4, 0] += 4
    full[3, 0] = full[2, 0] = full[2, 1] = np.nan  # a seed of query 3, all of query 2
    path = save_results(losses=losses, full_losses=full)
    found = counterfactual(Counterfactuals.load(path))
    assert {name: row["ours"].value for name, row in found.items()} == pytest.approx(
        {"1 %, 4 queries": (2 + 3 + 5 + 6) / 4, "7 %, 4 queries": 2 * (2 + 3 + 5 + 6) / 4}
    )
    assert found["7 %, 4 queries"]["random"].value == pytest.approx((2 + 2 + 2 + 6) / 4)  # not the seed without ours
    assert "seeds: 1 to 2 a query" in " ".join(run("counterfactual", path).output.split())
    losses[:, 1, 1:] = np.nan
    assert list(counterfactual(Counterfactuals.load(save_results(losses=losses)))) == ["1 %, 5 queries"]
    losses[:, :, 1:] = np.nan
    with pytest.raises(DataError, match="`results` .* must have at least 2 queries with the models .*, has 1; train"):
        Counterfactuals.load(save_results(losses=losses))


def test_the_counterfactual_command_prints_a_table_or_json(tmp_path: Path, save_results: Callable[..., Path]) -> None:
    shown = run("counterfactual", save_results(), "--plot", tmp_path / "rises.png")
    assert shown.exit_code == 0, shown.output
    assert "rise of the loss from 7, mean ± standard error, seeds: 2" in " ".join(shown.output.split())
    assert "4.00 ± 0." in shown.output
    assert (tmp_path / "rises.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(run("counterfactual", save_results(), "--json", "--against", "random").stdout)
    assert found["7 %, 5 queries"]["ours less random"]["value"] == pytest.approx(6)


def test_results_that_are_wrong_are_one_line(tmp_path: Path, save_results: Callable[..., Path]) -> None:
    (tmp_path / "text.npz").write_text("losses")
    with pytest.raises(DataError, match="`results` .*text.npz must be an .npz file; see docs/evaluation.md"):
        Counterfactuals.load(tmp_path / "text.npz")
    with pytest.raises(DataError, match=r"must have an array losses \(methods, fractions, queries, seeds\), its shape"):
        Counterfactuals.load(save_results(losses=np.zeros((2, 2, 5))))
    with pytest.raises(DataError, match="`results` .* has no array full_losses, but methods"):
        Counterfactuals.load(save_results(full_losses=None))
    with pytest.raises(DataError, match="must have finite losses, NaN for no model; train those again"):
        Counterfactuals.load(save_results(full_losses=np.full((5, 2), np.inf)))
    none = {"methods": np.array([], str), "losses": np.zeros((0, 2, 5, 2))}
    with pytest.raises(DataError, match="must have at least 2 queries with the models .*, has 0; train more"):
        Counterfactuals.load(save_results(**none))
    shown = run("counterfactual", tmp_path / "none.npz")
    assert shown.exit_code == 1
    assert shown.output.startswith("Error: `results` ")
    assert shown.output.count("\n") == 1


# Pictures.


def test_bars_stand_side_by_side_with_their_errors_and_lines_lie_over_their_group() -> None:
    from matplotlib.figure import Figure

    rows = {"LDS": Measured(0.3, 0.02), "other": Measured(-0.1, 0.03), "ceiling": Measured(0.8, 0.01)}
    axes = Figure().subplots()
    draw_bars(axes, {"held-out": rows, "generated": rows}, lines=["ceiling"])
    bars = sorted((bar.get_x(), bar.get_height()) for bar in axes.patches)
    assert [height for _, height in bars] == pytest.approx([0.3, -0.1, 0.3, -0.1])
    segments = [segment for lines in axes.collections for segment in lines.get_segments()]
    spans = sorted(abs(np.ptp(segment, axis=0)).tolist() for segment in segments)
    assert np.array(spans) == pytest.approx(
        np.array([[0, 0.02], [0, 0.02], [0, 0.04], [0, 0.04], [0, 0.06], [0, 0.06], [0.9, 0], [0.9, 0]])
    )
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"LDS", "other", "ceiling"}


def test_the_lds_plot_has_a_ceiling_and_no_seeds(
    tmp_path: Path, tiny_index: Path, save: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}

    def keep(figures: Any, path: Path, **choices: Any) -> None:
        drawn.update(figures=figures, path=path, **choices)

    monkeypatch.setattr("carv_attrib.evaluate_cli.save_bars", keep)
    shown = run("lds", tiny_index, "--ground-truth", save(), "--device", "cpu", "--plot", tmp_path / "lds.png")
    assert shown.exit_code == 0, shown.output
    assert [list(row) for row in drawn["figures"].values()] == [["LDS", "ceiling"]] * 2
    assert (drawn["lines"], drawn["path"], drawn["label"]) == (["ceiling"], tmp_path / "lds.png", "LDS")


def test_names_in_a_picture_are_plain_text_and_a_bad_file_is_one_line(tmp_path: Path) -> None:
    figures = {"5 $\\frac$": {"$\\broken{": Measured(1.0, 0.1)}}
    save_bars(figures, tmp_path / "bars.svg", corner="removed", label="rise")
    assert "broken" in (tmp_path / "bars.svg").read_text()
    with pytest.raises(CarvError, match=r"`plot` cannot be written to .*bars\.docx: .*; name a \.png"):
        save_bars(figures, tmp_path / "bars.docx", corner="removed", label="rise")
