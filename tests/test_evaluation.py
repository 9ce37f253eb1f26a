"""Ground truth of a small index: losses that its own scores explain, and files that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from carv_attrib import Attributor
from carv_attrib.cli import main
from carv_attrib.errors import DataError
from carv_attrib.evaluation import GroundTruth, lds
from carv_attrib.seeding import stream

NUM_QUERIES = 6


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


def test_the_command_prints_a_table_or_json(tiny_index: Path, save: Any) -> None:
    command = ["evaluate", "lds", str(tiny_index), "--ground-truth", str(save()), "--device", "cpu"]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0
    assert "10 subsets" in shown.output
    assert "1.000 ± 0.000" in shown.output
    printed = json.loads(CliRunner().invoke(main, [*command, "--json", "--score", "dot"]).stdout)
    assert printed["generated"]["LDS"]["value"] < 0.999


def test_a_file_that_is_wrong_is_one_line(tiny_index: Path, tmp_path: Path, save: Any) -> None:
    (tmp_path / "text.npz").write_text("losses")
    with pytest.raises(DataError, match="`ground_truth` .*text.npz must be an .npz file; see docs/evaluation.md"):
        GroundTruth.load(tmp_path / "text.npz")
    with pytest.raises(DataError, match="`ground_truth` .*none.npz cannot be read: .*No such file"):
        GroundTruth.load(tmp_path / "none.npz")
    whole = save().read_bytes()
    (tmp_path / "damaged.npz").write_bytes(whole[:200] + b"x" * 100 + whole[300:])
    with pytest.raises(DataError, match="`ground_truth` .*damaged.npz cannot be read: "):
        GroundTruth.load(tmp_path / "damaged.npz")
    with pytest.raises(DataError, match=r"must have an array masks \(models, train\) .* its shape is \(\); see"):
        GroundTruth.load(save(masks=None))
    with pytest.raises(DataError, match=r"must have an array losses \(models, queries, strata\)"):
        GroundTruth.load(save(losses=np.zeros((20, 6))))
    with pytest.raises(DataError, match=r"must have an array query_labels \(queries\) whose axes fit the others"):
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
    shown = CliRunner().invoke(main, ["evaluate", "lds", str(tiny_index), "--ground-truth", str(path)])
    assert shown.exit_code == 1
    assert shown.output.count("\n") == 1
    assert "are not the `train_ids` of the ground truth (=20)" in shown.output
