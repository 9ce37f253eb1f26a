"""Random bytes in every file of an index, in pictures and in tables: an answer is the right one, or a line refuses it.

Command:  python scripts/fuzz_readers.py --seconds 600     (pip install atheris; `tests/test_fuzz.py` runs a few cases)
Hardware: Linux, one CPU core; so many seconds for each of eight targets
Writes:   docs/benchmarks/fuzz.json and the table that it prints

Atheris (libFuzzer) looks for bytes that take other ways through `carv_attrib`, and hypothesis makes cases of them:
bytes inserted, changed or cut off in one file of a whole index of 20 digits. Every case opens the index, queries it by
the search index and from the parts, verifies and inspects it. It fails if anything but an error of one line comes out,
if an answer is another than that of the whole index, or if `verify` does not name the changed file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click
import numpy as np
import torch
from benchmark import describe_machine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from carv_attrib import featurize, load_teacher
from carv_attrib.data import open_dataset
from carv_attrib.data.sources import open_digits
from carv_attrib.errors import CarvError
from carv_attrib.inspection import inspect, verify
from carv_attrib.scorer import Choice, Scorer
from carv_attrib.store import FeatureStore, atomic_file

COMMAND = "python scripts/fuzz_readers.py"
OUTPUT = Path("docs/benchmarks/fuzz.json")
FILES = (
    "manifest.json", "index.json", "index-00000.faiss", "kernel.safetensors",
    "features/part-000001.safetensors", "examples/part-000001.parquet",
)  # fmt: skip
TARGETS = (*FILES, "picture", "table")
SCRIPTS = str(Path(__file__).parent)
INSTRUMENTED = """
import atheris
with atheris.instrument_imports(include=["carv_attrib"]):
    import fuzz_readers"""
CHOICE = Choice("preconditioned", "bands", "auto")
Result = TypeVar("Result")


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


def check_damage(damaged: Path, whole: Path, name: str, data: st.DataObject) -> None:
    """Change bytes of a file of an index, which is mended afterwards, and compare with another that is whole."""
    content = (whole / name).read_bytes()
    place = data.draw(st.integers(0, len(content) - 1) | st.integers(0, min(len(content), 200) - 1))
    new = data.draw(st.binary(min_size=1, max_size=9))
    keep = data.draw(st.sampled_from([0, 1, len(new)]))  # insert, change a byte, or change them all
    changed = content[:place] + new + content[place + keep :]
    changed = changed[: data.draw(st.sampled_from([len(changed), place]))]
    (damaged / name).write_bytes(changed)
    try:
        found, line = refusal_of(lambda: answer(damaged))
        problems = refusal_of(lambda: verify(damaged))
        refusal_of(lambda: inspect(damaged))
    finally:
        (damaged / name).write_bytes(content)
    if found is not None:
        np.testing.assert_array_equal(found, answer(whole))
    assert found is not None or changed != content, line
    if not name.endswith(".json") and changed != content:  # where white space is harmless
        assert problems[1] or any(Path(name).name in line for line in problems[0] or [])


def check_picture(folder: Path, data: st.DataObject) -> None:
    """Read any bytes as a picture in a folder."""
    prefix = data.draw(
        st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0", b"RIFF", b"II*\x00"])
    )
    (folder / "1").mkdir(exist_ok=True)
    (folder / "1" / "a.png").write_bytes(prefix + data.draw(st.binary(max_size=300)))
    examples = open_dataset(folder)
    example, line = refusal_of(lambda: examples.load(0))
    assert example is not None or "a.png" in line


def check_table(folder: Path, data: st.DataObject) -> None:
    """Read any bytes as a parquet file."""
    prefix, content = data.draw(st.sampled_from([b"", b"PAR1"])), data.draw(st.binary(max_size=200))
    (folder / "a.parquet").write_bytes(prefix + content + prefix)
    found, _ = refusal_of(lambda: open_dataset(folder / "a.parquet"))
    assert found is None


def fuzz(target: str, seconds: int) -> None:
    """Look for a failing case of one target; this process ends then."""
    import atheris

    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    if target in FILES:
        examples = {"num_draws": 4, "num_bands": 2, "proj_dim": 16, "part_size": 12, "device": "cpu"}
        featurize(load_teacher("demo"), open_digits().select(range(20)), folder / "whole", **examples)
        shutil.copytree(folder / "whole", folder / "damaged")

    @settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def case(data: st.DataObject) -> None:
        if target in FILES:
            check_damage(folder / "damaged", folder / "whole", target, data)
        else:
            (check_picture if target == "picture" else check_table)(folder, data)

    limits = [f"-max_total_time={seconds}", "-rss_limit_mb=8192"]
    atheris.Setup([__file__, *limits], case.hypothesis.fuzz_one_input)
    atheris.Fuzz()


@click.command()
@click.option(
    "--target", "targets", multiple=True, type=click.Choice(TARGETS), default=TARGETS, help="By default, all."
)
@click.option("--seconds", default=600, show_default=True, help="For each target.")
def main(targets: tuple[str, ...], seconds: int) -> None:
    """Fuzz targets one after the other, each in a process of its own, and keep how many cases there were."""
    cases = {}
    for target in targets:
        program = f"{INSTRUMENTED}\nfuzz_readers.fuzz({target!r}, {seconds})"
        command = [sys.executable, "-c", program]
        ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": SCRIPTS})
        done = re.search(r"Done (\d+) runs in", ended.stderr)
        if ended.returncode or not done:
            raise click.ClickException(f"{target}: {ended.stdout[-5000:]}{ended.stderr[-5000:]}")
        cases[target] = int(done[1])
        click.echo(f"{target}: {done[1]} cases, none failed")
    with atomic_file(OUTPUT) as temporary:
        result = {"command": f"{COMMAND} --seconds {seconds}", "machine": describe_machine(), "cases": cases}
        temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
