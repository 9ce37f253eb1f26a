"""A few cases of `scripts/fuzz_readers.py`: random bytes in every file of an index, in pictures and in tables."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fuzz_readers import FILES, check_damage, check_picture, check_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

few_cases = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, tiny_index: Path) -> Path:
    """A copy of an index, which tests damage and mend."""
    return Path(shutil.copytree(tiny_index, tmp_path_factory.mktemp("damaged") / "index"))


@few_cases
@given(data=st.data())
@pytest.mark.parametrize("name", FILES)
def test_damage_is_refused_or_harmless(damaged: Path, tiny_index: Path, name: str, data: st.DataObject) -> None:
    check_damage(damaged, tiny_index, name, data)


@few_cases
@given(data=st.data())
def test_any_bytes_as_a_picture_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    check_picture(tmp_path, data)


@few_cases
@given(data=st.data())
def test_any_bytes_as_a_table_are_refused(tmp_path: Path, data: st.DataObject) -> None:
    check_table(tmp_path, data)
