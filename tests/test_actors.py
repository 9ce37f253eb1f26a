from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from carv_attrib import featurize
from carv_attrib.actors import on_actors
from carv_attrib.errors import ArgumentError, BadImageError, CarvError
from carv_attrib.store import FeatureStore
from tests.conftest import SETTINGS

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Start Ray once, with two CPUs."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def once_lost(folder: Path) -> Callable[[int], int]:
    """Return work whose process is killed by the first number 6."""

    def work(number: int) -> int:
        flag = folder / "lost"
        time.sleep(0.5)  # until Ray has forgotten what it can
        if number == 6 and not flag.exists():
            flag.touch()
            os._exit(1)
        return number**2

    return work


def test_every_item_comes_back_once_also_from_an_actor_that_was_lost(tmp_path: Path) -> None:
    large = bytes(10**6)  # as a data set is: Ray does not send it with the call
    found = dict(on_actors(lambda: once_lost(tmp_path) if large else None, range(8), 2, gpu=False))
    assert found == {number: number**2 for number in range(8)}
    assert (tmp_path / "lost").exists()


def always_lost() -> Callable[[int], int]:
    return lambda number: os._exit(1)


def test_an_actor_that_is_lost_again_and_again_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("carv_attrib.actors.RESTARTS", 0)
    with pytest.raises(CarvError, match="Ray lost a worker 1 times over .*; what is done is kept"):
        list(on_actors(always_lost, range(2), 1, gpu=False))


def recorded(folder: Path) -> Callable[[int], int]:
    def work(number: int) -> int:
        (folder / str(number)).touch()
        return number

    return work


def test_no_more_is_begun_than_there_are_actors_and_one(tmp_path: Path) -> None:
    results = on_actors(lambda: recorded(tmp_path), range(50), 2, gpu=False)
    next(results)
    assert len(list(tmp_path.iterdir())) <= 3
    results.close()


def test_features_are_the_same_bits_on_ray(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, tiny_index: Path
) -> None:
    featurize(dit_folder, digits_folder, tmp_path / "index", engine="ray", ray_workers=2, **SETTINGS)
    for file in (
        "manifest.json",
        "features/part-000002.safetensors",
        "examples/part-000001.parquet",
        "index-00000.faiss",
    ):
        assert (tmp_path / "index" / file).read_bytes() == (tiny_index / file).read_bytes(), file


def test_an_error_in_an_actor_is_the_users_own(tmp_path: Path, dit_folder: Path, digits_folder: Path) -> None:
    import shutil

    shutil.copytree(digits_folder, tmp_path / "digits")
    bad = sorted((tmp_path / "digits").rglob("*.png"))[-1]
    bad.write_bytes(bad.read_bytes()[:40])
    settings: dict[str, Any] = SETTINGS | {"weighting": "uniform", "engine": "ray", "ray_workers": 1}
    with pytest.raises(BadImageError, match=bad.name) as caught:
        featurize(dit_folder, tmp_path / "digits", tmp_path / "index", **settings)
    assert "\n" not in str(caught.value)  # nothing of Ray's own traceback
    assert FeatureStore.open(tmp_path / "index").missing_parts() == [2]


@pytest.mark.usefixtures("as_users_run_it")
def test_bad_settings_are_one_line() -> None:
    with pytest.raises(ArgumentError, match="`engine` must be one of local, ray, got 'dask'"):
        featurize("nowhere", "nothing", "never", engine="dask")
    with pytest.raises(ArgumentError, match="`ray_workers` must be a whole number of at least 1, got 0"):
        featurize("nowhere", "nothing", "never", engine="ray", ray_workers=0)
