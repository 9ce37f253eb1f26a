"""A few cases of `scripts/fuzz_readers.py`: random bytes in every file of an index, in pictures and in tables."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fuzz_readers import FILES, check_damage, check_picture, check_table, picture_folder, seeds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from carv_attrib.data import ExampleDataset

few_cases = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, tiny_index: Path) -> Path:
    """A copy of an index, which tests damage and mend."""
    return Path(shutil.copytree(tiny_index, tmp_path_factory.mktemp("damaged") / "index"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExampleDataset]:
    """A folder of one picture, which tests change."""
    folder = tmp_path_factory.mktemp("pictures")
    return folder, picture_folder(folder)


@few_cases
@given(
    place=st.integers(0, 2**24) | st.integers(0, 255),
    old=st.integers(0, 9),
    new=st.binary(max_size=9),
    cut=st.sampled_from([False, False, False, True]),
)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_refused_or_harmless(
    damaged: Path, tiny_index: Path, name: str, place: int, old: int, new: bytes, cut: bool
) -> None:
    check_damage(damaged, tiny_index, name, place, old, new, cut=cut)


def changed(whole: list[bytes]) -> st.SearchStrategy[bytes]:
    """Return files with some of their bytes changed, or nothing but random bytes."""
    parts = st.tuples(st.sampled_from(whole), st.integers(0, 2000), st.binary(max_size=9))
    return parts.map(lambda x: x[0][: x[1]] + x[2] + x[0][x[1] + len(x[2]) :]) | st.binary(max_size=300)


@few_cases
@given(content=changed(seeds("picture")))
def test_any_bytes_as_a_picture_are_read_or_refused(pictures: tuple[Path, ExampleDataset], content: bytes) -> None:
    check_picture(*pictures, content)


@few_cases
@given(content=changed(seeds("table")))
def test_any_bytes_as_a_table_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    check_table(tmp_path, content)
