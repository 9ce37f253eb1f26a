from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from carv_attrib import Attributor, featurize, load_teacher
from carv_attrib.batches import check_columns
from carv_attrib.config import FeaturizeConfig
from carv_attrib.data import open_dataset, to_pixels
from carv_attrib.data.sources import open_digits
from carv_attrib.demo import generate
from carv_attrib.errors import (
    ArgumentError,
    BadImageError,
    DataError,
    NonFiniteGradientError,
    StoreError,
    StoreMismatchError,
    TeacherError,
)
from carv_attrib.estimator import (
    Encoded,
    Estimator,
    GradientProfile,
    build_estimator,
    check_finite,
    measure_profile,
    root_weighted,
)
from carv_attrib.sampling import sample_draws
from carv_attrib.store import FeatureStore
from tests.conftest import SETTINGS


def file_digests(path: Path) -> dict[str, str]:
    """Return the digest of every file of an index: manifest, features, records, kernel and search index."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def features_by_id(path: Path) -> dict[int, torch.Tensor]:
    store = FeatureStore.open(path)
    return dict(zip(store.ids.tolist(), store.read_features(range(len(store.ids))), strict=True))


def with_ids(digits_folder: Path) -> datasets.Dataset:
    """Return the digits as a dataset with a column of ids unlike the row numbers."""
    digits = open_dataset(digits_folder)
    rows = [digits.load(row) for row in range(len(digits))]
    content = {
        "image": [x.image for x in rows],
        "label": [x.label for x in rows],
        "number": [7 * x.id + 3 for x in rows],
    }
    return datasets.Dataset.from_dict(content).cast_column("image", datasets.Image())


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_features_are_the_same_bits_for_any_batch_size(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, tiny_index: Path, batch_size: int
) -> None:
    featurize(dit_folder, digits_folder, tmp_path / "index", **SETTINGS, batch_size=batch_size)
    assert file_digests(tmp_path / "index") == file_digests(tiny_index)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_features_are_the_same_bits_for_any_number_of_workers(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, tiny_index: Path, num_workers: int
) -> None:
    featurize(dit_folder, digits_folder, tmp_path / "index", **SETTINGS, batch_size=1, num_workers=num_workers)
    assert file_digests(tmp_path / "index") == file_digests(tiny_index)


@pytest.mark.parametrize("micro_batch", [1, 5, 80])
def test_features_differ_by_rounding_only_for_any_micro_batch(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, tiny_index: Path, micro_batch: int
) -> None:
    """The shape of a matrix product decides the order of its sums: bits may differ, by float32 rounding."""
    settings = SETTINGS | {"feature_dtype": "float32", "weighting": "uniform"}
    featurize(dit_folder, digits_folder, tmp_path / "a", **settings | {"micro_batch": micro_batch})
    featurize(dit_folder, digits_folder, tmp_path / "b", **settings)
    ours, reference = features_by_id(tmp_path / "a"), features_by_id(tmp_path / "b")
    for i, expected in reference.items():
        assert (ours[i] - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize(
    "draws",
    [
        {"noise": "shared"},
        {"noise": "independent"},
        {"noise": "independent", "num_draws": 1, "num_bands": 1},  # stratified across ids
        {"encoding": "sample", "num_encodings": 2, "augmentation": "crop"},
    ],
)
def test_features_are_the_same_bits_in_any_order_of_the_dataset(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, draws: dict[str, Any]
) -> None:
    dataset = with_ids(digits_folder)
    settings = SETTINGS | draws | {"id_column": "number"}
    featurize(dit_folder, dataset, tmp_path / "a", **settings)
    featurize(dit_folder, dataset.shuffle(seed=1), tmp_path / "b", **settings)
    first, second = features_by_id(tmp_path / "a"), features_by_id(tmp_path / "b")
    assert list(first) != list(second)
    assert all(torch.equal(first[i], second[i]) for i in first)


def test_independent_noise_differs_between_examples_and_shared_does_not(dit_folder: Path) -> None:
    teacher = load_teacher(dit_folder, device="cpu")
    for noise, same in (("shared", True), ("independent", False)):
        estimator = build_estimator(teacher, FeaturizeConfig.from_flat(SETTINGS | {"noise": noise}), 4, None)
        draws = estimator.draws([5, 6]).expand(2)
        assert bool(torch.equal(draws.noise[0], draws.noise[1])) is same


def test_the_same_settings_again_do_nothing_and_others_are_refused(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, tiny_index: Path
) -> None:
    index = tmp_path / "index"
    shutil.copytree(tiny_index, index)
    changed = {file: file.stat().st_mtime_ns for file in (index / "features").iterdir()}
    featurize(dit_folder, digits_folder, index, **SETTINGS, batch_size=3)
    assert {file: file.stat().st_mtime_ns for file in (index / "features").iterdir()} == changed
    with pytest.raises(StoreMismatchError, match=r"config.num_draws: stored 4, requested 8"):
        featurize(dit_folder, digits_folder, index, **SETTINGS | {"num_draws": 8})


def test_another_teacher_is_refused(
    tmp_path: Path, dit_sigma_folder: Path, digits_folder: Path, tiny_index: Path
) -> None:
    shutil.copytree(tiny_index, tmp_path / "index")
    with pytest.raises(StoreMismatchError, match="teacher.fingerprint: stored"):
        featurize(dit_sigma_folder, digits_folder, tmp_path / "index", **SETTINGS)


def test_another_dataset_is_refused(tmp_path: Path, dit_folder: Path, digits_folder: Path, tiny_index: Path) -> None:
    shutil.copytree(tiny_index, tmp_path / "index")
    shutil.copytree(digits_folder, tmp_path / "digits")
    next((tmp_path / "digits").rglob("*.png")).unlink()
    with pytest.raises(StoreMismatchError, match="dataset.num_examples: stored 20, requested 19"):
        featurize(dit_folder, tmp_path / "digits", tmp_path / "index", **SETTINGS)


def test_a_missing_part_is_made_again_with_the_same_bytes(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, tiny_index: Path
) -> None:
    index = tmp_path / "index"
    shutil.copytree(tiny_index, index)
    (index / "features" / "part-000001.safetensors").unlink()
    featurize(dit_folder, digits_folder, index, **SETTINGS)
    assert file_digests(index) == file_digests(tiny_index)


RANDOM_ENCODINGS = SETTINGS | {"encoding": "sample", "num_encodings": 2, "augmentation": "crop", "proposal": "weight"}


@pytest.fixture(scope="module")
def random_index(tmp_path_factory: pytest.TempPathFactory, dit_folder: Path, digits_folder: Path) -> Path:
    """Return a complete index of two random encodings of each digit; tests must not change it."""
    path = tmp_path_factory.mktemp("random") / "index"
    featurize(dit_folder, digits_folder, path, **RANDOM_ENCODINGS)
    return path


def test_random_encodings_change_no_shape(random_index: Path, tiny_index: Path) -> None:
    store, plain = FeatureStore.open(random_index), FeatureStore.open(tiny_index)
    assert (store.manifest["draws_per_example"], plain.manifest["draws_per_example"]) == (8, 4)
    assert store.manifest["format_version"] == 5
    assert store.read_part(0).features.shape == plain.read_part(0).features.shape == (8, 2, 2, 48)
    assert store.verify() == []
    assert not torch.allclose(store.read_part(0).features, plain.read_part(0).features)


def test_a_part_of_random_encodings_is_made_again_with_the_same_bytes_in_other_batches(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, random_index: Path
) -> None:
    index = tmp_path / "index"
    shutil.copytree(random_index, index)
    (index / "features" / "part-000001.safetensors").unlink()
    featurize(dit_folder, digits_folder, index, **RANDOM_ENCODINGS, batch_size=3)
    assert file_digests(index) == file_digests(random_index)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_encodings", 3, "config.num_encodings: stored 2, requested 3"),
        ("encoding", "mode", "config.encoding: stored 'sample', requested 'mode'"),
        ("augmentation", "flip", "config.augmentation: stored 'crop', requested 'flip'"),
    ],
)
def test_other_encodings_are_another_index(
    dit_folder: Path, digits_folder: Path, random_index: Path, name: str, value: object, message: str
) -> None:
    with pytest.raises(StoreMismatchError, match=message):
        featurize(dit_folder, digits_folder, random_index, **RANDOM_ENCODINGS | {name: value})


WORKER = """
import sys, torch
torch.set_num_threads(1)
from tests.conftest import SETTINGS
from carv_attrib import featurize
print("ready", flush=True)
featurize(sys.argv[1], sys.argv[2], sys.argv[3], **SETTINGS | {"num_draws": 64, "part_size": 2})
print("done", flush=True)
"""


def run_worker(arguments: list[str], kill_after: float | None) -> bool:
    """Run the worker, kill it so many seconds after it is ready; return whether it ended by itself."""
    command = [sys.executable, "-c", WORKER, *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    ) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        if kill_after is not None:
            time.sleep(kill_after)
            worker.send_signal(signal.SIGKILL)
        return worker.stdout.readline() == "done\n"


def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(
    tmp_path: Path, dit_folder: Path, digits_folder: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = time.monotonic()
    assert run_worker([str(dit_folder), str(digits_folder), str(whole)], None)
    longest = 0.5 * (time.monotonic() - started)
    moments = random.Random(0)
    progress = []
    for _ in range(5):
        run_worker([str(dit_folder), str(digits_folder), str(killed)], moments.uniform(0, longest))
        progress.append(len(list((killed / "features").glob("part-*"))) if killed.exists() else 0)
    assert run_worker([str(dit_folder), str(digits_folder), str(killed)], None)
    assert file_digests(killed) == file_digests(whole)
    assert progress == sorted(progress)


def broken_digits(digits_folder: Path, tmp_path: Path) -> tuple[Path, str]:
    folder = tmp_path / "broken"
    shutil.copytree(digits_folder, folder)
    victim = sorted(folder.rglob("*.png"))[9]
    victim.write_text("not a picture")
    return folder, str(victim.relative_to(folder))


@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_bad_image_stops_the_run_and_nothing_that_was_done_is_lost(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, num_workers: int
) -> None:
    folder, victim = broken_digits(digits_folder, tmp_path)
    settings = SETTINGS | {"weighting": "uniform"}  # no pilot: the first part is done before the bad image is met
    before = set(threading.enumerate())
    with pytest.raises(BadImageError, match=victim):
        featurize(dit_folder, folder, tmp_path / "index", **settings, num_workers=num_workers)
    assert FeatureStore.open(tmp_path / "index").missing_parts() == [1, 2]
    assert set(threading.enumerate()) <= before


def test_a_failed_write_stops_the_run_before_the_next_part_is_written_and_a_resume_ends_with_the_same_bytes(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, tiny_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, write_part = tmp_path / "index", FeatureStore.write_part
    attempts = []

    def full_at_the_second(self: FeatureStore, part: int, *arguments: Any) -> None:
        attempts.append(part)
        if part == 1:
            raise StoreError("part 1 cannot be written: No space left on device")
        write_part(self, part, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, "write_part", full_at_the_second)
        with pytest.raises(StoreError, match="part 1 cannot be written: No space left on device"):
            featurize(dit_folder, digits_folder, index, **SETTINGS)
    assert attempts == [0, 1]
    assert FeatureStore.open(index).missing_parts() == [1, 2]
    featurize(dit_folder, digits_folder, index, **SETTINGS)
    assert file_digests(index) == file_digests(tiny_index)


def test_a_failed_write_of_the_last_part_leaves_no_index(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_part = FeatureStore.write_part

    def slow_then_full(self: FeatureStore, part: int, *arguments: Any) -> None:
        if part < 2:
            return write_part(self, part, *arguments)
        time.sleep(0.3)  # longer than an index takes: it must not be built meanwhile
        raise StoreError("part 2 cannot be written: No space left on device")

    monkeypatch.setattr(FeatureStore, "write_part", slow_then_full)
    with pytest.raises(StoreError, match="part 2 cannot be written: No space left on device"):
        featurize(dit_folder, digits_folder, tmp_path / "index", **SETTINGS)
    assert not (tmp_path / "index" / "index.json").exists()
    assert not (tmp_path / "index" / "index-00000.faiss").exists()


@pytest.mark.parametrize("num_workers", [0, 3])
def test_an_interrupt_finishes_the_part_that_is_being_written_and_ends_all_threads(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    write_part, calls = FeatureStore.write_part, []

    def slow(self: FeatureStore, part: int, *arguments: Any) -> None:
        time.sleep(0.2)
        write_part(self, part, *arguments)

    def interrupted(features: torch.Tensor, keys: list[str]) -> None:
        calls.append(keys)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(FeatureStore, "write_part", slow)
    monkeypatch.setattr("carv_attrib.pipeline.check_finite", interrupted)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        featurize(dit_folder, digits_folder, tmp_path / "index", **SETTINGS, num_workers=num_workers)
    assert set(threading.enumerate()) <= before
    assert FeatureStore.open(tmp_path / "index").missing_parts() == [1, 2]


def test_shared_draws_are_made_once_for_a_run_and_independent_ones_for_each_batch(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def spy(*arguments: Any, **keywords: Any) -> Any:
        made.append(keywords["ids"])
        return sample_draws(*arguments, **keywords)

    monkeypatch.setattr("carv_attrib.estimator.sample_draws", spy)
    settings = SETTINGS | {"weighting": "uniform", "batch_size": 4}
    featurize(dit_folder, digits_folder, tmp_path / "shared", **settings)
    assert made == [None]
    made.clear()
    featurize(dit_folder, digits_folder, tmp_path / "independent", **settings, noise="independent")
    assert [len(ids) for ids in made] == [1, 4, 4, 4, 4, 4]  # the first is the manifest's fingerprint


def test_skip_bad_records_the_image_and_goes_on(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, tiny_index: Path
) -> None:
    folder, victim = broken_digits(digits_folder, tmp_path)
    store = featurize(dit_folder, folder, tmp_path / "index", **SETTINGS, skip_bad=True)
    assert (len(store.ids), store.num_skipped()) == (19, 1)
    (record,) = [r for part in store.parts for r in store.read_records(part) if r.error]
    assert (record.id, record.key) == (9, victim)
    assert victim in str(record.error)
    assert store.verify() == []


def test_a_dataset_of_bad_images_only_says_so(tmp_path: Path, dit_folder: Path) -> None:
    for name in ("0/a.png", "1/b.png"):
        (tmp_path / "digits" / name).parent.mkdir(parents=True)
        (tmp_path / "digits" / name).write_text("no")
    with pytest.raises(DataError, match="none of 2 pilot examples of .* could be read: 0/a.png|1/b.png"):
        featurize(dit_folder, tmp_path / "digits", tmp_path / "index", **SETTINGS, skip_bad=True)


def test_a_class_conditional_teacher_needs_labels(tmp_path: Path, dit_folder: Path, digits_folder: Path) -> None:
    shutil.copytree(digits_folder / "0", tmp_path / "flat")
    message = r"needs class labels, but .* has none \(nor are numbers with an empty cell\); name a `label_column`"
    with pytest.raises(DataError, match=message):
        featurize(dit_folder, tmp_path / "flat", tmp_path / "index", **SETTINGS)


def test_classes_that_are_not_as_many_as_the_teachers_are_told(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("1", "2"):
        shutil.copytree(digits_folder / name, tmp_path / "two" / name)
    teacher = load_teacher(dit_folder, device="cpu")
    check_columns(teacher, open_dataset(digits_folder))
    assert not caplog.messages
    check_columns(teacher, open_dataset(tmp_path / "two"))
    assert "has 2 classes and the teacher 3; they are numbered in the order of their names, from 1 = 0" in caplog.text


def test_many_dimensions_are_told_before_anything_is_computed(
    tmp_path: Path,
    dit_folder: Path,
    digits_folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("carv_attrib.kernel.LARGE_KERNEL", 8 * 2 * 48 * 16 - 1)
    told: list[str] = []
    monkeypatch.setattr("carv_attrib.pipeline.write_parts", lambda *_: told.append(caplog.text))
    featurize(dit_folder, digits_folder, tmp_path / "index", **SETTINGS)
    assert "the kernel takes 0.0 GB of disk, four times that of memory, and 6 eigendecompositions of 16" in told[0]


def test_a_text_conditional_teacher_needs_captions(tmp_path: Path, sd_folder: Path, digits_folder: Path) -> None:
    with pytest.raises(DataError, match="needs captions, but .* has none; name a `caption_column`"):
        featurize(sd_folder, digits_folder, tmp_path / "index", **SETTINGS)


def test_a_label_that_the_teacher_does_not_have_names_the_example(tmp_path: Path, dit_folder: Path) -> None:
    with pytest.raises(DataError, match=r"digit \d+ has label \d, but the teacher's classes are 0 to 2"):
        featurize(dit_folder, "digits", tmp_path / "index", **SETTINGS)


def test_a_text_conditional_teacher_and_an_unconditional_one_run_end_to_end(
    tmp_path: Path, sd_folder: Path, ddpm_folder: Path, digits_folder: Path
) -> None:
    dataset = with_ids(digits_folder).add_column("text", ["re a digit"] * 20)
    for teacher in (sd_folder, ddpm_folder):
        store = featurize(teacher, dataset, tmp_path / teacher.name, **SETTINGS)
        assert len(store.ids) == 20
        assert store.verify() == []


def test_a_gradient_that_is_not_finite_names_the_example() -> None:
    draws = torch.zeros(3, 4, 2)
    draws[1, 2, 0] = float("inf")
    with pytest.raises(NonFiniteGradientError, match="gradient of example 'b.png' is not finite at draw 2"):
        check_finite(draws, ["a.png", "b.png", "c.png"])


def test_a_teacher_with_nan_weights_stops_the_run(tmp_path: Path, dit_folder: Path, digits_folder: Path) -> None:
    teacher = load_teacher(dit_folder, device="cpu")
    next(teacher.denoiser.parameters()).data.fill_(float("nan"))
    with pytest.raises(NonFiniteGradientError, match="is not finite at draw 0"):
        featurize(teacher, digits_folder, tmp_path / "index", **SETTINGS | {"weighting": "uniform"})


def test_the_dtype_of_a_loaded_teacher_is_recorded(tmp_path: Path, dit_folder: Path, digits_folder: Path) -> None:
    teacher = load_teacher(dit_folder, device="cpu", dtype="float64")
    store = featurize(teacher, digits_folder, tmp_path / "index", **SETTINGS)
    assert store.manifest["config"]["dtype"] == "float64"


@pytest.mark.parametrize(("name", "value"), [("dtype", "bfloat16"), ("device", "cuda:7")])
def test_settings_that_a_loaded_teacher_has_already_cannot_be_others(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, name: str, value: str
) -> None:
    teacher = load_teacher(dit_folder, device="cpu")
    with pytest.raises(ArgumentError, match=f"`{name}` is .* for the loaded teacher, got '{value}'; leave it out"):
        featurize(teacher, digits_folder, tmp_path / "index", **SETTINGS | {name: value})


def test_files_are_as_readable_as_their_folder(tiny_index: Path) -> None:
    modes = {oct(path.stat().st_mode & 0o666) for path in tiny_index.rglob("*") if path.suffix}
    assert modes == {oct((tiny_index / "features").stat().st_mode & 0o666)}


def encoded_digits(estimator: Estimator, digits_folder: Path, num: int) -> Encoded:
    digits = open_dataset(digits_folder)
    examples = [digits.load(row) for row in range(num)]
    pixels = torch.stack([to_pixels(x.image, estimator.teacher.pixel_spec) for x in examples])
    return estimator.encode(pixels, [x.label for x in examples], None, range(num))


def test_encoding_does_not_depend_on_how_many_are_encoded_together(dit_folder: Path, digits_folder: Path) -> None:
    teacher = load_teacher(dit_folder, device="cpu")
    estimator = build_estimator(teacher, FeaturizeConfig.from_flat(SETTINGS), 16, None)
    many, few = encoded_digits(estimator, digits_folder, 7), encoded_digits(estimator, digits_folder, 2)
    assert torch.equal(many.latents[:2], few.latents)
    assert many.condition["class_labels"].shape == (7,)


def test_the_pilot_finds_the_profile_of_gradient_norms(dit_folder: Path, digits_folder: Path) -> None:
    """Against norms of unprojected gradients: the DiT's proj_out_2 alone, at a rank that keeps everything."""
    teacher = load_teacher(dit_folder, device="cpu", dtype="float64")
    settings = SETTINGS | {"layers": ["proj_out_2"], "rank": 64, "proj_dim": 10_000, "block_dim": 10_000}
    estimator = build_estimator(teacher, FeaturizeConfig.from_flat(settings), 16, None)
    encoded = encoded_digits(estimator, digits_folder, 20)
    profile = measure_profile(estimator, encoded, [""] * 20)
    curve = profile.at_every_timestep(100)
    rng = torch.Generator().manual_seed(1)
    layer = teacher.denoiser.get_submodule("proj_out_2").requires_grad_(True)
    for low, high in ((0, 20), (80, 100)):
        squares = []
        for i in range(120):
            example, timestep = i % 20, torch.randint(low, high, (1,), generator=rng)
            latents, noise = encoded.latents[[example], 0], torch.randn(1, 2, 4, 4, generator=rng).double()
            condition = {"class_labels": encoded.condition["class_labels"][[example]]}
            output = teacher.predict(teacher.noise_schedule.add_noise(latents, noise, timestep), timestep, condition)
            gradients = torch.autograd.grad((output - noise).square().mean(), list(layer.parameters()))
            squares.append(sum(float(g.square().sum()) for g in gradients))
        error = np.std(squares) / len(squares) ** 0.5
        assert abs(np.mean(squares) - float(curve[low:high].square().mean())) < 4 * 2**0.5 * error


def test_balanced_weighting_is_the_inverse_profile_and_proposals_follow_it(dit_folder: Path) -> None:
    teacher = load_teacher(dit_folder, device="cpu")
    profile = GradientProfile((10.0, 90.0), (4.0, 1.0))

    def estimator(**settings: str) -> Any:
        return build_estimator(teacher, FeaturizeConfig.from_flat(SETTINGS | settings), 4, profile)

    curve = profile.at_every_timestep(100)
    assert curve[[0, 10, 50, 90, 99]].tolist() == pytest.approx([4, 4, 2, 1, 1])
    torch.testing.assert_close(estimator().weighting, 1 / curve)
    torch.testing.assert_close(estimator(weighting="uniform").weighting, torch.ones(100).double())
    flat = torch.full((100,), 0.01).double()
    torch.testing.assert_close(estimator(proposal="pilot").proposal.density, flat)  # balanced: already flat
    sloped = estimator(proposal="pilot", weighting="uniform").proposal.density
    torch.testing.assert_close(sloped, 0.9 * curve / curve.sum() + 0.1 * flat)
    torch.testing.assert_close(
        estimator(proposal="weight").proposal.density, 0.9 * (1 / curve) / (1 / curve).sum() + 0.1 * flat
    )


def test_zero_gradients_are_an_error_not_a_weighting(dit_folder: Path, digits_folder: Path) -> None:
    teacher = load_teacher(dit_folder, device="cpu")
    for parameter in teacher.denoiser.parameters():
        parameter.data.zero_()
    estimator = build_estimator(teacher, FeaturizeConfig.from_flat(SETTINGS | {"layers": ["*attn*"]}), 16, None)
    with pytest.raises(TeacherError, match="gradient is zero for every pilot example; choose other `layers`"):
        measure_profile(estimator, encoded_digits(estimator, digits_folder, 2), ["", ""])


def test_mean_feature_over_seeds_meets_the_mean_over_all_timesteps(dit_folder: Path, digits_folder: Path) -> None:
    """Unbiased end to end, importance weights and weighting included, against a long reference."""
    teacher = load_teacher(dit_folder, device="cpu")
    profile = GradientProfile((10.0, 90.0), (1.0, 3.0))
    fixed = build_estimator(teacher, FeaturizeConfig.from_flat({"proj_dim": 4, "rank": 2}), 8, profile)
    encoded = encoded_digits(fixed, digits_folder, 1)

    def features(num_draws: int, seed: int, **settings: Any) -> torch.Tensor:
        config = FeaturizeConfig.from_flat({"num_draws": num_draws, "num_bands": 1, "seed": seed} | settings)
        estimator = replace(build_estimator(teacher, config, min(64, num_draws), profile), projector=fixed.projector)
        return estimator.features(encoded, estimator.draws([0]))[0].double()

    reference = features(8192, seed=99)
    truth, truth_error = reference.mean(0), reference.std(0) / 8192**0.5
    estimators = [("iid", "uniform"), ("antithetic", "pilot"), ("orthogonal", "weight")]
    estimators += [("stratified", proposal) for proposal in ("uniform", "weight", "pilot")]
    for scheme, proposal in estimators:
        means = torch.stack([features(8, seed, scheme=scheme, proposal=proposal).mean(0) for seed in range(50)])
        error = (means.var(0) / len(means) + truth_error**2).sqrt()
        assert ((means.mean(0) - truth).abs() < 4 * error).all(), (scheme, proposal)


def test_squares_of_root_weighted_draws_are_means_under_p(dit_folder: Path, digits_folder: Path) -> None:
    """E_p[omega^2 |g|^2], from draws of either proposal."""
    teacher = load_teacher(dit_folder, device="cpu")
    profile = GradientProfile((10.0, 90.0), (9.0, 1.0))  # a proposal far from uniform
    traces, errors = [], []
    for proposal in ("uniform", "pilot"):
        settings = {"num_draws": 2048, "num_bands": 1, "weighting": "uniform", "proposal": proposal, "scheme": "iid"}
        estimator = build_estimator(teacher, FeaturizeConfig.from_flat(SETTINGS | settings), 64, profile)
        draws = estimator.draws([0])
        features = estimator.features(encoded_digits(estimator, digits_folder, 1), draws)
        squares = root_weighted(features, draws)[0].double().square().sum(-1)
        traces.append(float(squares.mean()))
        errors.append(float(squares.std()) / 2048**0.5)
    assert abs(traces[0] - traces[1]) < 4 * sum(error**2 for error in errors) ** 0.5


def test_an_index_is_built_again_when_features_changed_under_it(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, tiny_index: Path
) -> None:
    index = tmp_path / "index"
    shutil.copytree(tiny_index, index)
    whole = {name: (index / name).read_bytes() for name in ("index-00000.faiss", "index.json")}
    store = FeatureStore.open(index)
    part = store.read_part(1)
    store.write_part(1, replace(part, features=part.features * 0.1), store.read_records(1))
    featurize(dit_folder, digits_folder, index, **SETTINGS)
    assert (index / "index-00000.faiss").read_bytes() != whole["index-00000.faiss"]


def test_output_without_permission_is_one_line(tmp_path: Path, dit_folder: Path, digits_folder: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match=r"`output` .* cannot be written: Not a directory") as caught:
        featurize(dit_folder, digits_folder, tmp_path / "file" / "index", **SETTINGS | {"weighting": "uniform"})
    assert "\n" not in str(caught.value)


def test_unknown_settings_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="unknown setting 'num_draw'"):
        featurize("nowhere", "nothing", tmp_path / "index", num_draw=3)


def test_pictures_of_other_sizes_and_modes_become_what_the_teacher_takes(
    tmp_path: Path, ddpm_folder: Path, digits_folder: Path
) -> None:
    (tmp_path / "mixed").mkdir()
    picture = Image.open(next(digits_folder.rglob("*.png")))
    for mode in ("L", "RGB", "RGBA", "P", "1", "CMYK"):
        picture.resize((20, 11)).convert(mode).save(tmp_path / "mixed" / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    store = featurize(ddpm_folder, tmp_path / "mixed", tmp_path / "index", **SETTINGS)
    assert len(store.ids) == 6


@pytest.mark.gpu
def test_a_gpu_gives_the_scores_of_a_cpu_and_the_same_bits_whatever_is_read_at_once(tmp_path: Path) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    digits = open_digits().select(range(64))
    runs = {"cpu": {"device": "cpu"}, "cuda": {"device": "cuda"}, "again": {"device": "cuda", "batch_size": 5}}
    for name, execution in runs.items():
        featurize("demo", digits, tmp_path / name, micro_batch=16, part_size=32, **execution)
    cpu, cuda, again = (FeatureStore.open(tmp_path / name).read_part(1).features for name in runs)
    assert torch.equal(cuda, again)
    assert (cuda - cpu).norm() / cpu.norm() < 1e-3
    images = generate([3, 5])
    scores = [Attributor.open(tmp_path / name).scores(images, labels=[3, 5]) for name in runs]
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-2 * float(np.abs(scores[0]).max()))
