"""What happens when the disk, the files or the pictures are bad: every case is made, and what was printed is kept.

Command:  python scripts/check_faults.py
Hardware: Linux, any CPU, about 10 minutes; as root also what needs a file system of its own
Writes:   docs/benchmarks/faults.json and the tables in docs/reliability.md

An index of 48 digits (packaged teacher, 4 parts) is copied for every case, or made again from a folder with a bad file.
A case passes if it ends as its column says, in one line that names the file or the example, without a traceback. After
damage, `verify` must name the file, and a query must either be refused or give the very scores it gave before.
`kill -9` is in `scripts/check_kills.py`, lost Ray workers in `tests/test_actors.py`, random bytes in every file of an
index in `scripts/fuzz_readers.py`.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from benchmark import describe_machine
from click.testing import CliRunner
from PIL import Image

from carv_attrib.cli import main as carv
from carv_attrib.data.sources import open_digits
from carv_attrib.estimator import Estimator
from carv_attrib.files import read_sealed, write_sealed
from carv_attrib.store import FeatureStore

COMMAND = "python scripts/check_faults.py"
PROGRAM = str(Path(sys.executable).with_name("carv-attrib"))
OUTPUT, PAGE = Path("docs/benchmarks/faults.json"), Path("docs/reliability.md")
NUM_DIGITS, NUM_FLIPS = 48, 5
FLAGS = "--teacher demo --num-draws 4 --num-bands 2 --proj-dim 64 --rank 4 --part-size 12 --device cpu".split()


class Unexpected(Exception):
    """A case ended otherwise than it should."""


@dataclass(frozen=True)
class Folders:
    """What cases start from; they change copies of it.

    Attributes:
        digits: a folder of pictures, a folder for each class.
        index: of those, whole.
        scores: what a query gave, by id.
        work: an empty folder of the case's own.
    """

    digits: Path
    index: Path
    scores: dict[int, float]
    work: Path

    def copy_digits(self) -> Path:
        """Return a copy of the pictures."""
        return Path(shutil.copytree(self.digits, self.work / "digits", symlinks=True))

    def copy_index(self) -> Path:
        """Return a copy of the index."""
        return Path(shutil.copytree(self.index, self.work / "index"))


Case = Callable[[Folders], str]
CASES: dict[str, dict[str, Case]] = {}


def case(group: str, tried: str) -> Callable[[Case], Case]:
    """Return a decorator that adds a case to a group."""

    def add(function: Case) -> Case:
        CASES.setdefault(group, {})[tried] = function
        return function

    return add


def run(*words: str | Path) -> tuple[int, str]:
    """Return the exit code and what was printed, in this process.

    Raises:
        Unexpected: if there was a traceback.
    """
    result = CliRunner().invoke(carv, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise Unexpected(f"traceback: {type(result.exception).__name__}: {result.exception}")
    return result.exit_code, result.output


def refused(*words: str | Path, naming: str = "") -> str:
    """Return the line with which a command was refused.

    Raises:
        Unexpected: if it was not, or not in one line, or the line lacks a name.
    """
    code, output = run(*words)
    lines = [line for line in output.splitlines() if line.startswith("Error:")]
    if code == 0 or len(lines) != 1 or naming not in lines[0]:
        raise Unexpected(f"exit code {code}, {output[-300:]}")
    return shorten(lines[0])


def shorten(line: str) -> str:
    """Return a line without the folders of this run."""
    return re.sub(r"/\S*/(digits|index|other)\b", r"\1", line.removeprefix("Error: ")).replace("|", "\\|")


def featurize(digits: Path, index: Path, *flags: str) -> tuple[str | Path, ...]:
    """Return the command that makes an index."""
    return ("featurize", "--dataset", digits, "--output", index, *FLAGS, *flags)


def ask(index: Path, picture: Path, *flags: str | Path) -> tuple[str | Path, ...]:
    """Return the command that asks an index about a digit."""
    return ("query", index, "--image", picture, "--label", "3", "--device", "cpu", "--json", *flags)


def scores_of(output: str) -> dict[int, float]:
    """Return the scores that a query printed, by id."""
    answer = json.loads(output[output.index("{") : output.rindex("}") + 1])
    return {row["id"]: row["score"] for row in answer["proponents"]}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_bomb() -> bytes:
    """Return a PNG file of a few bytes that says it is 100,000 pixels wide and high."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def truncated_png() -> bytes:
    """Return the first half of a PNG file."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(buffer, "PNG")
    return buffer.getvalue()[: buffer.tell() // 2]


BAD_FILES = {
    "0 bytes": b"",
    "a PNG cut in half": truncated_png(),
    "text named .png": b"not a picture\n",
    "SVG with a script, named .png": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "decompression bomb (100,000 x 100,000 pixels in 150 bytes)": png_bomb(),
    "a pickle named .png": b"\x80\x04cos\nsystem\n(S'touch /tmp/pwned'\ntR.",
}


def bad_picture(content: bytes) -> Case:
    """Return the case of a folder with a file that is no picture."""

    def check(folders: Folders) -> str:
        digits = folders.copy_digits()
        (digits / "3" / "bad.png").write_bytes(content)
        line = refused(*featurize(digits, folders.work / "index"), naming="bad.png")
        code, output = run(*featurize(digits, folders.work / "other", "--skip-bad"))
        if code or FeatureStore.open(folders.work / "other").num_skipped() != 1:
            raise Unexpected(output)
        return f"{line} With `--skip-bad`: skipped, recorded, all others featurized."

    return check


for _name, _content in BAD_FILES.items():
    case("Pictures", _name)(bad_picture(_content))


@case("Pictures", "a link out of the folder")
def link(folders: Folders) -> str:
    """Refuse it."""
    digits = folders.copy_digits()
    outside = folders.work / "secret.png"
    Image.new("L", (8, 8)).save(outside)
    (digits / "3" / "link.png").symlink_to(outside)
    return refused(*featurize(digits, folders.work / "index"), naming="link.png")


@case("Pictures", "JPEG named .png; 16 bits; CMYK; a palette with transparency; an animated GIF")
def odd_pictures(folders: Folders) -> str:
    """Read them."""
    digits = folders.copy_digits()
    digit = Image.open(next((digits / "3").glob("*.png"))).convert("L").resize((32, 32))
    digit.convert("RGB").save(digits / "3" / "jpeg.png", "JPEG")
    digit.convert("I;16").save(digits / "3" / "deep.png")
    digit.convert("CMYK").save(digits / "3" / "cmyk.jpg")
    digit.convert("P").save(digits / "3" / "palette.png", transparency=0)
    digit.save(digits / "3" / "moving.gif", save_all=True, append_images=[digit.rotate(90)])
    code, output = run(*featurize(digits, folders.work / "index"))
    if code or len(FeatureStore.open(folders.work / "index").ids) != NUM_DIGITS + 5:
        raise Unexpected(output)
    return "Read by content; of the animation, the first picture."


@case(
    "Pictures", "names with a newline, `..`, a leading dash, a terminal's escape codes, HTML; a class named as a script"
)
def odd_names(folders: Folders) -> str:
    """Read them, and print them harmlessly."""
    digits = folders.copy_digits()
    source = next((digits / "3").glob("*.png"))
    shutil.move(digits / "3", digits / "3<script>alert(1)<&>")
    folder = digits / "3<script>alert(1)<&>"
    for name in ("a\nb.png", "..c.png", "-d.png", "\x1b[31me.png", "<img src=x onerror=alert(2)>.png"):
        shutil.copy(folder / source.name, folder / name)
    code, output = run(*featurize(digits, folders.work / "index"))
    report = folders.work / "report.html"
    answer = run("query", folders.work / "index", "--image", folder / source.name, "--label", "3", "--report", report)
    if code or answer[0]:
        raise Unexpected(output + answer[1])
    page = report.read_text()
    if "<script>alert" in page or "<img src=x" in page or "\x1b[31m" in answer[1]:
        raise Unexpected("the page or the table has the name as it is")
    return "Read; escaped in the report, and without control characters in the terminal."


# ---------------------------------------------------------------------------------------------------------------------
# Damaged and hostile indexes
# ---------------------------------------------------------------------------------------------------------------------


def flipped(file: str) -> Case:
    """Return the case of a bit that flipped in a file of an index."""

    def check(folders: Folders) -> str:
        refusals, generator = 0, random.Random(file)
        picture = next((folders.digits / "3").glob("*.png"))
        for number in range(NUM_FLIPS):
            index = Path(shutil.copytree(folders.index, folders.work / f"index{number}"))
            content = bytearray((index / file).read_bytes())
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            (index / file).write_bytes(content)
            code, output = run("verify", index)
            if code == 0 and file != "manifest.json":  # of which some words are for readers only
                raise Unexpected(f"verify found nothing: {output}")
            if code and Path(file).name not in output:
                raise Unexpected(f"verify names another file: {output}")
            code, output = run(*ask(index, picture, "--top-k", str(NUM_DIGITS)))
            if code == 0 and scores_of(output) != folders.scores:
                raise Unexpected("a query gave other scores")
            refusals += code != 0
        return (
            f"{NUM_FLIPS} bits: `verify` names the file; {refusals} queries refused, {NUM_FLIPS - refusals} unharmed."
        )

    return check


for _file in (
    "manifest.json", "index.json", "index-00000.faiss", "kernel.safetensors",
    "features/part-000001.safetensors", "examples/part-000001.parquet",
):  # fmt: skip
    case("Damage", f"one bit flipped in {_file}")(flipped(_file))


@case("Damage", "a part deleted")
def deleted(folders: Folders) -> str:
    """Name it, and make it again."""
    index = folders.copy_index()
    (index / "features/part-000002.safetensors").unlink()
    line = refused("verify", index) if run("verify", index)[0] == 0 else run("verify", index)[1].splitlines()[0]
    code, output = run(*featurize(folders.digits, index))
    if code or run("verify", index)[0]:
        raise Unexpected(output)
    return f"{shorten(line)} The same featurize makes it again."


@case("Damage", "two parts swapped")
def swapped(folders: Folders) -> str:
    """Name both."""
    index = folders.copy_index()
    one, other = (index / f"features/part-00000{n}.safetensors" for n in (0, 1))
    one.rename(index / "kept")
    other.rename(one)
    (index / "kept").rename(other)
    code, output = run("verify", index)
    if code == 0 or "part-000000" not in output or "part-000001" not in output:
        raise Unexpected(output)
    return f"`verify` names both; query: {refused(*ask(index, next((folders.digits / '3').glob('*.png'))))}"


def edited(file: str, change: Callable[[dict[str, Any]], object], *, sealed: bool = False) -> Case:
    """Return the case of a JSON file that was edited, its checksum taken out unless it is `sealed`."""

    def check(folders: Folders) -> str:
        index = folders.copy_index()
        content = json.loads((index / file).read_text())
        if not sealed:
            del content["checksum"]
        change(content)
        (index / file).write_text(json.dumps(content))
        question = ask(index, next((folders.digits / "3").glob("*.png")), "--top-k", str(NUM_DIGITS))
        code, output = run(*question)
        if code:
            return refused(*question)
        if scores_of(output) != folders.scores:
            raise Unexpected("a query gave other scores")
        return "The same scores: of the parts that are there."

    return check


EDITS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "manifest of a later format": ("manifest.json", lambda m: m.update(format_version=99)),
    "manifest: `proj_dim` doubled": ("manifest.json", lambda m: m.update(proj_dim=128)),
    "manifest: `part_size` 0": ("manifest.json", lambda m: m["config"].update(part_size=0)),
    "manifest: `num_examples` -1": ("manifest.json", lambda m: m["dataset"].update(num_examples=-1)),
    "manifest: 10^15 examples": ("manifest.json", lambda m: m["dataset"].update(num_examples=10**15)),
    "manifest: a list where the settings are": ("manifest.json", lambda m: m.update(config=[])),
    "manifest: a teacher elsewhere": ("manifest.json", lambda m: m["teacher"].update(source="../../etc")),
    "index.json names a file out of the folder": (
        "index.json",
        lambda m: m.update(bytes={"../../etc/passwd": 1}, sha256={"../../etc/passwd": ""}),
    ),
    "index.json: FAISS parameters that are none": (
        "index.json",
        lambda m: m["search"].update(factory="IVF4,Flat", parameters="x=1"),
    ),
}
case("Hostile indexes", "manifest: another timestep weighting, its checksum as it was")(
    edited("manifest.json", lambda m: m["config"].update(weighting="uniform"), sealed=True)
)
case("Hostile indexes", "index.json: another damping, its checksum as it was")(
    edited("index.json", lambda m: m.update(damping=1.0), sealed=True)
)
for _name, (_file, _change) in EDITS.items():
    case("Hostile indexes", _name)(edited(_file, _change))


def replaced(file: str, content: Callable[[], bytes], *, listed: bool = False) -> Case:
    """Return the case of a file whose content is another; `listed`: `index.json` says so too."""

    def check(folders: Folders) -> str:
        import hashlib

        index = folders.copy_index()
        (index / file).write_bytes(content())
        if listed:
            about = read_sealed(index / "index.json")
            about["bytes"][file] = len(content())
            about["sha256"][file] = hashlib.sha256(content()).hexdigest()
            write_sealed(index / "index.json", about)
        return refused(*ask(index, next((folders.digits / "3").glob("*.png"))))

    return check


def tensors(**values: torch.Tensor) -> bytes:
    """Return a safetensors file."""
    from safetensors.torch import save

    values = {name: value.contiguous() for name, value in values.items()}
    return save(values, metadata={"kernel": json.dumps({"kind": "bands", "num_vectors": 9, "auto_damping": 0.1})})


def other_faiss() -> bytes:
    """Return a FAISS index of vectors of another length."""
    import faiss

    index = faiss.IndexFlatIP(7)
    index.add(torch.zeros(NUM_DIGITS, 7).numpy())
    return bytes(faiss.serialize_index(index))


SQUARE = torch.ones(2, 1, 64, 64).double()
PART, KERNEL = "features/part-000001.safetensors", "kernel.safetensors"
REPLACED: dict[str, Case] = {
    "a features file with a header of 2^60 bytes": replaced(PART, lambda: struct.pack("<Q", 2**60) + bytes(64)),
    "a features file of 0 bytes": replaced(PART, lambda: b""),
    "features in float64": replaced(
        PART, lambda: tensors(ids=torch.arange(12), features=torch.zeros(12, 2, 2, 64).double())
    ),
    "a pickle in place of features": replaced(PART, lambda: BAD_FILES["a pickle named .png"]),
    "a kernel that is not square, its checksum right": replaced(
        KERNEL,
        lambda: tensors(eigenvalues=torch.ones(2, 1, 64).double(), eigenvectors=SQUARE[..., :3]),
        listed=True,
    ),
    "a kernel of another size, its checksum right": replaced(
        KERNEL,
        lambda: tensors(eigenvalues=torch.ones(2, 1, 3).double(), eigenvectors=SQUARE[..., :3, :3]),
        listed=True,
    ),
    "a kernel of NaN, its checksum right": replaced(
        KERNEL,
        lambda: tensors(eigenvalues=torch.full((2, 1, 64), torch.nan).double(), eigenvectors=SQUARE),
        listed=True,
    ),
    "random bytes as FAISS file": replaced("index-00000.faiss", lambda: random.Random(0).randbytes(9000)),
    "random bytes as FAISS file, its checksum right": replaced(
        "index-00000.faiss", lambda: random.Random(0).randbytes(9000), listed=True
    ),
    "a FAISS file of vectors of another length, its checksum right": replaced(
        "index-00000.faiss", other_faiss, listed=True
    ),
}  # fmt: skip
for _name, _case in REPLACED.items():
    case("Hostile indexes", _name)(_case)


# ---------------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """Mount a small file system, if this process may."""
    folder.mkdir()
    options = f"size={kilobytes}k"
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, check=False
    ).returncode:
        raise Unexpected("not tried: file systems can be mounted by root only")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def finished_later(folders: Folders, index: Path) -> None:
    """Check that a stopped index, gone on with, is the whole one bit for bit, and has no temporary file."""
    code, output = run(*featurize(folders.digits, index))
    same = all(
        (index / file.relative_to(folders.index)).read_bytes() == file.read_bytes()
        for file in folders.index.rglob("*.*")
        if file.suffix in (".safetensors", ".parquet", ".faiss")
    )
    if code or not same or list(index.rglob(".*.tmp")):
        raise Unexpected(f"not the same afterwards: {output[-300:]}")


@case("The machine", "disk full (a file system of 64 kB)")
def full(folders: Folders) -> str:
    """Say so, lose nothing, go on when there is room."""
    with small_disk(folders.work / "small", 64) as disk:
        line = refused(*featurize(folders.digits, disk / "index"), naming="No space left")
        kept = len(FeatureStore.open(disk / "index").parts)
        shutil.copytree(disk / "index", folders.work / "index")
    finished_later(folders, folders.work / "index")
    return f"{line} {kept} parts kept; gone on with elsewhere, it is the uninterrupted index bit for bit."


@case("The machine", "a file system that can only be read")
def read_only(folders: Folders) -> str:
    """Answer queries, and say that it cannot be written."""
    picture = next((folders.digits / "3").glob("*.png"))
    with small_disk(folders.work / "small", 4096) as disk:
        index = shutil.copytree(folders.index, disk / "index")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        code, output = run(*ask(index, picture, "--top-k", str(NUM_DIGITS)))
        if code or scores_of(output) != folders.scores:
            raise Unexpected(output)
        return f"Queries work. index: {refused('index', index, naming='cannot be written')}"


@case("The machine", "SIGTERM in the middle")
def terminated(folders: Folders) -> str:
    """Stop with a word on how to go on."""
    index = folders.work / "index"
    words = [PROGRAM, *map(str, featurize(folders.digits, index))]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    while not (index / "features/part-000000.safetensors").is_file() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    line = errors.strip().splitlines()[-1]
    if process.returncode != 1 or "Traceback" in errors:
        raise Unexpected(errors[-400:])
    finished_later(folders, index)
    return f"{shorten(line)} Gone on with, it is the uninterrupted index bit for bit."


@case("The machine", "NaN in the gradient of one example")
def not_a_number(folders: Folders) -> str:
    """Name the example."""
    encode = Estimator.encode

    def with_nan(self: Estimator, pixels: torch.Tensor, labels: Any, prompts: Any, ids: list[int]) -> Any:
        encoded = encode(self, pixels, labels, prompts, ids)
        if 30 in ids:
            encoded.latents[ids.index(30)] = float("nan")
        return encoded

    with mock.patch.object(Estimator, "encode", with_nan):
        line = refused(*featurize(folders.digits, folders.work / "index"), naming=".png")
    finished_later(folders, folders.work / "index")
    return f"{line} Without it, gone on with, it is the uninterrupted index bit for bit."


@case("The machine", "the clock jumps by hours, back and forth")
def jumping_clock(folders: Folders) -> str:
    """Go on."""
    generator, now = random.Random(0), time.time
    with mock.patch("time.time", side_effect=lambda: now() + generator.choice([-7200, 0, 7200])):
        code, output = run(*featurize(folders.digits, folders.work / "index"))
    if code:
        raise Unexpected(output)
    finished_later(folders, folders.work / "index")
    return "The same index bit for bit."


@case("The machine", "a second writer")
def second_writer(folders: Folders) -> str:
    """Refuse it with the name of the first."""
    index = folders.copy_index()
    with FeatureStore.open(index).writing():
        return refused("index", index, naming=str(os.getpid()))


# ---------------------------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> Folders:
    """Make the pictures, the index, and the scores of a query."""
    digits = folder / "digits"
    names = open_digits().features["label"].names
    for row in open_digits().select(range(NUM_DIGITS)):
        path = (
            digits / names[row["label"]] / f"{row['id'] if 'id' in row else len(list(digits.rglob('*.png'))):04d}.png"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["image"]["bytes"]) if isinstance(row["image"], dict) else row["image"].save(path)
    code, output = run(*featurize(digits, folder / "index"))
    if code:
        raise click.ClickException(output)
    _, output = run(*ask(folder / "index", next((digits / "3").glob("*.png")), "--top-k", str(NUM_DIGITS)))
    return Folders(digits, folder / "index", scores_of(output), folder)


def write_page(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Put the tables into the page, between its marks."""
    tables = []
    for group, rows in results.items():
        tables += [f"### {group}", "", "| tried | what happened |", "|---|---|"]
        tables += [
            f"| {tried} | {'' if row['passed'] else '**Wrong.** '}{row['happened']} |" for tried, row in rows.items()
        ]
        tables.append("")
    before, rest = PAGE.read_text().split("<!-- tables -->\n", 1)
    _, after = rest.split("<!-- end of tables -->", 1)
    PAGE.write_text(f"{before}<!-- tables -->\n" + "\n".join(tables) + f"<!-- end of tables -->{after}")


@click.command()
@click.option("--only", default="", help="Cases whose name has this, in place of all; writes nothing.")
def main(only: str) -> None:
    """Make every case, write what happened, and fail if one was wrong."""
    results: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary).chmod(0o755)
        prepared = prepare(Path(temporary))
        for group, cases in CASES.items():
            for number, (tried, check) in enumerate(cases.items()):
                if only not in tried:
                    continue
                work = Path(temporary) / f"{group}-{number}".replace(" ", "-")
                work.mkdir()
                try:
                    happened, passed = check(Folders(prepared.digits, prepared.index, prepared.scores, work)), True
                except Unexpected as err:
                    happened, passed = str(err), False
                shutil.rmtree(work, ignore_errors=True)
                results.setdefault(group, {})[tried] = {"passed": passed, "happened": happened}
                click.echo(f"{'ok   ' if passed else 'WRONG'} {tried}: {happened}")
    wrong = sum(not row["passed"] for rows in results.values() for row in rows.values())
    if not only:
        machine = describe_machine()
        OUTPUT.write_text(json.dumps({"command": COMMAND, "machine": machine, "cases": results}, indent=1) + "\n")
        write_page(results)
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
