"""More draws at query time: what they do to scores and errors, where they stop, and what cannot be refined."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from carv_attrib import Attributor, featurize, load_teacher
from carv_attrib.data import open_dataset
from carv_attrib.errors import ArgumentError, DataError, StoreMismatchError
from carv_attrib.inspection import verify
from carv_attrib.kernel import kernel_of
from carv_attrib.maintenance import remove
from carv_attrib.references import References
from carv_attrib.refinement import encode_examples, fresh_draws
from carv_attrib.scores import score_bands
from tests.conftest import SETTINGS


@pytest.fixture(scope="module")
def attributor(unrounded_index: Path, tmp_path_factory: pytest.TempPathFactory) -> Attributor:
    copy = shutil.copytree(unrounded_index, tmp_path_factory.mktemp("refined") / "index")  # draws are kept in it
    return Attributor.open(copy, device="cpu")


@pytest.fixture(scope="module")
def picture(digits_folder: Path) -> Path:
    return digits_folder / "1" / "001.png"


def all_rounds(attributor: Attributor, picture: Path, rounds: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return features of a query and of all examples: of the draws of the index, and of each round."""
    estimator, store, scorer = attributor.estimator, attributor.store, attributor.members[0]
    asked, ids = scorer.encode([Image.open(picture)], [1]), store.ids.tolist()
    encoded = encode_examples(estimator, open_dataset(store.manifest["dataset"]["source"]), ids)
    query, train = [scorer.features(asked)], [store.read_features(range(len(ids)))]
    for number in range(rounds):
        query.append(fresh_draws(estimator, asked.encoded, asked.ids, number))
        train.append(fresh_draws(estimator, encoded, ids, number))
    return query, train


def test_refined_scores_are_those_of_all_draws_together(attributor: Attributor, picture: Path) -> None:
    """Equation (11) by hand: means over replicates of all rounds, and an H of the new draws and of the index's."""
    refined = attributor.query(picture, label=1, top_k=10, refine=10, max_draws=12, damping=0.5)
    store, (query, train) = attributor.store, all_rounds(attributor, picture, 2)
    q, t = (torch.cat(x, dim=2).mean(2).double() for x in (query, train))
    candidates = [store.ids.tolist().index(i) for i in refined.ids]
    references = [row for row, i in enumerate(store.ids) if i in References(store).ids and row not in candidates]
    others = [row for row in range(len(store.ids)) if row not in candidates]
    old, new = train[0].double(), (sum(train) / 3).double()

    def moment(vectors: Tensor) -> Tensor:
        own = torch.einsum("nbrd,nbre->bde", vectors, vectors) / (vectors.shape[0] * vectors.shape[2])
        return (own + own.mean(0)) / 2

    share, drawn = len(others) / len(store.ids), candidates + references
    known = moment(old[others]) * (new[drawn].square().sum() / old[drawn].square().sum())
    hessians = (1 - share) * moment(new[candidates]) + share * (known + moment(new[references])) / 2
    of_blocks = torch.block_diag(*[torch.ones(16, 16)] * 3)
    means = hessians.diagonal(dim1=1, dim2=2).view(2, 3, 16).mean(2).repeat_interleave(16, 1)
    damped = hessians * of_blocks + 0.5 * torch.diag_embed(means)
    expected = torch.stack([q[0, b] @ torch.linalg.solve(damped[b], t[candidates, b].T) for b in range(2)]).mean(0)
    np.testing.assert_allclose(refined.scores, expected, rtol=1e-4)


@pytest.mark.parametrize("rounds", [1, 3])
def test_refined_errors_are_those_of_two_halves(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, picture: Path, rounds: int
) -> None:
    """Of an index with one draw in each band, all of whose examples are refined: as of one with two halves."""
    featurize(dit_folder, digits_folder, tmp_path / "index", **SETTINGS | {"num_bands": 4})
    attributor = Attributor.open(tmp_path / "index", device="cpu")
    refined = attributor.query(picture, label=1, top_k=20, refine=20, max_draws=4 + 4 * rounds, damping=0.5)
    both = all_rounds(attributor, picture, rounds)
    query, train = (torch.cat([sum(x[half::2]) for half in range(2)], dim=2) * 2 / len(x) for x in both)
    kernel = kernel_of(train, 16)
    inverse = kernel.inverse("preconditioned", 0.5)
    expected = score_bands(kernel.banded(query), kernel.banded(train), inverse).select(refined.ids)
    np.testing.assert_allclose(refined.scores, expected.scores[0], rtol=1e-4)
    projection = np.array([match.projection_error for match in refined.proponents])
    of_draws = (refined.standard_errors**2 - projection**2) ** 0.5
    np.testing.assert_allclose(of_draws, expected.standard_errors[0], rtol=1e-3)


def evaluations_and_scores(index: Path, picture: Path, max_draws: int = 12) -> tuple[int, np.ndarray]:
    """Return what refining 10 examples in a newly opened index takes and finds."""
    opened = Attributor.open(index, device="cpu")
    result = opened.query(picture, label=1, top_k=10, refine=10, max_draws=max_draws)
    return int(result.cost["network_evaluations"]), result.scores


OWN, OF_ALL_20 = 4 * (1 + 10), 4 * 20
"""Evaluations of a round: of the query and 10 candidates, and of the references, which are all examples."""


def test_draws_of_references_are_kept_in_the_index(copied_index: Path, picture: Path) -> None:
    folder = copied_index / "references"
    folder.write_text("in the way")  # a folder that cannot be written
    evaluations, scores = evaluations_and_scores(copied_index, picture)
    assert evaluations == 4 + 2 * (OWN + OF_ALL_20)
    folder.unlink()
    for expected in (4 + 2 * (OWN + OF_ALL_20), 4 + 2 * OWN):
        evaluations, again = evaluations_and_scores(copied_index, picture)
        assert evaluations == expected
        np.testing.assert_array_equal(again, scores)
    assert evaluations_and_scores(copied_index, picture, max_draws=16)[0] == 4 + 3 * OWN + OF_ALL_20  # a round more
    assert folder.stat().st_mode == copied_index.stat().st_mode
    assert verify(copied_index) == []


def test_damaged_draws_of_references_are_made_again(copied_index: Path, picture: Path) -> None:
    _, scores = evaluations_and_scores(copied_index, picture)
    damaged = sorted((copied_index / "references").iterdir())[1]
    content = bytearray(damaged.read_bytes())
    content[-9] ^= 1
    damaged.write_bytes(content)
    assert [f"{damaged} is damaged" in problem for problem in verify(copied_index)] == [True]
    evaluations, again = evaluations_and_scores(copied_index, picture)
    assert evaluations == 4 + 2 * OWN + OF_ALL_20
    np.testing.assert_array_equal(again, scores)
    assert verify(copied_index) == []


def test_draws_of_other_references_are_not_used(
    copied_index: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("carv_attrib.references.NUM_REFERENCES", 5)
        assert evaluations_and_scores(copied_index, picture)[0] == 4 + 2 * (OWN + 4 * 5)
    assert evaluations_and_scores(copied_index, picture)[0] == 4 + 2 * (OWN + OF_ALL_20)
    assert len(list((copied_index / "references").iterdir())) == 2  # of each round the last that were made
    bfloat16 = load_teacher(Attributor.open(copied_index).store.manifest["teacher"]["source"], dtype="bfloat16")
    opened = Attributor.open(copied_index, teacher=bfloat16)
    result = opened.query(picture, label=1, top_k=10, refine=10, max_draws=12)
    assert result.cost["network_evaluations"] == 4 + 2 * (OWN + OF_ALL_20)


def test_nothing_of_a_removed_example_is_left_in_references(copied_index: Path, picture: Path) -> None:
    opened = Attributor.open(copied_index, device="cpu")
    candidates = opened.query(picture, label=1, refine=4, top_k=4, max_draws=8).ids.tolist()
    removed = next(i for i in (0, 8, 16) if not set(range(i, i + 8)) & set(candidates))  # of a part that is not read
    (file,) = (copied_index / "references").iterdir()
    content = file.read_bytes()
    remove(copied_index, ids=[removed])
    assert not file.exists()
    opened.query(picture, label=1, refine=4, top_k=4, max_draws=12)  # which was opened before
    assert list(file.parent.iterdir()) == []
    file.write_bytes(content)
    assert ["has removed examples" in problem for problem in verify(copied_index)] == [True]
    file.write_bytes(b"damaged")
    remove(copied_index, ids=[4])
    assert not file.exists()
    assert evaluations_and_scores(copied_index, picture)[0] == 4 + 2 * (OWN + OF_ALL_20 - 4 * 2)


def test_fresh_draws_are_new_in_each_round_and_shared_between_examples(attributor: Attributor, picture: Path) -> None:
    scorer = attributor.members[0]
    asked = scorer.encode([Image.open(picture)] * 2, [1, 1])
    of_index = scorer.features(asked)
    first, second = (fresh_draws(attributor.estimator, asked.encoded, [-1, -2], n) for n in range(2))
    torch.testing.assert_close(first[0], first[1])
    for one, other in ((of_index, first), (first, second)):
        assert not torch.allclose(one, other, rtol=0.1)


def test_refining_stops_at_the_error_that_was_asked_for(attributor: Attributor, picture: Path) -> None:
    most = attributor.query(picture, label=1, top_k=3, refine=6, max_draws=32)
    target = 1.5 * float(most.standard_errors.max())
    refined = attributor.query(picture, label=1, top_k=3, refine=6, target_se=target, max_draws=32)
    assert refined.standard_errors.max() <= target
    assert refined.settings["target_se"] == target
    assert (most.settings["draws_taken"], most.settings["max_draws"]) == (32, 32)
    assert 4 < int(refined.settings["draws_taken"]) < 32
    assert refined.cost["network_evaluations"] < most.cost["network_evaluations"]


def test_opponents_that_are_returned_must_be_sure_enough_too(attributor: Attributor, picture: Path) -> None:
    question: dict[str, Any] = {"label": 1, "top_k": 3, "opponents": True, "refine": 6}
    first = attributor.query(picture, **question, max_draws=8)
    errors = [max(m.standard_error or 0.0 for m in matches) for matches in (first.proponents, first.opponents)]
    target = sum(errors) / 2  # met by one end after the first round, not by the other
    found = attributor.query(picture, **question, max_draws=12, target_se=target)
    assert found.settings["draws_taken"] == 12
    reached = max(m.standard_error or 0.0 for m in (*found.proponents, *found.opponents))
    assert ("aimed at" in found.warning) == (reached > target)


def test_an_index_of_many_draws_gets_as_many_more(
    attributor: Attributor, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("carv_attrib.attributor.MAX_DRAWS", 4)
    assert attributor.query(picture, label=1, top_k=5, refine=5).settings["max_draws"] == 8


def test_only_candidates_are_refined(attributor: Attributor, picture: Path) -> None:
    plain = attributor.query(picture, label=1, top_k=5)
    refined = attributor.query(picture, label=1, top_k=5, refine=5, max_draws=8)
    assert set(refined.ids) == set(plain.ids)
    assert len(attributor.query(picture, label=1, top_k=2, opponents=True, refine=3, max_draws=8).opponents) == 2


def test_probabilities_need_more_candidates_than_are_shown(attributor: Attributor, picture: Path) -> None:
    for refine, known in ((9, False), (10, True)):
        found = attributor.query(picture, label=1, top_k=5, refine=refine, max_draws=8).proponents
        assert {match.top_probability is not None for match in found} == {known}


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"refine": 2, "top_k": 3}, r"`refine` must be a whole number of at least 3 \(all that are returned\), got 2"),
        ({"target_se": 0.1}, "`target_se` is where refining stops; give `refine` too"),
        ({"max_draws": 8}, "`max_draws` is where refining stops; give `refine` too"),
        ({"refine": 10, "target_se": 0.0}, "`target_se` must be a positive number, got 0.0"),
        ({"refine": 10, "kernel": "means"}, "`refine` needs `kernel` bands, got means; give the first"),
        (
            {"refine": 10, "max_draws": 4},
            r"`max_draws` must be .* at least 8 \(those of the index and as many more\), got 4",
        ),
    ],
)
def test_a_bad_refinement_is_one_line(
    attributor: Attributor, picture: Path, question: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        attributor.query(picture, label=1, **question)


def test_iid_draws_cannot_be_refined(tmp_path: Path, dit_folder: Path, digits_folder: Path, picture: Path) -> None:
    featurize(dit_folder, digits_folder, tmp_path / "index", **SETTINGS | {"scheme": "iid"})
    with pytest.raises(ArgumentError, match="`refine` needs strata, .* this index has `scheme` iid"):
        Attributor.open(tmp_path / "index", device="cpu").query(picture, label=1, refine=10)


def test_the_data_set_must_be_there_and_be_the_same(tmp_path: Path, copied_index: Path, digits_folder: Path) -> None:
    shutil.copytree(digits_folder, tmp_path / "digits")
    picture = tmp_path / "digits" / "1" / "001.png"
    moved = Attributor.open(copied_index, dataset=tmp_path / "digits", device="cpu")
    assert len(moved.query(picture, label=1, refine=10, max_draws=8).ids) == 10
    shutil.copy(picture, tmp_path / "digits" / "1" / "999.png")
    changed = Attributor.open(copied_index, dataset=tmp_path / "digits", device="cpu")
    with pytest.raises(StoreMismatchError, match="the index was made from another data set .* Give the first as"):
        changed.query(picture, label=1, refine=10, max_draws=8)
    gone = Attributor.open(copied_index, dataset=tmp_path / "none", device="cpu")
    with pytest.raises(DataError, match="none"):
        gone.query(picture, label=1, refine=10)
