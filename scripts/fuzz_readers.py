"""Random bytes in every file of an index, in pictures and in tables: an answer is the right one, or a line refuses it.

Command:  python scripts/fuzz_readers.py --seconds 600     (pip install atheris; `tests/test_fuzz.py` runs a few cases)
Hardware: Linux, one CPU core; so many seconds for each of eight targets
Writes:   docs/benchmarks/fuzz.json and the table that it prints

Atheris (libFuzzer) looks for cases that take other ways through `carv_attrib`: bytes inserted, changed or cut off in
one file of a whole index of 20 digits, and pictures of six formats and a Parquet table changed at will. An index is
opened, queried by the search index and from the parts, verified and inspected. A case fails if anything but an error of
one line comes out, if an answer is another than that of the whole index, or if `verify` does not name the changed file.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import click
import numpy as np
import torch
from benchmark import describe_machine
from PIL import Image

from carv_attrib import featurize, load_teacher
from carv_attrib.data import ExampleDataset, open_dataset
from carv_attrib.data.sources import open_digits
from carv_attrib.errors import CarvError
from carv_attrib.files import atomic_file
from carv_attrib.inspection import inspect, verify
from carv_attrib.scorer import Choice, Scorer
from carv_attrib.store import FeatureStore

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
    found = scorer.candidate_scores(query, positions, CHOICE, slice(None), errors=False).scores[0]
    parts = torch.cat([part.scores[0] for part in scorer.part_scores(query, CHOICE, errors=False)])
    torch.testing.assert_close(found, parts[positions])
    records = store.find_records(store.ids.tolist())
    keys = [float(len(records[i].key)) for i in store.ids.tolist()]
    return np.concatenate([found.numpy(), store.ids, keys])


def check_damage(damaged: Path, whole: Path, name: str, place: int, old: int, new: bytes, *, cut: bool) -> None:
    """Put new bytes in the place of old ones, and compare with an index that is whole; the file is mended afterwards.

    Args:
        damaged: the index.
        whole: another with the same files.
        name: of the file.
        place: of the first byte; any number.
        old: how many bytes go.
        new: bytes that come.
        cut: end the file there.
    """
    content = (whole / name).read_bytes()
    place %= len(content)
    changed = content[:place] + new + (b"" if cut else content[place + old :])
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


def picture_folder(folder: Path) -> ExampleDataset:
    """Return a data set of one digit in a folder, `1/a.png`."""
    (folder / "1").mkdir()
    (folder / "1" / "a.png").write_bytes(seeds("picture")[0])
    return open_dataset(folder)


def check_picture(folder: Path, examples: ExampleDataset, content: bytes) -> None:
    """Read any bytes as the picture of a data set of `picture_folder`."""
    (folder / "1" / "a.png").write_bytes(content)
    example, line = refusal_of(lambda: examples.load(0))
    assert example is not None or "a.png" in line


def check_table(folder: Path, content: bytes) -> None:
    """Read any bytes as a parquet file, and every row of it."""
    (folder / "a.parquet").write_bytes(content)
    examples, _ = refusal_of(lambda: open_dataset(folder / "a.parquet"))
    for row in range(min(len(examples), 3) if examples else 0):
        refusal_of(lambda row=row: examples.load(row))


def seeds(target: str) -> list[bytes]:
    """Return whole pictures of several formats, or a whole table of three of them."""
    digits = open_digits().select(range(3)).with_format(None)
    if target == "table":
        buffer = io.BytesIO()
        digits.to_parquet(buffer)
        return [buffer.getvalue()]
    picture, found = Image.open(io.BytesIO(digits[0]["image"]["bytes"])), []
    for name in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        buffer = io.BytesIO()
        picture.save(buffer, name)
        found.append(buffer.getvalue())
    return found


def fuzz(target: str, seconds: int) -> None:
    """Look for a failing case of one target; this process ends then."""
    import atheris

    folder, corpus = (Path(tempfile.mkdtemp(dir="/dev/shm")) for _ in range(2))
    if target in FILES:
        examples = {"num_draws": 4, "num_bands": 2, "proj_dim": 16, "part_size": 12, "device": "cpu"}
        featurize(load_teacher("demo"), open_digits().select(range(20)), folder / "whole", **examples)
        shutil.copytree(folder / "whole", folder / "damaged")
    else:
        for number, content in enumerate(seeds(target)):
            (corpus / str(number)).write_bytes(content)

    def damage(data: bytes) -> None:
        drawn = atheris.FuzzedDataProvider(data)
        place = drawn.ConsumeIntInRange(0, 2**24) if drawn.ConsumeBool() else drawn.ConsumeIntInRange(0, 255)
        old, cut, new = drawn.ConsumeIntInRange(0, 9), drawn.ConsumeProbability() < 0.1, drawn.ConsumeBytes(9)
        check_damage(folder / "damaged", folder / "whole", target, place, old, new, cut=cut)

    case = damage
    if target == "picture":
        case = partial(check_picture, folder, picture_folder(folder))
    elif target == "table":
        case = partial(check_table, folder)
    limits = [f"-max_total_time={seconds}", "-len_control=0", "-rss_limit_mb=8192"]
    atheris.Setup([__file__, *limits, str(corpus)], case)
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
