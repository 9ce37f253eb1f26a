"""Random bytes in every file of an index: an answer is the right one, or a line that refuses it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from carv_attrib.data import open_dataset
from carv_attrib.errors import CarvError
from carv_attrib.inspection import inspect, verify
from carv_attrib.scorer import Choice, Scorer
from carv_attrib.store import FeatureStore

Result = TypeVar("Result")
FILES = (
    "manifest.json", "index.json", "index-00000.faiss", "kernel.safetensors",
    "features/part-000001.safetensors", "examples/part-000001.parquet",
)  # fmt: skip
CHOICE = Choice("preconditioned", "bands", "auto")
slow_fixtures = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, tiny_index: Path) -> Path:
    """A copy of an index, which tests damage and mend."""
    return Path(shutil.copytree(tiny_index, tmp_path_factory.mktemp("damaged") / "index"))


def refusal_of(work: Callable[[], Result]) -> tuple[Result | None, str]:
    """Return a result, or the one line that refuses it."""
    try:
        return work(), ""
    except CarvError as err:
        line = str(err)
    assert line
    assert "\n" not in line
    return None, line


def answer(path: Path) -> np.ndarray:
    """Return the exact scores of all examples for the first of them, by the search index and from the parts."""
    store = FeatureStore.open(path)
    scorer = Scorer(store, "none", "cpu", None)
    query = store.read_features([0])
    positions = scorer.candidates(query, CHOICE, len(store.ids), slice(None), opponents=False)
    found = scorer.candidate_scores(query, positions, CHOICE, slice(None)).scores[0]
    parts = torch.cat([part.scores[0] for part in scorer.part_scores(query, CHOICE)])
    torch.testing.assert_close(found, parts[positions])
    records = store.find_records(store.ids.tolist())
    keys = [float(len(records[i].key)) for i in store.ids.tolist()]
    return np.concatenate([found.numpy(), store.ids, keys])


@slow_fixtures
@given(data=st.data())
@pytest.mark.parametrize("name", FILES)
def test_damage_is_refused_or_harmless(damaged: Path, tiny_index: Path, name: str, data: st.DataObject) -> None:
    whole = (tiny_index / name).read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1) | st.integers(0, min(len(whole), 200) - 1))
    new = data.draw(st.binary(min_size=1, max_size=9))
    keep = data.draw(st.sampled_from([0, 1, len(new)]))  # insert, change a byte, or change them all
    content = whole[:place] + new + whole[place + keep :]
    content = content[: data.draw(st.sampled_from([len(content), place]))]
    changed = content != whole
    (damaged / name).write_bytes(content)
    try:
        found, line = refusal_of(lambda: answer(damaged))
        problems = refusal_of(lambda: verify(damaged))
        refusal_of(lambda: inspect(damaged))
    finally:
        (damaged / name).write_bytes(whole)
    if found is not None:
        np.testing.assert_array_equal(found, answer(tiny_index))
    assert found is not None or changed, line
    if not name.endswith(".json") and changed:  # where white space is harmless
        assert problems[1] or any(Path(name).name in line for line in problems[0] or [])


@slow_fixtures
@given(
    content=st.binary(max_size=300),
    prefix=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0", b"RIFF", b"II*\x00"]),
)
def test_any_bytes_as_a_picture_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, digits_folder: Path, content: bytes, prefix: bytes
) -> None:
    folder = tmp_path_factory.mktemp("pictures") / "1"
    folder.mkdir()
    (folder / "a.png").write_bytes(prefix + content)
    examples = open_dataset(folder.parent)
    example, line = refusal_of(lambda: examples.load(0))
    assert example is not None or "a.png" in line


@slow_fixtures
@given(content=st.binary(max_size=200), prefix=st.sampled_from([b"", b"PAR1"]))
def test_any_bytes_as_a_table_are_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, prefix: bytes
) -> None:
    file = tmp_path_factory.mktemp("tables") / "a.parquet"
    file.write_bytes(prefix + content + prefix)
    with pytest.raises(CarvError) as caught:
        open_dataset(file)
    assert "\n" not in str(caught.value)
