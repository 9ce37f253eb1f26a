from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from carv_attrib import Attributor, featurize, maintenance
from carv_attrib.cli import main
from carv_attrib.data import open_dataset
from carv_attrib.ensemble import featurize_ensemble
from carv_attrib.errors import ArgumentError, DataError, StoreCorruptError, StoreError, StoreMismatchError
from carv_attrib.index import SearchSettings, read_index_choice
from carv_attrib.inspection import verify
from carv_attrib.maintenance import append, export, merge, remove
from carv_attrib.pipeline import build_index
from carv_attrib.store import FeatureStore
from carv_attrib.teacher import Teacher
from carv_attrib.teachers import load_teacher
from tests.conftest import SETTINGS

PLAIN = SETTINGS | {"weighting": "uniform", "feature_dtype": "float32"}  # no pilot: it would be of other examples


@pytest.fixture(scope="module")
def digits(digits_folder: Path) -> datasets.Dataset:
    """Return the digits folder with ids that are not row numbers."""
    opened = open_dataset(digits_folder)
    rows = [opened.load(row) for row in range(20)]
    content = {"image": [x.image for x in rows], "label": [x.label for x in rows], "id": [3 * x.id + 1 for x in rows]}
    return datasets.Dataset.from_dict(content).cast_column("image", datasets.Image())


@pytest.fixture
def whole(tmp_path: Path, dit_folder: Path, digits: datasets.Dataset) -> Path:
    featurize(dit_folder, digits, tmp_path / "whole", id_column="id", **PLAIN)
    return tmp_path / "whole"


def ask(path: Path, picture: Image.Image, **options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    opened = Attributor.open(path, device="cpu")
    return opened.ids, *opened.scores_with_errors([picture], labels=[1], **options)


def assert_same_answers(one: Path, other: Path, picture: Image.Image) -> None:
    for left, right in zip(ask(one, picture), ask(other, picture), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-12)
    results = [Attributor.open(path, device="cpu").query(picture, label=1, top_k=5) for path in (one, other)]
    assert results[0].ids.tolist() == results[1].ids.tolist()


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


# Append


def test_an_appended_index_is_the_one_made_at_once(
    tmp_path: Path, dit_folder: Path, digits: datasets.Dataset, whole: Path
) -> None:
    index = tmp_path / "index"
    featurize(dit_folder, digits.select(range(15)), index, id_column="id", **PLAIN)
    store = append(index, digits.select(range(15, 18)), id_column="id")
    assert len(store.ids) == 18
    append(index, digits.select(range(18, 20)), id_column="id", batch_size=1)
    assert_same_answers(index, whole, digits[4]["image"])
    assert verify(index) == []
    opened = FeatureStore.open(index)
    assert [len(segment.parts) for segment in opened.segments] == [2, 1, 1]
    assert [opened.part_rows(part) for part in range(4)] == [range(8), range(8, 15), range(3), range(2)]


def test_examples_without_ids_are_numbered_on(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, digits: datasets.Dataset
) -> None:
    index = tmp_path / "index"
    featurize(dit_folder, digits_folder, index, **PLAIN)
    store = append(index, digits.select(range(3)).remove_columns("id"))
    assert store.ids.tolist() == list(range(23))
    records = store.find_records([20, 22])
    assert [records[i].label for i in (20, 22)] == [digits[row]["label"] for row in (0, 2)]
    opened = Attributor.open(index, dataset=[digits_folder, digits.select(range(3)).remove_columns("id")], device="cpu")
    refined = opened.query(digits[2]["image"], label=digits[2]["label"], top_k=23, refine=23, max_draws=8)
    scores = dict(zip(refined.ids.tolist(), refined.scores, strict=True))
    assert scores[22] == pytest.approx(scores[2], rel=1e-5)  # the same picture, read again from both data sets


@pytest.mark.parametrize("id_column", ["id", None])
def test_a_repeated_append_adds_nothing(
    tmp_path: Path,
    dit_folder: Path,
    digits: datasets.Dataset,
    id_column: str | None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index, columns = tmp_path / "index", digits if id_column else digits.remove_columns("id")
    featurize(dit_folder, columns.select(range(8)), index, id_column=id_column, **PLAIN)
    with monkeypatch.context() as patch:  # the parts are there, the index is not
        patch.setattr(maintenance, "build_index", interrupt)
        with pytest.raises(KeyboardInterrupt):
            append(index, columns.select(range(8, 20)), id_column=id_column)
    append(index, columns.select(range(8, 20)), id_column=id_column)
    before = (index / "manifest.json").read_bytes()
    for rows in (range(8, 20), range(8)):
        store = append(index, columns.select(rows), id_column=id_column)
        assert "has the examples of in-memory dataset already; nothing is added" in caplog.messages.pop()
        assert (index / "manifest.json").read_bytes() == before
        assert len(store.ids) == len(Attributor.open(index).ids) == 20


def test_a_stopped_append_goes_on(
    tmp_path: Path, dit_folder: Path, digits: datasets.Dataset, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, new = tmp_path / "index", digits.select(range(8, 20))
    choice = {"score": "preconditioned", "kernel": "means", "damping": 0.3, "search": SearchSettings("SQfp16", "", 40)}
    featurize(dit_folder, digits.select(range(8)), index, id_column="id", **PLAIN)
    build_index(FeatureStore.open(index), **choice)
    write_part = FeatureStore.write_part

    def stop(store: FeatureStore, part: int, *content: Any) -> None:
        if part == 2:
            raise KeyboardInterrupt
        write_part(store, part, *content)

    monkeypatch.setattr(FeatureStore, "write_part", stop)
    with pytest.raises(KeyboardInterrupt):
        append(index, new, id_column="id")
    monkeypatch.undo()
    with pytest.raises(StoreError, match="has no index yet"):
        Attributor.open(index)
    with pytest.raises(StoreMismatchError, match="has an unfinished append of in-memory dataset; run that again first"):
        append(index, digits.select(range(8, 12)), id_column="id")
    featurize(dit_folder, digits.select(range(8)), index, id_column="id", **PLAIN)  # leaves the rest to append
    append(index, new, id_column="id")
    assert read_index_choice(FeatureStore.open(index)) == choice
    build_index(FeatureStore.open(whole), **choice)
    assert_same_answers(index, whole, digits[4]["image"])


def test_appended_examples_are_refined_and_grouped(
    tmp_path: Path, dit_folder: Path, digits: datasets.Dataset, whole: Path
) -> None:
    index, parts = tmp_path / "index", [digits.select(range(15)), digits.select(range(15, 20))]
    featurize(dit_folder, parts[0], index, id_column="id", **PLAIN)
    append(index, parts[1], id_column="id")
    question = {"label": 1, "top_k": 20, "refine": 20, "max_draws": 8, "group_by": "id"}
    appended = Attributor.open(index, dataset=parts, device="cpu").query(digits[4]["image"], **question)
    expected = Attributor.open(whole, dataset=digits, device="cpu").query(digits[4]["image"], **question)
    np.testing.assert_allclose(appended.scores, expected.scores, rtol=1e-5)
    assert appended.ids.tolist() == expected.ids.tolist()
    assert {group.name for group in appended.groups} == {str(3 * row + 1) for row in range(20)}
    with pytest.raises(StoreMismatchError, match="from another data set"):
        Attributor.open(index, dataset=[parts[0], parts[0]], device="cpu").query(digits[4]["image"], **question)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"id_column": "id"}, DataError, "has, or had, an example 1 already; give the new ones ids of their own"),
        ({"num_draws": 4}, ArgumentError, "`num_draws` is decided by the index; split, image_column"),
    ],
)
def test_a_bad_append_changes_nothing(
    whole: Path, digits: datasets.Dataset, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = (whole / "manifest.json").read_bytes()
    with pytest.raises(error, match=message):
        append(whole, digits.select(range(3)), **settings)
    assert (whole / "manifest.json").read_bytes() == before
    assert Attributor.open(whole)


def test_classes_of_an_append_are_those_of_the_index_by_name(
    tmp_path: Path, tiny_index: Path, digits: datasets.Dataset
) -> None:
    index = tmp_path / "index"
    shutil.copytree(tiny_index, index)
    some = digits.remove_columns("id").filter(lambda label: label > 0, input_columns="label")
    names = datasets.ClassLabel(names=["2", "1"])
    other = some.map(lambda row: {"label": 2 - row["label"]}).cast_column("label", names)
    store = append(index, other)
    records = [record for part in store.parts for record in store.read_records(part)]
    assert [record.label for record in records[-len(some) :]] == some["label"]
    assert len(append(index, other).ids) == len(store.ids)  # known again
    attributor = Attributor.open(index, dataset=[store.manifest["dataset"]["source"], other], device="cpu")
    assert set(attributor.query(some[0]["image"], label=1, refine=20, max_draws=8).ids) <= set(store.ids)


def test_an_append_with_another_class_is_refused(tmp_path: Path, tiny_index: Path, digits: datasets.Dataset) -> None:
    index = tmp_path / "index"
    shutil.copytree(tiny_index, index)
    other = digits.remove_columns("id").cast_column("label", datasets.ClassLabel(names=["0", "a", "2"]))
    with pytest.raises(DataError, match="in-memory dataset has a class 'a', which is none of 0, 1, 2; rename it"):
        append(index, other)


# Remove


def test_a_removed_example_is_as_if_it_had_never_been(
    tmp_path: Path, dit_folder: Path, digits: datasets.Dataset, whole: Path
) -> None:
    gone = [1, 13, 58]  # rows 0, 4, 19
    keep = [row for row in range(20) if 3 * row + 1 not in gone]
    featurize(dit_folder, digits.select(keep), tmp_path / "scratch", id_column="id", **PLAIN)
    assert remove(whole, ids=[1, 58], keys=["row 4"]) == 3
    assert_same_answers(whole, tmp_path / "scratch", digits[4]["image"])
    assert verify(whole) == []
    store = FeatureStore.open(whole)
    assert store.num_skipped() == 0
    assert not set(gone) & {record.id for part in store.parts for record in store.read_records(part)}
    with pytest.raises(ArgumentError, match="has no example 14; nothing was removed"):
        remove(whole, ids=[4, 14])
    assert 4 in store.ids


def test_a_name_of_several_examples_removes_none(tmp_path: Path, dit_folder: Path, digits: datasets.Dataset) -> None:
    index, plain = tmp_path / "index", digits.remove_columns("id")
    featurize(dit_folder, plain.select(range(8)), index, **PLAIN)
    append(index, plain.select(range(8, 11)))
    with pytest.raises(ArgumentError, match="`keys` row 2 is the name of 2 examples, 2, 10; give their `ids`. Nothing"):
        remove(index, ids=[0], keys=["row 2", "row 7"])
    assert FeatureStore.open(index).ids.tolist() == list(range(11))
    assert remove(index, ids=[10], keys=["row 7"]) == 2


def test_a_removed_example_does_not_come_back(
    dit_folder: Path, digits: datasets.Dataset, whole: Path, tmp_path: Path
) -> None:
    remove(whole, ids=[1])
    FeatureStore.open(whole).features_path(0).unlink()
    featurize(dit_folder, digits, whole, id_column="id", **PLAIN)
    assert 1 not in FeatureStore.open(whole).ids
    assert verify(whole) == []
    with pytest.raises(DataError, match="has, or had, an example 1 already"):
        append(whole, digits.select([0]), id_column="id")


@pytest.mark.parametrize("by_index", [True, False])
def test_a_stopped_removal_is_finished(whole: Path, monkeypatch: pytest.MonkeyPatch, by_index: bool) -> None:
    write_files = FeatureStore._write_files

    def stop(store: FeatureStore, part: int, *content: Any) -> None:
        if part == 2:
            raise KeyboardInterrupt
        write_files(store, part, *content)

    monkeypatch.setattr(FeatureStore, "_write_files", stop)
    with pytest.raises(KeyboardInterrupt):
        remove(whole, ids=[1, 58])
    monkeypatch.undo()
    with pytest.raises(StoreError, match="has no index yet; run `carv-attrib index"):
        Attributor.open(whole)
    assert any("part-000002.parquet has removed examples; run" in problem for problem in verify(whole))
    command = ["index", str(whole)] if by_index else ["remove", str(whole), "--id", "1", "--id", "58"]
    assert CliRunner().invoke(main, command).exit_code == 0
    assert not {1, 58} & set(Attributor.open(whole).ids.tolist())
    assert verify(whole) == []


def test_what_is_left_keeps_its_bits(tmp_path: Path, tiny_index: Path) -> None:
    index = tmp_path / "index"
    shutil.copytree(tiny_index, index)
    before = FeatureStore.open(index)
    features = dict(zip(before.ids.tolist(), before.read_features(range(20)), strict=True))
    remove(index, ids=[0, 9])
    after = FeatureStore.open(index)
    for example, values in zip(after.ids.tolist(), after.read_features(range(18)), strict=True):
        assert torch.equal(values, features[example])


def test_examples_leave_every_member_of_an_ensemble(
    tmp_path: Path, dit_folder: Path, dit_sigma_folder: Path, digits_folder: Path
) -> None:
    featurize_ensemble([dit_folder, dit_sigma_folder], digits_folder, tmp_path / "index", **SETTINGS)
    assert remove(tmp_path / "index", ids=[5]) == 1
    assert 5 not in Attributor.open(tmp_path / "index").ids


@pytest.mark.parametrize("by_key", [True, False])
def test_a_removal_that_was_stopped_between_teachers_is_finished(
    tmp_path: Path,
    dit_folder: Path,
    dit_sigma_folder: Path,
    digits_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    by_key: bool,
) -> None:
    index = tmp_path / "index"
    featurize_ensemble([dit_folder, dit_sigma_folder], digits_folder, index, **SETTINGS)
    key = FeatureStore.open(index / "checkpoint-0").find_records([5])[5].key
    named: dict[str, Any] = {"keys": [key]} if by_key else {"ids": [5]}
    monkeypatch.setattr("carv_attrib.maintenance.build_index", interrupt)
    with pytest.raises(KeyboardInterrupt):
        remove(index, **named)
    monkeypatch.undo()
    build_index(FeatureStore.open(index / "checkpoint-0"))
    with pytest.raises(StoreMismatchError, match="same examples as .*; if a removal was stopped, run it again"):
        Attributor.open(index)
    assert remove(index, **named) == 1
    assert 5 not in Attributor.open(index).ids


def test_writers_that_come_while_another_starts_are_not_undone(
    tmp_path: Path, dit_folder: Path, digits: datasets.Dataset, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An append opens the index, and loads its teacher, before it writes."""
    index = tmp_path / "index"
    featurize(dit_folder, digits.select(range(10)), index, id_column="id", **PLAIN)

    def slowly(*arguments: Any, **settings: Any) -> Teacher:
        monkeypatch.undo()
        append(index, digits.select(range(10, 14)), id_column="id")
        remove(index, ids=[1])
        return load_teacher(*arguments, **settings)

    monkeypatch.setattr("carv_attrib.maintenance.load_teacher", slowly)
    append(index, digits.select(range(14, 20)), id_column="id")
    assert verify(index) == []
    remove(whole, ids=[1])
    assert_same_answers(index, whole, digits[4]["image"])


def test_not_all_can_be_removed(whole: Path) -> None:
    with pytest.raises(ArgumentError, match="would have no example left; delete the folder instead"):
        remove(whole, ids=[3 * row + 1 for row in range(20)])
    with pytest.raises(ArgumentError, match="`ids` or `keys` must name at least one example"):
        remove(whole)


# Merge


def test_merged_shards_are_the_index_that_is_made_at_once(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, tiny_index: Path
) -> None:
    shards = [tmp_path / f"shard-{number}" for number in range(2)]
    for number, shard in enumerate(shards):
        store = featurize(dit_folder, digits_folder, shard, shard=f"{number}/2", **SETTINGS)
        assert store.missing_parts() == [[1], [0, 2]][number]
        assert not (shard / "index.json").exists()
    with pytest.raises(StoreError, match="1 of 3 parts are in none of the 1 shards, the first is part 1"):
        merge(tmp_path / "merged", shards[:1])
    assert not (tmp_path / "merged").exists()
    merge(tmp_path / "merged", shards)
    files = sorted(file.relative_to(tiny_index) for file in tiny_index.rglob("*") if file.is_file())
    assert files == sorted(f.relative_to(tmp_path / "merged") for f in (tmp_path / "merged").rglob("*") if f.is_file())
    for file in files:
        assert (tmp_path / "merged" / file).read_bytes() == (tiny_index / file).read_bytes(), file
    (tmp_path / "merged" / "features" / "part-000001.safetensors").unlink()
    merge(tmp_path / "merged", shards)
    assert verify(tmp_path / "merged") == []


def test_what_was_removed_from_a_shard_is_not_merged(tmp_path: Path, tiny_index: Path) -> None:
    for name in ("spare", "shard"):
        shutil.copytree(tiny_index, tmp_path / name)
    remove(tmp_path / "shard", ids=[17])
    shards = [tmp_path / "spare", tmp_path / "shard"]
    assert 17 not in merge(tmp_path / "merged", shards).ids
    assert verify(tmp_path / "merged") == []
    assert FeatureStore.open(tmp_path / "merged").removed == {17}
    assert 17 in FeatureStore.open(tmp_path / "spare").ids


def test_shards_with_more_examples_are_not_merged(tmp_path: Path, tiny_index: Path, digits: datasets.Dataset) -> None:
    shutil.copytree(tiny_index, tmp_path / "shard")
    append(tmp_path / "shard", digits.remove_columns("id").select(range(3)))
    with pytest.raises(StoreError, match="shard has had examples appended, which a merge would lose; merge first"):
        merge(tmp_path / "merged", [tiny_index, tmp_path / "shard"])


def test_a_damaged_shard_is_not_merged(tmp_path: Path, tiny_index: Path) -> None:
    shutil.copytree(tiny_index, tmp_path / "shard")
    file = tmp_path / "shard" / "features" / "part-000001.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreCorruptError, match="part-000001.safetensors is damaged: its checksum does not match"):
        merge(tmp_path / "merged", [tmp_path / "shard"])
    assert FeatureStore.open(tmp_path / "merged").missing_parts() == [1, 2]


def test_shards_of_other_settings_are_not_merged(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, tiny_index: Path
) -> None:
    featurize(dit_folder, digits_folder, tmp_path / "other", **SETTINGS | {"seed": 1})
    with pytest.raises(StoreMismatchError, match="config.seed: stored 1, requested 0"):
        merge(tmp_path / "merged", [tiny_index, tmp_path / "other"])


@pytest.mark.parametrize("shard", ["2/2", "x", "1", "-1/2"])
def test_a_bad_shard_is_one_line(shard: str) -> None:
    with pytest.raises(ArgumentError, match="`shard` must be I/N with I from 0 to N - 1, got"):
        featurize("nowhere", "nothing", "never", shard=shard)


# Export


def test_features_in_npy_are_those_of_the_store(tmp_path: Path, tiny_index: Path) -> None:
    export(tiny_index, tmp_path / "npy", "npy")
    store = FeatureStore.open(tiny_index)
    expected = store.read_features(range(20)).mean(2).flatten(1).numpy()
    np.testing.assert_array_equal(np.load(tmp_path / "npy" / "features.npy"), expected)
    np.testing.assert_array_equal(np.load(tmp_path / "npy" / "ids.npy"), store.ids)
    with pytest.raises(StoreError, match="exists; name a new or an empty folder"):
        export(tiny_index, tmp_path / "npy", "npy")


def test_features_in_parquet_are_a_dataset(tmp_path: Path, tiny_index: Path) -> None:
    (file,) = export(tiny_index, tmp_path / "parquet", "parquet")
    loaded = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    store = FeatureStore.open(tiny_index)
    assert loaded["id"][:] == store.ids.tolist()
    np.testing.assert_array_equal(np.array(loaded["features"][:]), store.read_features(range(20)).mean(2).flatten(1))
    assert set(loaded["label"][:]) == {0, 1, 2}


def test_trak_goes_on_with_exported_features(tmp_path: Path, tiny_index: Path) -> None:
    """Its own `finalize_features` gives Phi (Phi^T Phi)^-1 of our means."""
    from trak import TRAKer

    export(tiny_index, tmp_path / "trak", "trak")
    model = torch.nn.Linear(2, 2)
    traker = TRAKer(
        model,
        "image_classification",
        20,
        save_dir=tmp_path / "trak",
        device="cpu",
        proj_dim=48,
        use_half_precision=False,
    )
    traker.load_checkpoint(model.state_dict(), model_id=0, _allow_featurizing_already_registered=True)
    assert traker.saver.model_ids[0]["is_featurized"] == 1
    traker.finalize_features(model_ids=[0])
    means = FeatureStore.open(tiny_index).read_features(range(20)).mean((1, 2))
    found = torch.from_numpy(np.load(tmp_path / "trak" / "0" / "features.mmap"))
    assert found.shape == (20, 48)
    inverse = torch.linalg.inv(means.T @ means)  # singular, like trak's own: up to what both make of rounding
    expected = means @ (inverse / inverse.abs().mean())
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))


# The command line


def test_commands(tmp_path: Path, tiny_index: Path, digits_folder: Path, dit_folder: Path) -> None:
    index = tmp_path / "index"
    shutil.copytree(tiny_index, index)
    shutil.copytree(digits_folder, tmp_path / "more")
    for picture in (tmp_path / "more").rglob("*.png"):
        picture.rename(picture.with_stem(f"new-{picture.stem}"))

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(main, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
        return result.output

    assert "40 examples in" in run("append", index, f"--dataset={tmp_path / 'more'}", "--batch-size=4", "--device=cpu")
    (tmp_path / "ids.txt").write_text("3\n\n25\n")
    store = FeatureStore.open(index)
    records = [record for part in store.parts for record in store.read_records(part)]
    gone = {0, 3, 25} | {record.id for record in records if record.key == "1/001.png"}
    removed = run("remove", index, "--id=0", "--key=1/001.png", f"--ids-from={tmp_path / 'ids.txt'}")
    assert f"{len(gone)} examples removed" in removed
    assert set(FeatureStore.open(index).ids.tolist()) == set(range(40)) - gone
    assert "features.npy" in run("export", index, "--format=npy", f"--output={tmp_path / 'npy'}")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    for number in range(2):
        own = (f"--output={tmp_path / str(number)}", f"--shard={number}/2")
        run("featurize", f"--teacher={dit_folder}", f"--dataset={digits_folder}", *flags, *own)
    assert "20 examples in" in run("merge", tmp_path / "merged", tmp_path / "0", tmp_path / "1")
    refused = CliRunner().invoke(main, ["remove", str(index), f"--ids-from={digits_folder / '1' / '001.png'}"])
    assert refused.exit_code == 2
    (tmp_path / "bad.txt").write_text("one\n")
    refused = CliRunner().invoke(main, ["remove", str(index), f"--ids-from={tmp_path / 'bad.txt'}"])
    assert "--ids-from must have a whole number on each line, got 'one'" in refused.output
    assert json.loads(run("inspect", index, "--json"))["examples"] < 40
