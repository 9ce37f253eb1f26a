from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from carv_attrib.config import FeatureDtype, FeaturizeConfig
from carv_attrib.errors import StoreCorruptError, StoreError, StoreMismatchError
from carv_attrib.files import atomic_file, read_sealed, write_sealed
from carv_attrib.parts import PartFeatures, concatenate, tensor_digest
from carv_attrib.records import Record
from carv_attrib.store import FeatureStore

MANIFEST = {
    "config": {"part_size": 4, "num_bands": 2, "num_draws": 4, "feature_dtype": "float16"},
    "dataset": {"num_examples": 10, "fingerprint": "d"},
    "teacher": {"fingerprint": "t"},
    "num_replicates": 2,
    "draws_per_example": 4,
    "proj_dim": 6,
}


def part_of(ids: list[int], seed: int = 0) -> PartFeatures:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(len(ids), 4, 6, generator=generator) * torch.logspace(-9, 3, len(ids))[:, None, None]
    return PartFeatures(torch.tensor(ids), draws.view(-1, 2, 2, 6))


def records_of(ids: list[int]) -> list[Record]:
    return [Record(i, f"file {i}", i % 3, None, b"png") for i in ids]


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    store = FeatureStore.create(tmp_path / "index", MANIFEST)
    for part in range(3):
        ids = list(store.part_rows(part))
        store.write_part(part, part_of(ids, part), records_of(ids))
    return FeatureStore.open(store.path)


def test_parts_cover_every_row_once(store: FeatureStore) -> None:
    assert [list(store.part_rows(part)) for part in range(store.num_parts)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert store.ids.tolist() == list(range(10))
    assert store.missing_parts() == []


def test_float16_features_keep_a_relative_precision_at_any_magnitude(store: FeatureStore) -> None:
    expected, read = part_of([0, 1, 2, 3]), store.read_part(0)
    error = (read.features - expected.features).abs().amax(-1) / expected.features.abs().amax(-1)
    assert error.max() < 2**-11


def test_float32_features_come_back_exactly(tmp_path: Path) -> None:
    manifest = MANIFEST | {"config": MANIFEST["config"] | {"feature_dtype": "float32"}}
    store = FeatureStore.create(tmp_path / "index", manifest)
    store.write_part(0, part_of([0, 1, 2, 3]), records_of([0, 1, 2, 3]))
    assert torch.equal(store.read_part(0).features, part_of([0, 1, 2, 3]).features)
    assert torch.equal(store.read_features([2, 0]), part_of([0, 1, 2, 3]).features[[2, 0]])


def test_features_at_positions_come_in_the_order_that_was_asked_for(store: FeatureStore) -> None:
    everything = torch.cat([store.read_part(part).features for part in store.parts])
    positions = [9, 0, 5, 4, 3]
    assert torch.equal(store.read_features(positions), everything[positions])


def test_no_positions_have_no_features(store: FeatureStore) -> None:
    assert store.read_features([]).shape == (0, 2, 2, 6)


def test_a_part_of_an_earlier_version_has_no_checksums_of_rows(store: FeatureStore) -> None:
    everything = torch.cat([store.read_part(part).features for part in store.parts])
    tensors = load_file(store.features_path(0))
    for name in ("row_crc32", "examples_sha256"):
        del tensors[name]
    save_file(tensors, store.features_path(0), metadata={"sha256": tensor_digest(tensors)})
    assert torch.equal(FeatureStore.open(store.path).read_features([5, 1]), everything[[5, 1]])
    tensors["features"][1] = 0
    save_file(tensors, store.features_path(0), metadata={"sha256": "0" * 64})
    with pytest.raises(StoreCorruptError, match="its checksum does not match; delete it"):
        FeatureStore.open(store.path).read_part(0)


@pytest.mark.parametrize(("damage", "message"), [("delete", "cannot be read"), ("cut", "is too short")])
def test_rows_of_a_part_that_is_lost_after_it_was_opened(store: FeatureStore, damage: str, message: str) -> None:
    store.read_features([0])
    path = store.features_path(0)
    if damage == "delete":
        path.unlink()
    else:
        os.truncate(path, store._opened[0]._features.offset + 10)
    with pytest.raises(StoreCorruptError, match=message):
        store.read_features([1])


def test_parts_are_opened_again_where_there_are_many_parts(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("carv_attrib.store._MAX_OPENED", 1)
    everything = torch.cat([store.read_part(part).features for part in store.parts])
    assert torch.equal(store.read_features([9, 1, 5, 0]), everything[[9, 1, 5, 0]])
    assert len(store._opened) == 1


def test_records_are_found_by_id(store: FeatureStore) -> None:
    assert store.find_records([9, 2]) == {2: records_of([2])[0], 9: records_of([9])[0]}


def test_a_part_whose_examples_were_all_skipped_is_done_and_empty(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "index", MANIFEST)
    store.write_part(0, None, [Record(i, str(i), None, None, b"", "damaged") for i in range(4)])
    store = FeatureStore.open(store.path)
    assert (store.missing_parts(), len(store.ids), store.num_skipped()) == ([1, 2], 0, 4)
    assert concatenate([]) is None


def test_a_part_without_its_records_is_made_again(store: FeatureStore) -> None:
    store.examples_path(1).unlink()
    assert FeatureStore.open(store.path).missing_parts() == [1]


def test_records_of_another_part_are_an_error_and_not_a_traceback(store: FeatureStore) -> None:
    shutil.copy(store.examples_path(0), store.examples_path(1))
    with pytest.raises(StoreCorruptError, match="has no record of example 5; run `carv-attrib verify`"):
        store.find_records([0, 5])


def test_damaged_features_are_not_read(store: FeatureStore) -> None:
    flip_bit(store.features_path(1), -5)
    with pytest.raises(StoreCorruptError, match=r"part-000001.safetensors is damaged: its checksum does not match"):
        store.read_part(1)


def test_the_digest_of_a_store_changes_with_a_feature(store: FeatureStore) -> None:
    before = store.digest()
    store.write_part(1, part_of([4, 5, 6, 7], 2), records_of([4, 5, 6, 7]))
    assert FeatureStore.open(store.path).digest() != before


def test_nothing_is_left_of_a_file_whose_writing_failed(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_file(tmp_path / "part") as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_stops_the_run_with_one_line_and_keeps_what_was_done(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = store.features_path(0).read_bytes()

    def full(tensors: object, path: Path, **options: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("carv_attrib.parts.save_file", full)
    with pytest.raises(
        StoreError, match=r"part 0 cannot be written to .*No space left on device.*start again"
    ) as caught:
        store.write_part(0, part_of([0, 1, 2, 3], 5), records_of([0, 1, 2, 3]))
    assert "\n" not in str(caught.value)
    assert store.features_path(0).read_bytes() == before


def test_features_are_not_written_before_their_records(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.features_path(0).unlink()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("carv_attrib.store.write_records", full)
    with pytest.raises(StoreError, match="No space left on device"):
        store.write_part(0, part_of([0, 1, 2, 3], 5), records_of([0, 1, 2, 3]))
    assert not store.features_path(0).exists()


@pytest.mark.parametrize("name", ["features/.part-000001.safetensors.123.tmp", ".tmpTpKbtK"])  # ours, of safetensors
def test_leftovers_of_a_killed_writer_are_removed_by_the_next(store: FeatureStore, name: str) -> None:
    leftover = store.path / name
    leftover.write_text("half")
    with store.writing():
        assert not leftover.exists()


def test_a_second_writer_is_refused(store: FeatureStore) -> None:
    with (
        store.writing(),
        pytest.raises(StoreError, match=f"process {os.getpid()} on .* is writing to"),
        store.writing(),
    ):
        pass


def test_a_writer_takes_up_what_another_wrote_before(store: FeatureStore) -> None:
    opened = FeatureStore.open(store.path)
    assert len(opened.ids) == 10
    with store.writing():
        store.remove([3])
    with opened.writing():
        assert opened.removed == {3}
        assert len(opened.ids) == 9


def test_a_writer_of_another_index_is_refused(store: FeatureStore) -> None:
    shutil.rmtree(store.path)
    FeatureStore.create(store.path, MANIFEST | {"teacher": {"fingerprint": "other"}})
    with pytest.raises(StoreError, match="was made anew after it was opened; run it again"), store.writing():
        pass


def test_two_cannot_begin_one_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = FeatureStore._locked

    def begun_by_another(store: FeatureStore) -> AbstractContextManager[None]:
        monkeypatch.undo()
        FeatureStore.create(store.path, MANIFEST)
        return locked(store)

    monkeypatch.setattr(FeatureStore, "_locked", begun_by_another)
    with pytest.raises(StoreError, match="was begun by another process meanwhile; run it again"):
        FeatureStore.create(tmp_path / "index", MANIFEST | {"teacher": {"fingerprint": "other"}})
    assert FeatureStore.open(tmp_path / "index").manifest["teacher"]["fingerprint"] == "t"


def test_a_removal_is_seen_by_a_store_that_was_open(store: FeatureStore) -> None:
    opened, unread = FeatureStore.open(store.path), FeatureStore.open(store.path)
    assert [part.ids.tolist() for part in opened.read_parts()] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    opened.read_features([4])
    assert len(unread.ids) == 10
    with store.writing():
        store.remove([5])
    for other in (opened, unread):
        with pytest.raises(StoreError, match="was changed after it was opened; open it again"):
            other.read_features([4])
    with pytest.raises(StoreError, match="was changed after it was opened; open it again"):
        list(opened.read_parts())


def test_records_without_features_do_not_count_as_done(tmp_path: Path, store: FeatureStore) -> None:
    store.features_path(1).unlink()
    assert FeatureStore.open(store.path).missing_parts() == [1]


@pytest.mark.parametrize("name", ["somefile", "index-00000.faiss"])
def test_a_folder_that_holds_something_else_is_not_made_an_index(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(StoreError, match=r"`output` .* exists and is not an index; name a new or an empty folder"):
        FeatureStore.create(tmp_path, MANIFEST)


def test_a_creation_that_was_killed_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    (tmp_path / ".manifest.json.7.tmp").write_text("half")
    assert FeatureStore.create(tmp_path, MANIFEST).missing_parts() == [0, 1, 2]


def test_an_output_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"`output` .*file/index cannot be written: Not a directory; choose another"):
        FeatureStore.create(tmp_path / "file" / "index", MANIFEST)


def test_settings_that_differ_are_listed_with_both_values(store: FeatureStore) -> None:
    requested = {"config": MANIFEST["config"] | {"num_draws": 8}, "teacher": {"fingerprint": "other"}}
    message = r"config.num_draws: stored 4, requested 8; teacher.fingerprint: stored 't', requested 'other'"
    with pytest.raises(StoreMismatchError, match=message):
        store.check_matches(requested)
    store.check_matches({"config": MANIFEST["config"], "teacher": MANIFEST["teacher"]})


def test_opening_a_folder_without_a_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not an index: it has no manifest.json; make one with `carv-attrib feat"):
        FeatureStore.open(tmp_path)


def test_opening_a_folder_that_does_not_exist_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere does not exist; name the folder"):
        FeatureStore.open(tmp_path / "nowhere")


def test_a_damaged_manifest_is_named(store: FeatureStore) -> None:
    (store.path / "manifest.json").write_text("{")
    with pytest.raises(StoreCorruptError, match=r"manifest.json is damaged"):
        FeatureStore.open(store.path)


def test_the_draws_of_format_3_are_not_read(store: FeatureStore) -> None:
    manifest = read_sealed(store.path / "manifest.json")
    older = manifest | {"format_version": 3, "config": manifest["config"] | {"kernel_examples": 12}}
    (store.path / "manifest.json").write_text(json.dumps(older))  # which had no checksum
    tensors = load_file(store.features_path(0)) | {"kernel_draws": torch.ones(1, 4, 6)}
    save_file(tensors, store.features_path(0), metadata={"sha256": tensor_digest(tensors)})
    opened = FeatureStore.open(store.path)
    assert "kernel_examples" not in opened.manifest["config"]
    assert torch.equal(opened.read_part(0).features, store.read_part(0).features)


def test_short_features_of_format_4_have_one_block(store: FeatureStore) -> None:
    """Where the attributed layers had fewer entries than the settings asked for."""
    manifest = read_sealed(store.path / "manifest.json")
    write_sealed(
        store.path / "manifest.json",
        manifest | {"format_version": 4, "proj_dim": 6, "config": manifest["config"] | {"proj_dim": 2048}},
    )
    opened = FeatureStore.open(store.path)
    assert FeaturizeConfig.from_flat(opened.manifest["config"]).projection.block_size(6) == 6
    with pytest.raises(StoreMismatchError, match=r"proj_dim: stored 2048, requested 4096\) by an older version"):
        opened.check_matches({"config": {"proj_dim": 4096}})


@pytest.mark.parametrize("num_dims", [1, 63, 64, 65, 390])
def test_int8_features_are_off_by_a_254th_of_the_largest_of_64(tmp_path: Path, num_dims: int) -> None:
    store = FeatureStore.create(
        tmp_path / "index",
        MANIFEST | {"proj_dim": num_dims, "config": MANIFEST["config"] | {"feature_dtype": "int8"}},  # type: ignore[operator]
    )
    features = torch.randn(4, 2, 2, num_dims, generator=torch.Generator().manual_seed(0))
    features *= torch.logspace(-9, 9, num_dims)
    features[0] = 0
    store.write_part(0, PartFeatures(torch.arange(4), features), records_of([0, 1, 2, 3]))
    read = FeatureStore.open(store.path).read_part(0).features
    for first in range(0, num_dims, 64):
        own = slice(first, first + 64)
        largest = features[..., own].abs().amax(-1, keepdim=True)
        assert ((read - features)[..., own].abs() <= largest / 253.99).all()
    assert torch.equal(FeatureStore.open(store.path).read_features([2, 0]), read[[2, 0]])


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
def test_nan_stays_nan_and_no_example_is_no_example(dtype: FeatureDtype) -> None:
    values = torch.tensor([[[[-500.0, float("nan"), 369.6]]], [[[1.0, 2.0, 3.0]]]])
    read = PartFeatures.unpacked(PartFeatures(torch.arange(2), values).packed(dtype)).features
    assert read[0].isnan().any()
    assert read[1].isfinite().all()
    none = PartFeatures(torch.arange(0), values[:0])
    assert PartFeatures.unpacked(none.packed(dtype)).features.shape == (0, 1, 1, 3)


@pytest.mark.parametrize("version", [2, 9])
def test_another_format_is_refused(store: FeatureStore, version: int) -> None:
    file = store.path / "manifest.json"
    write_sealed(file, read_sealed(file) | {"format_version": version})
    with pytest.raises(StoreError, match=f"has format version {version}, this program reads 3 to 5; featurize again"):
        FeatureStore.open(store.path)


def test_a_whole_store_verifies(store: FeatureStore) -> None:
    assert store.verify() == []


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("position", [-1, -300, 5])
def test_one_flipped_bit_in_features_is_found(store: FeatureStore, position: int) -> None:
    flip_bit(store.features_path(1), position)
    (problem,) = FeatureStore.open(store.path).verify()
    assert "part-000001.safetensors" in problem


def test_one_flipped_bit_is_found_by_whoever_reads_that_row(store: FeatureStore) -> None:
    features = load_file(store.features_path(1))["features"]
    flip_bit(store.features_path(1), store.features_path(1).read_bytes().index(features[3].numpy().tobytes()) + 5)
    opened, rows = FeatureStore.open(store.path), len(store.ids)
    refused = []
    for row in range(rows):
        try:
            opened.read_features([row])
        except StoreCorruptError as err:
            refused.append((row, str(err)))
    ((row, line),) = refused
    assert row == len(store.read_part(0).ids) + 3
    assert "part-000001.safetensors is damaged: the checksum of an example does not match" in line
    (problem,) = opened.verify()
    assert "part-000001.safetensors is damaged: its checksum does not match, in rows 3 to 3; delete it" in problem


def test_an_edited_manifest_is_found(store: FeatureStore) -> None:
    file = store.path / "manifest.json"
    file.write_text(file.read_text().replace('"num_bands": ', '"num_bands": 1'))
    with pytest.raises(StoreCorruptError, match="its checksum does not match: it was edited, or is damaged"):
        FeatureStore.open(store.path)


@pytest.mark.parametrize(("name", "value"), [("part_size", 0), ("num_bands", "2"), ("num_bands", -1)])
def test_numbers_that_cannot_be_are_found(store: FeatureStore, name: str, value: object) -> None:
    manifest = read_sealed(store.path / "manifest.json")
    manifest["config"][name] = value
    write_sealed(store.path / "manifest.json", manifest)
    with pytest.raises(StoreCorruptError, match=rf"manifest.json is damaged: {name} is {value!r}"):
        FeatureStore.open(store.path)


@pytest.mark.parametrize("place", [0, 60])  # Arrow does not look at the first
def test_one_flipped_bit_in_records_is_found(store: FeatureStore, place: int) -> None:
    flip_bit(store.examples_path(2), place)
    (problem,) = store.verify()
    assert "part-000002.parquet" in problem


def test_missing_truncated_and_swapped_files_are_found(store: FeatureStore) -> None:
    store.features_path(0).unlink()
    os.truncate(store.features_path(1), 100)
    shutil.copy(store.examples_path(0), store.examples_path(2))
    problems = FeatureStore.open(store.path).verify()
    assert "1 of 3 parts are missing, the first is part 0; run featurize again." in problems
    assert any("part-000001.safetensors is damaged" in problem for problem in problems)
    assert any("part-000002.parquet does not list the examples" in problem for problem in problems)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "features",
            lambda x: x[..., :5],
            "F16 [4, 2, 2, 6] or F32 [4, 2, 2, 6] by the manifest, has F16 [4, 2, 2, 5]",
        ),
        ("features", torch.Tensor.double, "has F64 [4, 2, 2, 6]"),
        ("ids", torch.Tensor.int, "must have ids of I64 [4] by the manifest, has I32 [4]"),
        ("ids", lambda x: x[None], "must have ids of I64 [1] by the manifest, has I64 [1, 4]"),
        ("features_scale", lambda x: x[:, 0], "F32 [4, 2, 2, 1] or F32 [] by the manifest, has F32 [4, 2, 1]"),
        ("row_crc32", lambda x: x[:3], "must have row_crc32 of I64 [4] by the manifest, has I64 [3]"),
        ("examples_sha256", lambda x: x[:3], "must have examples_sha256 of U8 [32] by the manifest, has U8 [3]"),
        ("features_scale", None, "has no features_scale; delete it and featurize again."),
        ("ids", None, "has no ids; delete it"),
        ("features", None, "has no features; delete it"),
    ],
)
def test_a_file_of_other_tensors_is_refused(
    store: FeatureStore, name: str, change: Callable[[torch.Tensor], torch.Tensor] | None, message: str
) -> None:
    tensors = load_file(store.features_path(0))
    value = tensors.pop(name)
    if change:
        tensors[name] = change(value).contiguous()
    save_file(tensors, store.features_path(0), metadata={"sha256": tensor_digest(tensors)})
    with pytest.raises(StoreCorruptError, match=re.escape(message)):
        store.read_part(0)
    assert any(message in problem for problem in FeatureStore.open(store.path).verify())


def test_nan_in_features_is_found(store: FeatureStore) -> None:
    part = part_of([0, 1, 2, 3])
    part.features[0, 0, 0, 0] = float("nan")
    store.write_part(0, part, records_of([0, 1, 2, 3]))
    (problem,) = store.verify()
    assert "holds NaN or infinity" in problem


def test_the_same_content_gives_the_same_bytes(store: FeatureStore) -> None:
    before = [store.features_path(1).read_bytes(), store.examples_path(1).read_bytes()]
    store.write_part(1, part_of([4, 5, 6, 7], 1), records_of([4, 5, 6, 7]))
    assert [store.features_path(1).read_bytes(), store.examples_path(1).read_bytes()] == before
