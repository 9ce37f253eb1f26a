from __future__ import annotations

import io
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from carv_attrib import Attributor, featurize, load_teacher
from carv_attrib.data import open_dataset
from carv_attrib.errors import ArgumentError, DataError, StoreError, StoreMismatchError
from carv_attrib.estimator import average_bands
from carv_attrib.files import write_sealed
from carv_attrib.kernel import fit_kernel
from carv_attrib.maintenance import remove
from carv_attrib.pipeline import build_index
from carv_attrib.refinement import encode_examples, fresh_draws
from carv_attrib.scorer import Choice, Scorer, _query_id
from carv_attrib.scores import score_bands
from carv_attrib.store import FeatureStore
from tests.conftest import SETTINGS


@pytest.fixture(scope="module")
def attributor(tiny_index: Path) -> Attributor:
    return Attributor.open(tiny_index, device="cpu")


@pytest.fixture(scope="module")
def scorer(attributor: Attributor) -> Scorer:
    return attributor.members[0]


@pytest.fixture(scope="module")
def pictures(digits_folder: Path) -> list[tuple[Image.Image, int]]:
    digits = open_dataset(digits_folder)
    return [(x.image, x.label) for x in (digits.load(row) for row in range(len(digits))) if x.label is not None]


def test_a_training_example_asked_again_is_its_own_first_proponent(
    attributor: Attributor, pictures: list[tuple[Image.Image, int]]
) -> None:
    for row in (0, 7, 19):
        image, label = pictures[row]
        result = attributor.query(image, label=label, top_k=3, score="preconditioned-cosine")
        assert result.ids[0] == row
        assert result.scores[0] == pytest.approx(1, abs=1e-3)


def test_query_features_are_the_training_features_up_to_float16(
    attributor: Attributor, pictures: list[tuple[Image.Image, int]]
) -> None:
    """Shared draws: the same picture gives the same features, whoever asks."""
    store = FeatureStore.open(attributor.store.path)
    images, labels = [list(column) for column in zip(*pictures[:3], strict=True)]
    features = attributor.members[0].features(attributor.members[0].encode(images, labels))
    stored = store.read_features([0, 1, 2])
    assert ((features - stored).abs().amax(-1) / features.abs().amax(-1)).max() < 2**-11


def test_a_query_returns_what_the_matrix_of_scores_says(
    attributor: Attributor, pictures: list[tuple[Image.Image, int]]
) -> None:
    image, label = pictures[3]
    scores, errors = attributor.scores_with_errors([image], labels=[label])
    result = attributor.query(image, label=label, top_k=20, opponents=True)
    order = np.argsort(-scores[0])
    assert result.ids.tolist() == attributor.ids[order].tolist()
    np.testing.assert_allclose(result.scores, scores[0, order], rtol=1e-6)
    np.testing.assert_allclose(result.standard_errors, errors[0, order], rtol=1e-6)
    assert [m.id for m in result.opponents] == result.ids[::-1].tolist()
    assert (errors > 0).all()


def test_scores_with_errors_do_not_depend_on_how_many_are_asked(
    attributor: Attributor, pictures: list[tuple[Image.Image, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = [list(column) for column in zip(*pictures[:3], strict=True)]
    found = attributor.band_scores(images, labels=labels)
    monkeypatch.setattr("carv_attrib.attributor._BANDS_AT_ONCE", 8)
    scores, errors = attributor.scores_with_errors(images, labels=labels)
    np.testing.assert_allclose(scores, attributor.scores(images, labels=labels), rtol=1e-9)
    np.testing.assert_allclose(scores, found.scores.numpy(), rtol=1e-9)
    np.testing.assert_allclose(errors, found.standard_errors.numpy(), rtol=1e-9)
    assert 0 < found.projection_errors.max() < errors.max()
    assert (errors > found.projection_errors.numpy()).all()


@pytest.mark.parametrize("kernel", ["bands", "means"])
@pytest.mark.parametrize("score", ["preconditioned", "dot", "cosine", "preconditioned-cosine"])
@pytest.mark.parametrize("damping", [0.03, 3.0])
def test_every_score_can_be_asked_of_one_index(
    attributor: Attributor, pictures: list[tuple[Image.Image, int]], score: Any, kernel: Any, damping: float
) -> None:
    options = {"score": score, "kernel": kernel, "damping": damping}
    image, label = pictures[5]
    result = attributor.query(image, label=label, top_k=20, **options)
    scores = attributor.scores([image], labels=[label], **options)
    np.testing.assert_allclose(result.scores, np.sort(scores[0])[::-1], rtol=1e-6)
    features = attributor.members[0].features(attributor.members[0].encode([image], [label]))
    fitted = fit_kernel(attributor.store, kernel)
    train = torch.cat([attributor.store.read_part(part).features for part in attributor.store.parts])
    exact = score_bands(
        fitted.banded(features), fitted.banded(train), fitted.inverse(score, damping), normalise="cosine" in score
    ).scores
    np.testing.assert_allclose(scores, exact.numpy(), rtol=1e-9)


def test_scores_do_not_depend_on_what_else_is_asked(
    attributor: Attributor, pictures: list[tuple[Image.Image, int]]
) -> None:
    images, labels = [list(column) for column in zip(*pictures[:5], strict=True)]
    together = attributor.scores(images, labels=labels)
    np.testing.assert_allclose(together[2:3], attributor.scores(images[2:3], labels=labels[2:3]), rtol=1e-12)


def test_a_query_is_encoded_as_the_training_examples_were(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, pictures: list[tuple[Image.Image, int]]
) -> None:
    """Random encodings of a query are as many, and follow its content; the noise is that of the training examples."""
    random = {"encoding": "sample", "num_encodings": 2, "feature_dtype": "float32"}
    store = featurize(dit_folder, digits_folder, tmp_path / "index", **SETTINGS | random)
    attributor = Attributor.open(tmp_path / "index", device="cpu")
    images, labels = [list(column) for column in zip(*pictures[:3], strict=True)]
    together = attributor.scores(images, labels=labels)
    np.testing.assert_array_equal(together, attributor.scores(images, labels=labels))
    np.testing.assert_allclose(together[1:2], attributor.scores(images[1:2], labels=labels[1:2]), rtol=1e-9)
    result = attributor.query(images[0], label=labels[0], top_k=1)
    assert result.cost["network_evaluations"] == 8
    np.testing.assert_allclose(result.scores[0], together[0].max(), rtol=1e-9)

    estimator = attributor.estimator
    scorer = attributor.members[0]
    asked = scorer.encode(images[:1], labels[:1])
    features, pixels = scorer.features(asked), asked.pixels
    as_example_0 = estimator.encode(pixels, labels[:1], None, [0])
    draws = estimator.draws([0])
    stored = average_bands(estimator.features(as_example_0, draws), draws, estimator.config)
    torch.testing.assert_close(stored, store.read_features([0]), rtol=1e-3, atol=1e-4 * float(stored.abs().max()))
    as_query = estimator.encode(pixels, labels[:1], None, [_query_id(pixels[0])])
    torch.testing.assert_close(features, average_bands(estimator.features(as_query, draws), draws, estimator.config))
    assert not torch.allclose(features, stored)


def test_columns_are_in_the_order_of_ids_whatever_the_order_of_the_data(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, pictures: list[tuple[Image.Image, int]]
) -> None:
    import datasets

    content = {"image": [p for p, _ in pictures], "label": [c for _, c in pictures], "number": list(range(20))}
    dataset = datasets.Dataset.from_dict(content).cast_column("image", datasets.Image())
    scores = []
    for name, rows in (("a", dataset), ("b", dataset.shuffle(seed=3))):
        featurize(dit_folder, rows, tmp_path / name, **SETTINGS, id_column="number")
        scores.append(Attributor.open(tmp_path / name, device="cpu").scores([pictures[4][0]], labels=[pictures[4][1]]))
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-9)


def test_independent_noise_of_queries_follows_their_content(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, pictures: list[tuple[Image.Image, int]]
) -> None:
    featurize(dit_folder, digits_folder, tmp_path / "index", **SETTINGS | {"noise": "independent"})
    attributor = Attributor.open(tmp_path / "index", device="cpu")
    images, labels = [list(column) for column in zip(*pictures[:3], strict=True)]
    together = attributor.scores(images, labels=labels)
    np.testing.assert_allclose(together[1:2], attributor.scores(images[1:2], labels=labels[1:2]), rtol=1e-12)


def test_a_result_says_what_it_was_made_with_and_what_it_cost(
    attributor: Attributor, pictures: list[tuple[Image.Image, int]], dit_folder: Path
) -> None:
    result = attributor.query(pictures[0][0], label=0, top_k=2)
    assert result.condition == "label 0"
    assert result.settings["teacher"] == str(dit_folder)
    assert (result.settings["score"], result.settings["num_draws"]) == ("preconditioned", 4)
    assert result.settings["damping"] == fit_kernel(attributor.store).auto_damping
    assert result.cost["network_evaluations"] == 4
    record = attributor.store.find_records(result.ids[:1].tolist())[int(result.ids[0])]
    assert (result.proponents[0].key, result.proponents[0].label) == (record.key, record.key[0])
    assert result.proponents[0].thumbnail.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"label": 0, "top_k": 0}, "`top_k` must be a whole number of at least 1, got 0"),
        ({"label": 3}, "`label` must be a whole number from 0 to 2, got 3"),
        ({"label": -1}, "`label` must be a whole number from 0 to 2, got -1"),
        ({}, "`label` is needed: this teacher is class-conditional; give one from 0 to 2"),
        ({"label": 0, "prompt": "x"}, "`prompt` was given, but this teacher is class-conditional; leave it out"),
        ({"label": 0, "score": "x"}, "`score` must be one of preconditioned, dot, .*, got 'x'"),
        ({"label": 0, "kernel": "x"}, "`kernel` must be one of bands, means, got 'x'"),
        ({"label": 0, "damping": 0.0}, r"`damping` must be a positive number or auto, got 0.0"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_a_bad_question_is_one_line(
    attributor: Attributor, pictures: list[tuple[Image.Image, int]], question: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        attributor.query(pictures[0][0], **question)


def test_as_many_labels_as_images_are_needed(attributor: Attributor, pictures: list[tuple[Image.Image, int]]) -> None:
    with pytest.raises(ArgumentError, match=r"`labels` must be as many as images \(=2\), got 1"):
        attributor.scores([pictures[0][0], pictures[1][0]], labels=[0])


@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_no_picture_or_list_is_one_line(
    attributor: Attributor, pictures: list[tuple[Image.Image, int]]
) -> None:
    array: Any = np.asarray(pictures[0][0])
    number: Any = 3
    with pytest.raises(ArgumentError, match="`image` must be a PIL picture or its path, got a ndarray; `PIL.Image.fr"):
        attributor.query(array, label=0)
    with pytest.raises(ArgumentError, match="`mask` must be a PIL picture or its path, got a ndarray"):
        attributor.query(pictures[0][0], label=0, mask=array)
    with pytest.raises(ArgumentError, match="`labels` must be a list, one for each image, got 3"):
        attributor.scores([pictures[0][0]], labels=number)


@pytest.mark.usefixtures("as_users_run_it")
def test_images_must_be_a_list(attributor: Attributor, pictures: list[tuple[Image.Image, int]]) -> None:
    some: list[Any] = [[], "a.png", pictures[0][0], (picture for picture, _ in pictures)]
    for images in some:
        with pytest.raises(ArgumentError, match="`images` must be a list of at least one picture or path, got"):
            attributor.scores(images)


def test_iid_draws_have_no_standard_error(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, pictures: list[tuple[Image.Image, int]]
) -> None:
    featurize(dit_folder, digits_folder, tmp_path / "index", **SETTINGS | {"scheme": "iid"})
    opened = Attributor.open(tmp_path / "index", device="cpu")
    result = opened.query(pictures[0][0], label=0)
    assert [match.standard_error for match in result.proponents] == [None] * 10
    assert opened.band_scores([pictures[0][0]], labels=[0]).projection is None


def test_an_index_that_was_built_again_must_be_opened_again(
    tmp_path: Path, tiny_index: Path, pictures: list[tuple[Image.Image, int]]
) -> None:
    shutil.copytree(tiny_index, tmp_path / "index")
    opened = Attributor.open(tmp_path / "index", device="cpu")
    build_index(FeatureStore.open(tmp_path / "index"), kernel="means")
    with pytest.raises(StoreError, match="was indexed again after it was opened; open it again"):
        opened.query(pictures[0][0], label=0)


def test_a_missing_picture_is_named(attributor: Attributor, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing.png"):
        attributor.query(tmp_path / "missing.png", label=0)


def test_more_neighbours_than_there_are_gives_all(
    attributor: Attributor, pictures: list[tuple[Image.Image, int]]
) -> None:
    assert len(attributor.query(pictures[0][0], label=0, top_k=500).ids) == 20


def test_an_index_of_another_teacher_is_refused(
    tiny_index: Path, dit_sigma_folder: Path, pictures: list[tuple[Image.Image, int]]
) -> None:
    attributor = Attributor.open(tiny_index, teacher=dit_sigma_folder, device="cpu")
    with pytest.raises(StoreMismatchError, match="index was made by another teacher"):
        attributor.query(pictures[0][0], label=0)


def test_a_teacher_that_moved_is_recognised(
    tmp_path: Path, tiny_index: Path, dit_folder: Path, pictures: list[tuple[Image.Image, int]]
) -> None:
    shutil.copytree(dit_folder, tmp_path / "moved")
    result = Attributor.open(tiny_index, teacher=tmp_path / "moved", device="cpu").query(pictures[0][0], label=0)
    assert len(result.ids) == 10


def test_other_random_streams_are_refused(
    tmp_path: Path, tiny_index: Path, pictures: list[tuple[Image.Image, int]]
) -> None:
    shutil.copytree(tiny_index, tmp_path / "index")
    write_sealed(
        tmp_path / "index" / "manifest.json",
        {**FeatureStore.open(tmp_path / "index").manifest, "draws_sha256": "0" * 64},
    )
    with pytest.raises(StoreMismatchError, match="random draws differ from those of the index"):
        Attributor.open(tmp_path / "index", device="cpu").query(pictures[0][0], label=0)


def test_an_index_can_be_built_again_for_another_score(
    tmp_path: Path,
    tiny_index: Path,
    dit_folder: Path,
    digits_folder: Path,
    pictures: list[tuple[Image.Image, int]],
) -> None:
    shutil.copytree(tiny_index, tmp_path / "index")
    build_index(FeatureStore.open(tmp_path / "index"), score="cosine", kernel="means", damping=0.5)
    featurize(dit_folder, digits_folder, tmp_path / "index", **SETTINGS)  # nothing to do: leaves the index alone
    result = Attributor.open(tmp_path / "index", device="cpu").query(pictures[0][0], label=0)
    assert (result.settings["score"], result.settings["kernel"]) == ("cosine", "means")
    assert "damping" not in result.settings


def test_an_index_that_is_not_complete_says_what_to_run(tmp_path: Path, tiny_index: Path) -> None:
    shutil.copytree(tiny_index, tmp_path / "index")
    (tmp_path / "index" / "index.json").unlink()
    with pytest.raises(StoreError, match="has no index yet; run `carv-attrib index"):
        Attributor.open(tmp_path / "index")


def test_one_query_in_one_sentence_of_python(tiny_index: Path, dit_folder: Path, digits_folder: Path) -> None:
    teacher = load_teacher(dit_folder, device="cpu")
    result = Attributor.open(tiny_index, teacher=teacher).query(digits_folder / "1" / "001.png", label=1)
    assert result.query == "001.png"
    assert result.to_pandas()["id"].tolist()[:1] == result.ids[:1].tolist()


def test_importing_the_package_loads_neither_diffusers_nor_faiss() -> None:
    code = (
        "import sys, carv_attrib; print([m for m in ('diffusers', 'faiss', 'datasets', 'pandas') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_window_of_timesteps_scores_its_bands_only(
    attributor: Attributor, copied_index: Path, pictures: list[tuple[Image.Image, int]]
) -> None:
    image, label = pictures[3]
    bands = attributor.band_scores([image], labels=[label]).bands[:, 0].numpy()
    for window, expected, scored in (
        ((0, 50), bands[0], "0:50"),
        ((49, 100), bands[1], "50:100"),
        ((0, 1000), bands.mean(0), "0:100"),
    ):
        result = attributor.query(image, label=label, top_k=20, timesteps=window)
        np.testing.assert_allclose(result.scores, np.sort(expected)[::-1], rtol=1e-6)
        np.testing.assert_allclose(result.scores, expected[result.ids], rtol=1e-6)
        assert result.settings["timesteps"] == scored
    scorer, choice = attributor.members[0], Choice("preconditioned", "bands", "auto")
    features = scorer.features(scorer.encode([image], [label]))
    for band in range(2):
        candidates = scorer.candidates(features, choice, 3, slice(band, band + 1), opponents=False)
        assert set(candidates) == set(np.argsort(-bands[band])[:3])
    plain = attributor.query(image, label=label, top_k=20)
    np.testing.assert_allclose([match.bands for match in plain.proponents], bands[:, plain.ids].T, rtol=1e-6)
    changed = Attributor.open(copied_index, device="cpu")  # refining keeps draws in it
    refined = changed.query(image, label=label, top_k=5, timesteps=(0, 50), refine=5, max_draws=8)
    assert {len(match.bands) for match in refined.proponents} == {1}


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"timesteps": (50, 50)}, "`timesteps` must be FIRST:LAST with the first below the last, got 50:50"),
        ({"timesteps": (0, 20)}, r"`timesteps` must hold a whole band .* got 0:20; bands begin and end at 0, 50, 100"),
        ({"timesteps": (0, 50), "kernel": "means"}, "`timesteps` needs `kernel` bands and no cosine, got means"),
        ({"timesteps": (0, 50), "score": "cosine"}, "`timesteps` needs `kernel` bands and no cosine, got bands and co"),
        ({"group_by": "artist"}, "there must be a column artist in .*, it has label"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_a_bad_window_or_group_is_one_line(
    attributor: Attributor, pictures: list[tuple[Image.Image, int]], question: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        attributor.query(pictures[0][0], label=0, **question)


@pytest.mark.parametrize("settings", [{"scheme": "iid"}, {"num_bands": 4, "proposal": "pilot"}])
def test_bands_that_are_no_shares_of_timesteps_have_no_window(
    tmp_path: Path,
    dit_folder: Path,
    digits_folder: Path,
    pictures: list[tuple[Image.Image, int]],
    settings: dict[str, Any],
) -> None:
    featurize(dit_folder, digits_folder, tmp_path / "index", **SETTINGS | settings)
    with pytest.raises(ArgumentError, match="`timesteps` needs bands of equal shares of timesteps, those of"):
        Attributor.open(tmp_path / "index", device="cpu").query(pictures[0][0], label=0, timesteps=(0, 50))


def test_queries_of_several_threads_are_those_of_one(
    attributor: Attributor, pictures: list[tuple[Image.Image, int]]
) -> None:
    images = [image for image, _ in pictures] * 2

    def ask(image: Image.Image) -> np.ndarray:
        return attributor.scores([image], labels=[1])

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(ask, images))
    np.testing.assert_array_equal(found, [ask(image) for image in images])


def test_an_open_index_says_that_examples_were_removed(
    copied_index: Path, pictures: list[tuple[Image.Image, int]]
) -> None:
    opened = Attributor.open(copied_index, device="cpu")
    image, label = pictures[3]
    opened.query(image, label=label)
    remove(copied_index, ids=[0])
    for ask in (
        lambda: opened.scores([image], labels=[label]),
        lambda: opened.query(image, label=label, group_by="label"),
        lambda: opened.query(image, label=label, top_k=20),
    ):
        with pytest.raises(StoreError, match="was changed after it was opened; open it again"):
            ask()


@pytest.mark.parametrize("by", ["label", "folder"])
def test_groups_are_sums_of_the_scores_of_their_members(
    attributor: Attributor, pictures: list[tuple[Image.Image, int]], by: Any
) -> None:
    image, label = pictures[3]
    scores, errors = attributor.scores_with_errors([image], labels=[label])
    classes = np.array([digit for _, digit in pictures])
    groups = attributor.query(image, label=label, group_by=by).groups
    assert {group.name: group.num_examples for group in groups} == {
        str(digit): int((classes == digit).sum()) for digit in set(classes)
    }
    for group in groups:
        own = classes == int(group.name)
        assert group.score == pytest.approx(scores[0, own].sum(), rel=1e-6)
        assert group.standard_error is not None
        assert group.standard_error <= errors[0, own].sum()  # not more than if all errors went the same way
        assert group.low is not None
        assert group.low < group.score
        positive = scores[0].clip(min=0)
        assert group.share == pytest.approx(positive[own].sum() / positive.sum(), rel=1e-6)
        assert group.share_low is not None
        assert group.share_high is not None
        assert 0 <= group.share_low < group.share < group.share_high <= 1
    assert [group.score for group in groups] == sorted((group.score for group in groups), reverse=True)


def test_groups_by_any_column_of_the_data_set(
    tmp_path: Path, dit_folder: Path, pictures: list[tuple[Image.Image, int]]
) -> None:
    import datasets

    artists = ["Ada", "Bob", None]
    content = {
        "image": [p for p, _ in pictures],
        "label": [c for _, c in pictures],
        "artist": [artists[i % 3] for i in range(20)],
        "tags": [["ink", "red"][: i % 3] for i in range(20)],
    }
    dataset = datasets.Dataset.from_dict(content).cast_column("image", datasets.Image())
    featurize(dit_folder, dataset, tmp_path / "index", **SETTINGS)
    opened = Attributor.open(tmp_path / "index", dataset=dataset, device="cpu")
    image, label = pictures[3]
    scores = opened.scores([image], labels=[label])[0]
    groups = {group.name: group for group in opened.query(image, label=label, group_by="artist").groups}
    assert {name: group.num_examples for name, group in groups.items()} == {"Ada": 7, "Bob": 7, "": 6}
    assert groups["Bob"].score == pytest.approx(scores[1::3].sum(), rel=1e-6)
    tags = {group.name: group.num_examples for group in opened.query(image, label=label, group_by="tags").groups}
    assert tags == {"": 7, "ink": 7, "ink, red": 6}
    with pytest.raises(DataError, match="in-memory"):
        Attributor.open(tmp_path / "index", device="cpu").query(image, label=label, group_by="artist")


# Masks: which examples made this part


@pytest.fixture(scope="module")
def pixel_attributor(tmp_path_factory: pytest.TempPathFactory) -> Attributor:
    """Return an index of 40 digits by the packaged teacher in pixel space, a convolutional one."""
    folder, digits = tmp_path_factory.mktemp("pixels"), open_dataset("digits")
    (folder / "digits").mkdir()
    for row in range(40):
        digits.load(row).image.save(folder / "digits" / f"{row:03d}.png")
    teacher = load_teacher("demo-pixels", device="cpu")
    featurize(teacher, folder / "digits", folder / "index", num_draws=8)
    return Attributor.open(folder / "index", teacher=teacher)


def half(size: tuple[int, int], side: str) -> Image.Image:
    """Return a mask of one half."""
    white = np.zeros(size[::-1], np.uint8)
    columns, rows = size[0] // 2, size[1] // 2
    parts: dict[str, Any] = {
        "left": np.s_[:, :columns],
        "right": np.s_[:, columns:],
        "top": np.s_[:rows],
        "bottom": np.s_[rows:],
    }
    white[parts[side]] = 255
    return Image.fromarray(white)


def scores_of(attributor: Attributor, image: Any, **options: Any) -> np.ndarray:
    """Return all scores in the order of the ids, as a query reports them."""
    result = attributor.query(image, top_k=40, **options)
    return result.scores[np.argsort(result.ids)]


@pytest.mark.parametrize("size", [(8, 8), (48, 48), (24, 12), (12, 24)])  # the last two are cropped to a square
@pytest.mark.parametrize(("first", "second"), [("left", "right"), ("top", "bottom")])
def test_the_example_that_a_part_was_cut_from_comes_first_where_that_part_is_asked_about(
    pixel_attributor: Attributor, first: str, second: str, size: tuple[int, int]
) -> None:
    digits = open_dataset("digits")
    for a, b in ((0, 2), (12, 10), (31, 25), (1, 30), (33, 0), (26, 31)):
        one, other = digits.load(a).image, digits.load(b).image
        pasted = Image.composite(one, other, half(one.size, first))
        for side, own, others in ((first, a, b), (second, b, a)):
            scores = scores_of(pixel_attributor, pasted, mask=half(size, side))
            assert scores[own] > scores[others], (a, b, side)


def test_a_uniform_mask_asks_about_all_of_the_picture(pixel_attributor: Attributor) -> None:
    picture = open_dataset("digits").load(7).image
    plain = scores_of(pixel_attributor, picture)
    for size in ((8, 8), (30, 50)):
        white = Image.new("L", size, 255)
        np.testing.assert_array_equal(scores_of(pixel_attributor, picture, mask=white), plain)
        grey = scores_of(pixel_attributor, picture, mask=Image.new("L", size, 100))
        np.testing.assert_allclose(grey, plain, rtol=1e-4)
    assert not np.allclose(scores_of(pixel_attributor, picture, mask=half((8, 8), "left")), plain, rtol=0.05)
    refined = [pixel_attributor.query(picture, top_k=5, refine=5, max_draws=16, mask=m) for m in (None, white)]
    np.testing.assert_array_equal(*(result.scores for result in refined))


def test_refinement_asks_about_the_same_part(pixel_attributor: Attributor) -> None:
    """Both halves have the same area, so that their mean is the whole, in the rounds of refinement too."""
    attributor, picture = pixel_attributor, open_dataset("digits").load(7).image
    scorer, left_half = attributor.members[0], half((8, 8), "left")
    asked = scorer.encode([picture])
    masked = [scorer.encode([picture], mask=half((8, 8), side)) for side in ("left", "right")]
    plain, left, right = (
        fresh_draws(attributor.estimator, queries.encoded, asked.ids, 0) for queries in (asked, *masked)
    )
    torch.testing.assert_close((left + right) / 2, plain, rtol=1e-3, atol=1e-5 * float(plain.abs().max()))
    assert (left - plain).norm() > 0.3 * plain.norm()
    result = attributor.query(picture, mask=left_half, top_k=40, refine=40, max_draws=16, score="dot")
    ids = result.ids.tolist()
    encoded = encode_examples(attributor.estimator, scorer.examples, ids)
    train = torch.cat([attributor.store.read_features(ids), fresh_draws(attributor.estimator, encoded, ids, 0)], dim=2)
    query = torch.cat([scorer.features(masked[0]), left], dim=2)
    expected = scorer.score(scorer.prepare(query, Choice("dot", "bands", 0.1), errors=False), train).scores[0]
    np.testing.assert_allclose(result.scores, expected.numpy(), rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_result_names_its_mask(
    tmp_path: Path, attributor: Attributor, pictures: list[tuple[Image.Image, int]]
) -> None:
    half((8, 8), "left").save(tmp_path / "left.png")
    assert attributor.query(pictures[0][0], label=0, mask=tmp_path / "left.png").settings["mask"] == "left.png"
    assert attributor.query(pictures[0][0], label=0, mask=half((8, 8), "left")).settings["mask"] == "mask"
    assert "mask" not in attributor.query(pictures[0][0], label=0).settings


def test_a_result_shows_what_its_mask_leaves_out_faded(
    attributor: Attributor, pictures: list[tuple[Image.Image, int]]
) -> None:
    whole, left = (
        Image.open(io.BytesIO(attributor.query(pictures[0][0], label=0, mask=mask).thumbnail))
        for mask in (None, half((8, 8), "left"))
    )
    columns = whole.width // 2
    seen, shown = (np.asarray(x, float) - 127.5 for x in (whole, left))
    np.testing.assert_array_equal(shown[:, :columns], seen[:, :columns])
    np.testing.assert_allclose(shown[:, columns:], 0.2 * seen[:, columns:], atol=1)
    grey = attributor.query(pictures[0][0], label=0, mask=Image.new("L", (8, 8), 100))  # no mask
    np.testing.assert_array_equal(Image.open(io.BytesIO(grey.thumbnail)), whole)


def test_a_mask_that_says_nothing_is_one_line(
    tmp_path: Path, attributor: Attributor, pictures: list[tuple[Image.Image, int]]
) -> None:
    Image.new("L", (5, 8)).save(tmp_path / "black.png")
    with pytest.raises(ArgumentError, match="^`mask` must be white where the image is asked about, it is all"):
        attributor.query(pictures[0][0], label=0, mask=tmp_path / "black.png")
    outside = Image.new("L", (80, 8))
    outside.paste(255, (0, 0, 8, 8))  # cut off with the left of the picture
    with pytest.raises(ArgumentError, match="it is all black in the part of it that the teacher sees; paint"):
        attributor.query(pictures[0][0], label=0, mask=outside)
    with pytest.raises(DataError, match="^`mask` must be an image file, .*missing.png does not exist"):
        attributor.query(pictures[0][0], label=0, mask=tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(DataError, match="^[^\n]*text.png: not an image of a known format[^\n]*$"):
        attributor.query(pictures[0][0], label=0, mask=tmp_path / "text.png")
