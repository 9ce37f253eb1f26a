from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from carv_attrib import featurize, load_teacher
from carv_attrib.config import FeaturizeConfig
from carv_attrib.data import open_dataset
from carv_attrib.errors import ArgumentError, BadImageError, DataError, StoreCorruptError, StoreError
from carv_attrib.estimator import build_estimator
from carv_attrib.latents import EncodedBatch, LatentCache, encoded_parts
from carv_attrib.records import Record
from carv_attrib.store import FeatureStore
from carv_attrib.teacher import Teacher
from carv_attrib.teachers._diffusers import DiffusersTeacher
from tests.conftest import SETTINGS, TinyTeacher
from tests.test_pipeline import broken_digits, file_digests, with_ids

UNWEIGHTED = SETTINGS | {"weighting": "uniform"}
"""Without a pilot, which reads and encodes images on its own."""


@pytest.fixture(scope="module")
def teacher(dit_folder: Path) -> Teacher:
    return load_teacher(dit_folder, device="cpu")


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Return counts of images decoded and of rows encoded, which grow as it happens."""
    from carv_attrib import batches

    counts = {"pixels": 0, "encode": 0}
    to_pixels, encode = batches.to_pixels, DiffusersTeacher.encode

    def count_pixels(*arguments: Any) -> torch.Tensor:
        counts["pixels"] += 1
        return to_pixels(*arguments)

    def count_encode(self: DiffusersTeacher, pixels: torch.Tensor, *arguments: Any) -> torch.Tensor:
        counts["encode"] += len(pixels)
        return encode(self, pixels, *arguments)

    monkeypatch.setattr(batches, "to_pixels", count_pixels)
    monkeypatch.setattr(DiffusersTeacher, "encode", count_encode)
    return counts


def cache_folder(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def parts_of(
    teacher: Teacher, dataset: Any, cache: Path | None = None, **settings: Any
) -> list[tuple[int, list[EncodedBatch]]]:
    """Return all encoded parts of a dataset."""
    config = FeaturizeConfig.from_flat(UNWEIGHTED | settings)
    examples = open_dataset(dataset)
    estimator = build_estimator(teacher, config, 16, None)
    size, num = config.storage.part_size, len(examples)
    parts = {part: range(part * size, min((part + 1) * size, num)) for part in range(-(-num // size))}
    kept = LatentCache.open(cache, estimator, examples, size) if cache else None
    return [
        (part, list(batches)) for part, batches in encoded_parts(estimator, examples, parts, config.execution, kept)
    ]


def same_bits(first: EncodedBatch, second: EncodedBatch) -> bool:
    assert first.encoded is not None
    assert second.encoded is not None
    conditions = first.encoded.condition, second.encoded.condition
    return (
        torch.equal(first.encoded.latents, second.encoded.latents)
        and first.encoded.latents.dtype == second.encoded.latents.dtype
        and conditions[0].keys() == conditions[1].keys()
        and all(torch.equal(conditions[0][name], conditions[1][name]) for name in conditions[0])
        and first.records == second.records
    )


@pytest.mark.parametrize("family", ["dit", "ddpm", "sd"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cached_batch_has_the_bits_of_an_encoded_one(
    request: pytest.FixtureRequest, tmp_path: Path, digits_folder: Path, family: str, dtype: Any
) -> None:
    teacher = load_teacher(request.getfixturevalue(f"{family}_folder"), device="cpu", dtype=dtype)
    dataset = with_ids(digits_folder).add_column("text", ["re a digit"] * 20)
    settings = {"batch_size": 4, "dtype": dtype}
    plain, cold, warm = (parts_of(teacher, dataset, cache, **settings) for cache in (None, tmp_path, tmp_path))
    assert [[len(batch.ids) for batch in batches] for _, batches in plain] == [[4, 4], [4, 4], [4]]
    for others in (cold, warm):
        assert [part for part, _ in others] == [0, 1, 2]
        for (_, ours), (_, expected) in zip(others, plain, strict=True):
            assert all(same_bits(a, b) for a, b in zip(ours, expected, strict=True))
    assert str(plain[0][1][0].encoded.latents.dtype) == f"torch.{dtype}"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"encoding": "sample", "num_encodings": 2, "augmentation": "crop"},
        {"noise": "independent", "num_workers": 0},
    ],
)
def test_an_index_has_the_same_bytes_with_a_cold_cache_a_warm_one_and_none(
    tmp_path: Path, teacher: Teacher, digits_folder: Path, work: dict[str, int], settings: dict[str, Any]
) -> None:
    settings = UNWEIGHTED | settings
    featurize(teacher, digits_folder, tmp_path / "none", **settings)
    featurize(teacher, digits_folder, tmp_path / "cold", **settings, latent_cache=str(tmp_path / "cache"))
    assert work["pixels"] == 40
    before = dict(work)
    featurize(teacher, digits_folder, tmp_path / "warm", **settings, latent_cache=str(tmp_path / "cache"))
    assert work == before
    assert file_digests(tmp_path / "cold") == file_digests(tmp_path / "warm") == file_digests(tmp_path / "none")


def test_another_checkpoint_of_the_denoiser_and_other_draws_read_and_encode_nothing(
    tmp_path: Path, dit_folder: Path, dit_sigma_folder: Path, digits_folder: Path, work: dict[str, int]
) -> None:
    settings = UNWEIGHTED | {"latent_cache": str(tmp_path / "cache")}
    featurize(dit_folder, digits_folder, tmp_path / "first", **settings)
    before = dict(work)
    assert before["pixels"] == 20
    store = featurize(dit_sigma_folder, digits_folder, tmp_path / "second", **settings)
    featurize(dit_folder, digits_folder, tmp_path / "third", **settings | {"num_draws": 8, "batch_size": 3, "seed": 1})
    assert work == before
    assert store.verify() == []
    assert len(store.ids) == 20


def test_a_run_takes_up_a_cache_that_was_left_unfinished(
    tmp_path: Path, teacher: Teacher, digits_folder: Path, work: dict[str, int]
) -> None:
    parts_of(teacher, digits_folder, tmp_path)
    (cache_folder(tmp_path) / "part-000001.parquet").unlink()
    work["pixels"] = 0
    parts_of(teacher, digits_folder, tmp_path)
    assert work["pixels"] == 8
    parts_of(teacher, digits_folder, tmp_path)
    assert work["pixels"] == 8


@pytest.mark.parametrize(
    ("settings", "shared"),
    [
        ({"part_size": 5}, False),
        ({"encoding": "sample"}, False),
        ({"augmentation": "flip"}, False),
        ({"num_draws": 2, "seed": 7, "batch_size": 2, "num_workers": 0, "proj_dim": 7}, True),
    ],
)
def test_what_decides_the_latents_decides_the_folder(
    tmp_path: Path, teacher: Teacher, digits_folder: Path, settings: dict[str, Any], shared: bool
) -> None:
    parts_of(teacher, digits_folder, tmp_path)
    parts_of(teacher, digits_folder, tmp_path, **settings)
    assert len(list(tmp_path.iterdir())) == (1 if shared else 2)


def test_the_seed_of_random_encodings_the_dtype_and_the_data_decide_the_folder_too(
    tmp_path: Path, dit_folder: Path, teacher: Teacher, digits_folder: Path
) -> None:
    dataset = with_ids(digits_folder)
    parts_of(teacher, dataset, tmp_path, encoding="sample")
    parts_of(teacher, dataset, tmp_path, encoding="sample", seed=1)
    parts_of(load_teacher(dit_folder, device="cpu", dtype="bfloat16"), dataset, tmp_path, encoding="sample")
    parts_of(teacher, dataset.select(range(19)), tmp_path, encoding="sample")
    assert len(list(tmp_path.iterdir())) == 4


def test_key_json_says_what_the_folder_holds(tmp_path: Path, teacher: Teacher, digits_folder: Path) -> None:
    parts_of(teacher, digits_folder, tmp_path)
    key = json.loads((cache_folder(tmp_path) / "key.json").read_text())
    assert key["encoder"] == teacher.encoder_fingerprint
    assert key["dataset"]["fingerprint"] == open_dataset(digits_folder).fingerprint
    assert (key["dtype"], key["condition"], key["part_size"], key["random_encodings"]) == ("float32", "label", 8, None)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("part-000001.safetensors", flip_a_byte),
        ("part-000001.safetensors", lambda path: path.write_bytes(path.read_bytes()[:100])),
        ("part-000001.parquet", flip_a_byte),
        ("part-000001.parquet", lambda path: path.write_bytes(b"")),
    ],
)
def test_a_damaged_file_is_named_and_used_for_nothing(
    tmp_path: Path, teacher: Teacher, digits_folder: Path, name: str, damage: Callable[[Path], None]
) -> None:
    parts_of(teacher, digits_folder, tmp_path)
    victim = cache_folder(tmp_path) / name
    damage(victim)
    with pytest.raises(StoreCorruptError, match=f"{victim} is damaged: .*; delete it, and run this again"):
        parts_of(teacher, digits_folder, tmp_path)
    victim.unlink()
    parts_of(teacher, digits_folder, tmp_path)
    assert victim.exists()


def test_a_part_with_a_bad_image_is_for_runs_that_skip_it(
    tmp_path: Path, teacher: Teacher, digits_folder: Path, work: dict[str, int]
) -> None:
    folder, victim = broken_digits(digits_folder, tmp_path)
    settings = UNWEIGHTED | {"latent_cache": str(tmp_path / "cache"), "batch_size": 1}
    cold = featurize(teacher, folder, tmp_path / "cold", **settings, skip_bad=True)
    before = dict(work)
    warm = featurize(teacher, folder, tmp_path / "warm", **settings, skip_bad=True)
    assert work == before
    assert file_digests(cold.path) == file_digests(warm.path)
    assert (len(warm.ids), warm.num_skipped()) == (19, 1)
    records = cache_folder(tmp_path / "cache") / "part-000001.parquet"
    with pytest.raises(BadImageError, match=f"^{victim}: not an image .* when {records} was made; .* delete that file"):
        featurize(teacher, folder, tmp_path / "strict", **settings)
    assert FeatureStore.open(tmp_path / "strict").missing_parts() == [1, 2]


def test_a_part_of_bad_images_only_can_be_kept(tmp_path: Path, teacher: Teacher, digits_folder: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(digits_folder, folder)
    for victim in sorted(folder.rglob("*.png"))[:8]:
        victim.write_text("no")
    for _ in ("cold", "warm"):
        parts = parts_of(teacher, folder, tmp_path / "cache", skip_bad=True, batch_size=4)
        assert [[len(batch.ids) for batch in batches] for _, batches in parts] == [[0, 0], [4, 4], [4]]
        assert [batch.encoded for batch in parts[0][1]] == [None, None]
        assert all(record.error for batch in parts[0][1] for record in batch.records)


def test_labels_of_a_cached_part_are_checked_against_the_teacher(
    tmp_path: Path, dit_folder: Path, digits_folder: Path
) -> None:
    teacher = load_teacher(dit_folder, device="cpu")
    parts_of(teacher, digits_folder, tmp_path)
    teacher.num_classes = 2
    with pytest.raises(DataError, match=r"2/\d+.png has label 2, but the teacher's classes are 0 to 1"):
        parts_of(teacher, digits_folder, tmp_path)


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path: Path, teacher: Teacher, digits_folder: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StoreError, match=r"`latent_cache` .*/file cannot be written: Not a directory; choose"
    ) as caught:
        parts_of(teacher, digits_folder, tmp_path / "file")
    assert "\n" not in str(caught.value)


def test_a_full_disk_stops_the_run_and_loses_no_features(
    tmp_path: Path, teacher: Teacher, digits_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("carv_attrib.latents.save_file", full)
    with pytest.raises(
        StoreError, match=r"part 0 of `latent_cache` cannot be written to .*No space left.*leave it out"
    ):
        featurize(teacher, digits_folder, tmp_path / "index", **UNWEIGHTED, latent_cache=str(tmp_path / "cache"))
    assert FeatureStore.open(tmp_path / "index").missing_parts() == [1, 2]
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_teacher_that_does_not_name_its_encoder_has_no_cache(
    tmp_path: Path, linear_teacher: TinyTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_teacher, "encoder_fingerprint", "")
    with pytest.raises(ArgumentError, match="`latent_cache` needs the teacher's `encoder_fingerprint`, tiny has none"):
        parts_of(linear_teacher, "digits", tmp_path)


def test_an_empty_name_of_a_cache_is_refused() -> None:
    with pytest.raises(ArgumentError, match="`latent_cache` must name a folder, got ''; leave it out"):
        FeaturizeConfig.from_flat({"latent_cache": ""})


def test_a_cache_holds_no_more_than_latents_conditions_and_checksums(
    tmp_path: Path, teacher: Teacher, digits_folder: Path
) -> None:
    parts_of(teacher, digits_folder, tmp_path)
    with safe_open(cache_folder(tmp_path) / "part-000002.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["condition.class_labels", "latents"]
        assert file.get_slice("latents").get_shape() == [4, 1, 2, 4, 4]
        assert sorted(file.metadata()) == ["records_sha256", "sha256"]


@pytest.mark.parametrize("family", ["dit", "ddpm", "sd"])
def test_the_encoder_fingerprint_is_not_that_of_the_denoiser(
    request: pytest.FixtureRequest, tmp_path: Path, family: str
) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    denoiser = "transformer" if family == "dit" else "unet"
    shutil.copytree(folder, tmp_path / "copy")
    shutil.copytree(folder, tmp_path / "other")
    weights = tmp_path / "copy" / denoiser / "diffusion_pytorch_model.safetensors"
    flip_a_byte(weights)
    first, same = load_teacher(folder, device="cpu"), load_teacher(tmp_path / "copy", device="cpu")
    assert first.fingerprint != same.fingerprint
    assert first.encoder_fingerprint == same.encoder_fingerprint
    changed = {"dit": "vae/config.json", "sd": "text_encoder/model.safetensors", "ddpm": None}[family]
    if changed is not None:
        file = tmp_path / "other" / changed
        file.write_text(file.read_text() + " ") if file.suffix == ".json" else flip_a_byte(file)
        assert load_teacher(tmp_path / "other", device="cpu").encoder_fingerprint != first.encoder_fingerprint


def test_images_are_read_by_other_threads_unless_there_are_none(
    teacher: Teacher, digits_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from carv_attrib import batches

    readers, to_pixels = set(), batches.to_pixels

    def spy(*arguments: Any) -> torch.Tensor:
        readers.add(threading.current_thread().name[:9])
        return to_pixels(*arguments)

    monkeypatch.setattr(batches, "to_pixels", spy)
    parts_of(teacher, digits_folder, num_workers=2)
    assert readers == {"carv-read"}
    readers.clear()
    parts_of(teacher, digits_folder, num_workers=0)
    assert readers == {threading.current_thread().name[:9]}


@pytest.mark.parametrize("source", ["arrow", "parquet", "shuffled", "folder", "zip"])
def test_many_threads_read_what_one_reads(tmp_path: Path, ddpm_folder: Path, digits_folder: Path, source: str) -> None:
    """Every source that `open_dataset` takes, with many small batches in flight."""
    rows = with_ids(digits_folder)
    dataset: Any = digits_folder
    if source == "arrow":
        rows.save_to_disk(tmp_path / "arrow", num_shards=3)
        dataset = tmp_path / "arrow"
    if source == "parquet":
        rows.to_parquet(tmp_path / "rows.parquet", batch_size=3)
        dataset = tmp_path / "rows.parquet"
    if source == "shuffled":
        dataset = rows.shuffle(seed=3)
    if source == "zip":
        shutil.make_archive(str(tmp_path / "zipped" / "digits"), "zip", digits_folder / "0")
        dataset = tmp_path / "zipped"
    examples = open_dataset(dataset)
    teacher = load_teacher(ddpm_folder, device="cpu")
    estimator = build_estimator(teacher, FeaturizeConfig.from_flat(UNWEIGHTED), 4, None)
    parts = {part: range(len(examples)) for part in range(5)}

    def records(num_workers: int) -> list[Record]:
        config = FeaturizeConfig.from_flat({"batch_size": 1, "num_workers": num_workers})
        encoded = encoded_parts(estimator, examples, parts, config.execution, None)
        return [record for _, batches in encoded for batch in batches for record in batch.records]

    assert records(8) == records(0) != []
