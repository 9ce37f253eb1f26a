"""What can break in `scripts/bench_query.py`: the larger stores whose opening is timed."""

from __future__ import annotations

from pathlib import Path

from bench_query import enlarge

from carv_attrib.store import FeatureStore


def test_an_enlarged_index_is_whole_and_has_so_many_times_the_examples(tmp_path: Path, tiny_index: Path) -> None:
    old = FeatureStore.open(tiny_index)
    whole = [part for part in old.parts if len(old.part_rows(part)) == old.manifest["config"]["part_size"]]
    new = FeatureStore.open(enlarge(tiny_index, tmp_path / "larger", 3))
    assert new.is_complete
    assert new.ids.tolist() == 3 * [i for part in whole for i in old.read_part(part).ids.tolist()]
    assert (tmp_path / "larger" / "index.json").is_file()
