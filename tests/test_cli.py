from __future__ import annotations

import csv
import io
import json
import os
import runpy
import shutil
import signal
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from carv_attrib.cli import main
from carv_attrib.config import setting_names
from tests.conftest import SETTINGS


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


FLAGS = [part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def run_featurize(teacher: object, dataset: object, output: object, *more: object) -> Result:
    return run("featurize", "--teacher", teacher, "--dataset", dataset, "--output", output, *FLAGS, *more)


def test_the_module_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["carv_attrib", "--version"])
    monkeypatch.delitem(sys.modules, "carv_attrib.__main__", raising=False)  # of the doctests
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("carv_attrib", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("carv-attrib, version ")


def assert_one_line(result: Result, exit_code: int, *expected: str) -> None:
    """Check that a user error is one line on standard error that contains the expected words, and no traceback."""
    assert result.exit_code == exit_code, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("Usage:", "Try '"))]
    lines = [line for line in lines if line]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    for words in expected:
        assert words in lines[0]


@pytest.fixture
def featurize(tmp_path: Path, dit_folder: Path) -> Callable[..., Result]:
    def call(dataset: object, *more: object) -> Result:
        return run(
            "featurize", "--teacher", dit_folder, "--dataset", dataset, "--output", tmp_path / "index", *FLAGS, *more
        )

    return call


def test_featurize_query_inspect_verify(tmp_path: Path, featurize: Callable[..., Result], digits_folder: Path) -> None:
    done = featurize(digits_folder)
    assert done.exit_code == 0, done.output
    assert done.output == f"20 examples in {tmp_path / 'index'}\n"
    asked = run("query", tmp_path / "index", "--image", digits_folder / "1" / "001.png", "--label", 1, "--opponents")
    assert asked.exit_code == 0, asked.output
    assert "Proponents" in asked.output
    assert "Opponents" in asked.output
    assert "1/001.png" in asked.output
    assert run("verify", tmp_path / "index").output == f"{tmp_path / 'index'}: no problems found\n"
    facts = json.loads(run("inspect", tmp_path / "index", "--json").output)
    assert (facts["examples"], facts["parts"], facts["num_draws"]) == (20, "3 of 3", 4)
    assert "num_draws" in run("inspect", tmp_path / "index").output


def test_query_prints_json_and_csv_and_writes_a_report(tmp_path: Path, tiny_index: Path, digits_folder: Path) -> None:
    question = ("query", tiny_index, "--image", digits_folder / "1" / "001.png", "--label", 1, "--top-k", 3)
    answer = json.loads(run(*question, "--json", "--report", tmp_path / "report.html").stdout)
    assert [match["id"] for match in answer["proponents"]] == answer_ids(run(*question, "--csv").output)
    assert answer["proponents"][0]["standard_error"] > 0
    assert "data:image/png;base64," in (tmp_path / "report.html").read_text()


def test_query_about_a_part(tmp_path: Path, tiny_index: Path, digits_folder: Path) -> None:
    question = ("query", tiny_index, "--image", digits_folder / "1" / "001.png", "--label", 1, "--json")
    for name, box in (("top", (0, 0, 8, 4)), ("bottom", (0, 4, 8, 8)), ("black", (0, 0, 0, 0))):
        mask = Image.new("L", (8, 8))
        mask.paste(255, box)
        mask.save(tmp_path / f"{name}.png")
    top, bottom = (json.loads(run(*question, "--mask", tmp_path / f"{n}.png").stdout) for n in ("top", "bottom"))
    assert top["settings"]["mask"] == "top.png"
    assert [m["score"] for m in top["proponents"]] != [m["score"] for m in bottom["proponents"]]
    assert_one_line(run(*question, "--mask", tmp_path / "black.png"), 2, "`mask` must be white")
    assert_one_line(run(*question, "--mask", tmp_path / "none.png"), 1, "`mask` must be an image file", "none.png")


def test_inspect_shows_what_influences_itself_most(tiny_index: Path) -> None:
    found = json.loads(run("inspect", tiny_index, "--top", "self", "--num", 3, "--json").output)
    assert [sorted(example) for example in found] == [["id", "key", "label", "score"]] * 3
    assert found[0]["score"] > found[1]["score"] > found[2]["score"] > 0
    assert len(json.loads(run("inspect", tiny_index, "--top", "self", "--json").output)) == 10
    shown = run("inspect", tiny_index, "--top", "self", "--num", 3).output
    rows = [line.split() for line in shown.splitlines() if line.strip()[:1].isdigit()]
    assert [(row[2], row[3], row[4]) for row in rows] == [(str(x["id"]), x["key"], x["label"]) for x in found]
    assert_one_line(run("inspect", tiny_index, "--num", 3), 2, "--num", "--top self")
    assert_one_line(run("inspect", tiny_index, "--top", "self", "--num", 0), 2, "`num` must be", "got 0")


def answer_ids(text: str) -> list[int]:
    return [int(row["id"]) for row in csv.DictReader(io.StringIO(text))]


def test_index_chooses_the_score_of_later_queries(tmp_path: Path, tiny_index: Path, digits_folder: Path) -> None:
    shutil.copytree(tiny_index, tmp_path / "index")
    assert run("index", tmp_path / "index", "--score", "cosine").exit_code == 0
    answer = run("query", tmp_path / "index", "--image", digits_folder / "1" / "001.png", "--label", 1, "--json")
    assert json.loads(answer.output)["settings"]["score"] == "cosine"


def test_a_config_file_stands_for_flags_and_flags_come_first(
    tmp_path: Path, dit_folder: Path, digits_folder: Path
) -> None:
    lines = [f"{name}: {value}" for name, value in SETTINGS.items()]
    lines += [f"teacher: {dit_folder}", f"dataset: {digits_folder}", f"output: {tmp_path / 'index'}"]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    done = run("featurize", "--config", tmp_path / "config.yaml", "--num-draws", 2)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "index" / "manifest.json").read_text())["config"]["num_draws"] == 2


def test_there_is_a_flag_for_every_setting() -> None:
    text = run("featurize", "--help").output
    for name in setting_names():
        assert f"--{name.replace('_', '-')}" in text


def test_skip_bad_says_how_many(tmp_path: Path, featurize: Callable[..., Result], digits_folder: Path) -> None:
    shutil.copytree(digits_folder, tmp_path / "digits")
    (tmp_path / "digits" / "1" / "note.png").write_text("hello")
    done = featurize(tmp_path / "digits", "--skip-bad")
    assert done.output == f"20 examples in {tmp_path / 'index'}, 1 skipped\n"


# What bad input gets: one line that says what is wrong and what to do.


def test_missing_dataset_path(featurize: Callable[..., Result], tmp_path: Path) -> None:
    assert_one_line(featurize(tmp_path / "nowhere"), 1, "nowhere", "give a folder of images")


def test_missing_teacher_path(tmp_path: Path, digits_folder: Path) -> None:
    result = run(
        "featurize", "--teacher", "/no/such/teacher", "--dataset", digits_folder, "--output", tmp_path / "index"
    )
    assert_one_line(result, 1, "/no/such/teacher", "give the folder of a diffusers pipeline or a hub id")


def test_missing_flag() -> None:
    assert_one_line(run("featurize", "--teacher", "demo"), 2, "missing --dataset")


def test_empty_folder(featurize: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_one_line(featurize(tmp_path / "empty"), 1, "must hold images", "has none")


def add_and_featurize(
    featurize: Callable[..., Result], digits_folder: Path, tmp_path: Path, name: str, content: bytes
) -> Result:
    folder = tmp_path / "digits"
    shutil.copytree(digits_folder, folder)
    (folder / "2" / name).write_bytes(content)
    result = featurize(folder)
    assert [p for p in (tmp_path / "index").rglob("*.tmp")] == []
    return result


def test_text_file_named_png(featurize: Callable[..., Result], digits_folder: Path, tmp_path: Path) -> None:
    result = add_and_featurize(featurize, digits_folder, tmp_path, "note.png", b"hello")
    assert_one_line(result, 1, "2/note.png", "not")


def jpeg(mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert(mode).save(file, "JPEG")
    return file.getvalue()


def test_truncated_jpeg(featurize: Callable[..., Result], digits_folder: Path, tmp_path: Path) -> None:
    assert_one_line(
        add_and_featurize(featurize, digits_folder, tmp_path, "cut.jpg", jpeg()[:-200]), 1, "2/cut.jpg", "truncated"
    )


def test_a_png_of_20000_by_20000_pixels(featurize: Callable[..., Result], digits_folder: Path, tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    packer = zlib.compressobj()
    rows = b"".join(packer.compress(bytes(20_001)) for _ in range(20_000)) + packer.flush()
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    assert_one_line(add_and_featurize(featurize, digits_folder, tmp_path, "huge.png", bomb), 1, "2/huge.png", "pixels")


def test_a_cmyk_jpeg_is_converted(featurize: Callable[..., Result], digits_folder: Path, tmp_path: Path) -> None:
    result = add_and_featurize(featurize, digits_folder, tmp_path, "print.jpg", jpeg("CMYK"))
    assert result.output == f"21 examples in {tmp_path / 'index'}\n"


def test_parquet_without_an_image_column(featurize: Callable[..., Result], tmp_path: Path) -> None:
    pq.write_table(pa.table({"number": [1, 2], "text": ["a", "b"]}), tmp_path / "data.parquet")
    assert_one_line(featurize(tmp_path / "data.parquet"), 1, "column of images", "number (integer)", "text (text)")


def test_label_out_of_range(tiny_index: Path, digits_folder: Path) -> None:
    result = run("query", tiny_index, "--image", digits_folder / "1" / "001.png", "--label", 10)
    assert_one_line(result, 2, "`label` must be a whole number from 0 to 2, got 10")


def test_the_folder_of_a_report_is_looked_at_before_the_work(tiny_index: Path, tmp_path: Path) -> None:
    result = run("query", tiny_index, "--image", tmp_path / "none.png", "--report", tmp_path / "none" / "report.html")
    assert_one_line(result, 2, "--report", "the folder of ", "report.html does not exist; make it")


def test_prompt_for_an_unconditional_teacher(tmp_path: Path, ddpm_folder: Path, digits_folder: Path) -> None:
    made = run(
        "featurize", "--teacher", ddpm_folder, "--dataset", digits_folder, "--output", tmp_path / "index", *FLAGS
    )
    assert made.exit_code == 0, made.output
    result = run("query", tmp_path / "index", "--image", digits_folder / "1" / "001.png", "--prompt", "a one")
    assert_one_line(result, 2, "`prompt` was given, but this teacher is unconditional; leave it out")


def test_index_made_by_another_teacher(tiny_index: Path, digits_folder: Path, ddpm_folder: Path) -> None:
    result = run("query", tiny_index, "--image", digits_folder / "1" / "001.png", "--teacher", ddpm_folder)
    assert_one_line(result, 1, "the index was made by another teacher", "fingerprints differ")


def test_wrong_config_key(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("teacher: demo\ndataset: digits\noutput: x\nnum_drawz: 3\n")
    assert_one_line(
        run("featurize", "--config", tmp_path / "config.yaml"), 2, "unknown setting 'num_drawz'", "num_draws"
    )


def test_unwritable_output(tmp_path: Path, dit_folder: Path, digits_folder: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run_featurize(dit_folder, digits_folder, tmp_path / "file" / "index")
    assert_one_line(result, 1, "`output`", "cannot be written: Not a directory; choose another folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_output(tmp_path: Path, dit_folder: Path, digits_folder: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    result = run_featurize(dit_folder, digits_folder, tmp_path / "locked" / "index")
    assert_one_line(result, 1, "`output`", "cannot be written: Permission denied")


def test_top_k_zero(tiny_index: Path, digits_folder: Path) -> None:
    result = run("query", tiny_index, "--image", digits_folder / "1" / "001.png", "--label", 1, "--top-k", 0)
    assert_one_line(result, 2, "`top_k` must be a whole number of at least 1, got 0")


def test_an_interrupt_says_that_nothing_is_lost(
    featurize: Callable[..., Result], digits_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("carv_attrib.pipeline.featurize", interrupt)
    assert_one_line(featurize(digits_folder), 1, "finished parts are kept, and the same command goes on from there")


def test_sigterm_is_answered_as_an_interrupt_is(
    featurize: Callable[..., Result], digits_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminated(*arguments: object, **settings: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("carv_attrib.pipeline.featurize", terminated)
    assert_one_line(featurize(digits_folder), 1, "finished parts are kept, and the same command goes on from there")
    assert signal.getsignal(signal.SIGTERM) == before


def test_json_and_csv_together(tiny_index: Path, digits_folder: Path) -> None:
    result = run("query", tiny_index, "--image", digits_folder / "1" / "001.png", "--json", "--csv")
    assert_one_line(result, 2, "--json and --csv exclude each other")
    result = run("query", tiny_index, "--image", digits_folder / "1" / "001.png", "--group-by", "label", "--csv")
    assert_one_line(result, 2, "--csv has no room for groups; give --json with --group-by")


def test_a_folder_that_is_no_index(tmp_path: Path) -> None:
    for command in ("inspect", "verify", "index"):
        assert_one_line(run(command, tmp_path), 1, "is not an index", "carv-attrib featurize")


def test_verify_names_every_problem(tmp_path: Path, tiny_index: Path) -> None:
    shutil.copytree(tiny_index, tmp_path / "index")
    (tmp_path / "index" / "features" / "part-000001.safetensors").write_bytes(b"")
    (tmp_path / "index" / "kernel.safetensors").unlink()
    result = run("verify", tmp_path / "index")
    assert result.exit_code == 1
    assert "part-000001.safetensors is damaged" in result.stderr
    assert "kernel.safetensors is missing; run `carv-attrib index" in result.stderr
