from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from carv_attrib import load_teacher
from carv_attrib.data import open_dataset, to_pixels
from carv_attrib.demo import generate, run_demo

FOLDERS = [Path("carv_attrib/demo/teacher"), Path("carv_attrib/demo/pixel_teacher")]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_packaged_teachers_are_small_and_free_of_pickles(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5e6
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def test_the_packaged_teacher_takes_grey_digits_of_ten_classes() -> None:
    teacher = load_teacher("demo")
    assert (teacher.pixel_spec.height, teacher.pixel_spec.channels, teacher.num_classes) == (32, 1, 10)


def test_loading_says_nothing_about_packages_that_are_not_needed(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("diffusers")
    level = log.level
    log.setLevel(logging.WARNING)
    log.addHandler(caplog.handler)
    try:
        load_teacher("demo")
        load_teacher("demo-pixels")
        generate([0], num_inference_steps=1)
    finally:
        log.removeHandler(caplog.handler)
        log.setLevel(level)
    assert not caplog.records


def test_generated_digits_are_of_the_asked_class() -> None:
    """By the nearest training digit in pixels: most must have the class."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = list(range(10)) * 3
    images = [np.asarray(image.resize((8, 8)), float).ravel() for image in generate(labels, num_inference_steps=25)]
    train = digits.data / np.linalg.norm(digits.data, axis=1, keepdims=True)
    nearest = [digits.target[(train @ image).argmax()] for image in images]
    assert np.mean(np.array(nearest) == labels) >= 0.8


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[list, Path]:
    return run_demo(tmp_path_factory.mktemp("demo"), labels=(3, 8))


def test_the_demo_finds_digits_of_the_class_it_generated(demo: tuple[list, Path]) -> None:
    results, _ = demo
    for label, result in zip("38", results, strict=True):
        assert sum(match.label == label for match in result.proponents) >= 8


def test_the_demo_writes_its_report(demo: tuple[list, Path]) -> None:
    results, report = demo
    page = report.read_text()
    assert all(match.key in page for result in results for match in result.proponents)


def test_the_pixel_teacher_sees_the_digits_at_their_own_size() -> None:
    teacher = load_teacher("demo-pixels")
    assert teacher.latent_shape == (1, 8, 8)
    assert teacher.condition_kind == "none"
    digits = open_dataset("digits")
    pixels = torch.stack([to_pixels(digits.load(row).image, teacher.pixel_spec) for row in range(16)])
    timesteps = torch.full((16,), 300)
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    noisy = teacher.noise_schedule.add_noise(teacher.encode(pixels), noise, timesteps)
    assert float((teacher.predict(noisy, timesteps, {}) - noise).square().mean()) < 0.15  # an untrained one has 1
