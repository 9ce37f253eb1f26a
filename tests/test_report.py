"""Reports: nothing is lost or invented on the way out, and nothing in a caption can act."""

import base64
import csv
import dataclasses
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import carv_attrib
from carv_attrib.errors import ArgumentError, CarvError
from carv_attrib.report import GroupScore, Match, QueryResult, render_html, result_table, write_html
from carv_attrib.report.formatting import format_error, format_number, visible
from carv_attrib.report.measures import measures_table
from carv_attrib.variance import Measured

MISSED = {"target_se": 0.08, "draws_taken": 64}
COLUMNS = "rank role id key score standard_error projection_error low high top_probability label caption".split()

MARKUP = """</script><script>alert(1)</script><img src=http://evil.test/x.png onerror="x"> '[bold red]hi[/]"""
HOSTILE = f"{MARKUP} \x1b[2J\x07\u202egnp"
NEUTRAL = rf"{MARKUP} \x1b[2J\x07\u202egnp"


def picture(size: int = 32, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("L", (size, size), 128).save(stream, kind)
    return stream.getvalue()


def match(id: int = 7, score: float = 0.8416, standard_error: float | None = 0.0512, **fields: object) -> Match:
    known = standard_error is not None
    values = {
        "projection_error": 0.0 if known else None,
        "low": score - 2 * standard_error if standard_error is not None else None,
        "high": score + 2 * standard_error if standard_error is not None else None,
        "top_probability": 0.95 if known else None,
        "key": f"train/{id:05d}.png",
        "label": "3",
        "caption": "a three",
        "thumbnail": picture(),
    } | fields
    return Match(id=id, score=score, standard_error=standard_error, **values)  # type: ignore[arg-type]


def result(**fields: object) -> QueryResult:
    values = {
        "query": "sample.png",
        "condition": "label 3",
        "thumbnail": picture(),
        "proponents": (match(7), match(9, 0.25, None)),
        "opponents": (match(4, -0.5, 0.1),),
        "settings": {"kernel": "bands", "damping": 0.1},
        "cost": {"network_evaluations": 8, "seconds": 0.25},
    }
    return QueryResult(**values | fields)  # type: ignore[arg-type]


def group(name: str = "Ada", share: float | None = 0.123, error: float | None = 0.0245) -> GroupScore:
    known = error is not None
    ends = (0.0, 0.2) if known else (None, None)
    return GroupScore(name, 12, 4.5, 0.5 if known else None, *ends, share, error, *ends)


def hostile() -> QueryResult:
    bad = match(key=HOSTILE, label=HOSTILE, caption=HOSTILE)
    return result(
        query=HOSTILE, condition=HOSTILE, proponents=(bad,), settings={HOSTILE: HOSTILE}, groups=(group(HOSTILE),)
    )


def spread(projection_error: float = 0.0, **fields: object) -> QueryResult:
    second = match(9, 0.25, 0.2, top_probability=0.7, projection_error=projection_error)
    return result(proponents=(match(top_probability=0.5), second), **fields)


def terminal_text(answer: QueryResult, width: int = 200) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(result_table(answer))
    return console.file.getvalue()  # type: ignore[attr-defined]


class Page(HTMLParser):
    """The elements, the attributes and the text of a page, as a browser would see them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


# Answers


def test_arrays_are_those_of_the_proponents() -> None:
    answer = result()
    assert answer.ids.dtype == np.int64
    assert answer.ids.tolist() == [7, 9]
    np.testing.assert_array_equal(answer.scores, np.array([0.8416, 0.25]))
    np.testing.assert_array_equal(answer.standard_errors, np.array([0.0512, np.nan]))


@pytest.mark.parametrize(
    ("answer", "warning"),
    [
        (result(settings={"target_se": 0.1}), ""),
        (
            spread(),
            "The errors leave the ranking open: of these 2, 1.2 are expected to be among the true first 2. "
            "More draws tell: refine the query, or featurize with more.",
        ),
        (
            spread(projection_error=0.15),
            "Most of the error is from the random projection: featurize with a larger `proj_dim`, and `rank`.",
        ),
        (
            result(settings={"target_se": 0.05, "draws_taken": 64}),  # an opponent's
            "A standard error is 0.1, above the 0.05 that was aimed at; it takes `max_draws` of about 256.",
        ),
        (
            spread(settings={"target_se": 0.1, "draws_taken": 64}),
            "More draws tell: allow more `max_draws`. A standard error is 0.2, above the 0.1 that was aimed at; it",
        ),
        (
            result(proponents=(match(standard_error=0.1, projection_error=0.06),), settings=MISSED),
            "A standard error is 0.1, above the 0.08 that was aimed at; it takes `max_draws` of about 147.",
        ),
        (  # the one that draws cannot help is another than that with the largest error
            result(
                proponents=(match(standard_error=0.1), match(1, 0.3, 0.095, projection_error=0.09)), settings=MISSED
            ),
            "A standard error is 0.1, above the 0.08 that was aimed at; the random projection alone makes 0.09",
        ),
        (
            result(proponents=(match(standard_error=0.1, projection_error=0.09),), settings=MISSED),
            "aimed at; the random projection alone makes 0.09, however many draws: featurize with a larger",
        ),
    ],
)
def test_what_the_errors_leave_open_is_said(answer: QueryResult, warning: str) -> None:
    assert warning in answer.warning
    assert bool(warning) == bool(answer.warning)
    assert warning in " ".join(terminal_text(answer).split())


def test_arrays_of_no_proponents_keep_their_types() -> None:
    empty = result(proponents=())
    assert (empty.ids.dtype, empty.scores.dtype, empty.standard_errors.dtype) == (np.int64, np.float64, np.float64)


def test_dict_round_trips_through_json() -> None:
    loaded = json.loads(json.dumps(result().to_dict(), allow_nan=False))
    assert loaded == result().to_dict()
    assert loaded["proponents"][1] == {
        "rank": 2,
        "id": 9,
        "key": "train/00009.png",
        "score": 0.25,
        "standard_error": None,
        "projection_error": None,
        "low": None,
        "high": None,
        "top_probability": None,
        "label": "3",
        "caption": "a three",
        "bands": [],
    }
    assert loaded["settings"] == {"kernel": "bands", "damping": 0.1}
    assert loaded["cost"] == {"network_evaluations": 8, "seconds": 0.25}


def test_dict_writes_nan_as_null() -> None:
    answer = result(proponents=(match(1, float("nan"), float("inf")),), cost={"seconds": float("nan")})
    loaded = json.loads(json.dumps(answer.to_dict(), allow_nan=False))
    assert (loaded["proponents"][0]["score"], loaded["proponents"][0]["standard_error"]) == (None, None)
    assert loaded["cost"] == {"seconds": None}


def test_dict_takes_numpy_numbers() -> None:
    given = match()
    object.__setattr__(given, "id", np.int64(3))  # past the type hints, as a careless caller would
    object.__setattr__(given, "score", np.float32(0.5))
    loaded = json.loads(json.dumps(result(proponents=(given,)).to_dict()))
    assert (loaded["proponents"][0]["id"], loaded["proponents"][0]["score"]) == (3, 0.5)


@pytest.mark.parametrize("caption", ["two\nlines", "carriage\rreturn", 'say "red", then\r\n"blue"', HOSTILE, " , "])
def test_csv_round_trips(caption: str) -> None:
    rows = list(csv.DictReader(io.StringIO(result(proponents=(match(caption=caption),)).to_csv(), newline="")))
    assert [(row["role"], row["rank"], row["id"]) for row in rows] == [("proponent", "1", "7"), ("opponent", "1", "4")]
    assert rows[0]["caption"] == caption
    assert float(rows[0]["score"]) == 0.8416


def test_csv_leaves_missing_values_empty() -> None:
    rows = list(
        csv.DictReader(io.StringIO(result(proponents=(match(1, 0.5, None, caption=None),)).to_csv(), newline=""))
    )
    assert (rows[0]["standard_error"], rows[0]["caption"]) == ("", "")


def test_pandas_columns_and_types() -> None:
    frame = result().to_pandas()
    assert list(frame.columns) == (list(COLUMNS))
    assert frame["role"].tolist() == ["proponent", "proponent", "opponent"]
    assert frame["rank"].tolist() == [1, 2, 1]
    assert (frame["id"].dtype, frame["standard_error"].dtype) == (np.int64, np.float64)
    assert np.isnan(frame["standard_error"][1])


def test_pandas_frame_of_nothing_keeps_columns_and_types() -> None:
    frame = result(proponents=(), opponents=()).to_pandas()
    assert list(frame.columns) == list(result().to_pandas().columns)
    assert (frame["id"].dtype, frame["score"].dtype, frame["standard_error"].dtype) == (
        np.int64,
        np.float64,
        np.float64,
    )


def test_missing_pandas_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(
        CarvError, match=r"^`to_pandas` needs pandas, which is not installed; run `pip install pandas`\.$"
    ):
        result().to_pandas()


# Text and numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (0.84159, "0.842"),
        (-12.0, "-12.0"),
        (999.9, "1000"),
        (12345.6, "12300"),
        (2e7, "2.00e+07"),
        (1e-7, "1.00e-07"),
    ],
)
def test_numbers_have_three_significant_digits(value: float, text: str) -> None:
    assert format_number(value) == text


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_unknown_standard_errors_are_said_to_be_so(value: float | None) -> None:
    assert format_error(value) == "± n/a"


def test_hidden_characters_become_visible() -> None:
    assert (
        visible("a\x00b\x9bc\u202ed\u2066e\u200bf\ufeffg\ud800h") == r"a\x00b\x9bc\u202ed\u2066e\u200bf\ufeffg\ud800h"
    )


def test_joiners_of_scripts_and_emoji_stay() -> None:
    family = "\U0001f469\u200d\U0001f467 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 e\u0301"
    assert visible(family) == family


# The page


def test_page_has_a_strict_content_security_policy() -> None:
    metas = Page(render_html([result()])).all("meta")
    policy = next(meta["content"] for meta in metas if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


def test_page_asks_for_nothing_from_elsewhere() -> None:
    text = render_html([result(), result()])
    page = Page(text)
    assert not re.search(r"https?:|url\(|@import|<script|<iframe|<object", text)
    sources = [value for _, attributes in page.elements for name, value in attributes.items() if name == "src"]
    assert sources
    assert all(source is not None and source.startswith("data:image/") for source in sources)
    assert {link["href"] for link in page.all("link")} == {"data:,"}
    assert {link["href"] for link in page.all("a")} == {"#query-1", "#query-2"}


def test_hostile_text_adds_no_element_and_no_attribute() -> None:
    bad, good = (
        Page(render_html([hostile()], title=HOSTILE)),
        Page(
            render_html(
                [dataclasses.replace(hostile(), query="q", condition="c", proponents=(match(),), settings={"a": "b"})]
            )
        ),
    )
    assert [tag for tag, _ in bad.elements if tag != "wbr"] == [tag for tag, _ in good.elements if tag != "wbr"]
    assert {name for _, attributes in bad.elements for name in attributes} == {
        name for _, attributes in good.elements for name in attributes
    }


def test_hostile_text_is_shown_with_its_hidden_characters() -> None:
    text = render_html([hostile()], title=HOSTILE)
    assert not re.search("[\x00-\x09\x0b-\x1f\u202a-\u202e]", text)
    page = Page(text)
    assert page.all("summary")[0]["title"] == NEUTRAL
    assert page.text.count(NEUTRAL) >= 4


def test_lone_surrogates_can_be_written(tmp_path: Path) -> None:
    result(query="bad\udcffname.png").save_report(tmp_path / "report.html")
    assert r"bad\udcffname.png" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("kind", "mime"), [("PNG", "image/png"), ("JPEG", "image/jpeg")])
def test_pictures_are_inlined_whole(kind: str, mime: str) -> None:
    data = picture(80, kind)
    first = Page(render_html([result(thumbnail=data)])).all("img")[0]
    assert first["src"] == f"data:{mime};base64,{base64.b64encode(data).decode()}"
    assert (first["width"], first["height"]) == ("80", "80")


@pytest.mark.parametrize(("size", "is_tiny"), [(32, True), (63, True), (64, False), (256, False)])
def test_only_small_pictures_are_pixelated(size: int, is_tiny: bool) -> None:
    first = Page(render_html([result(thumbnail=picture(size))])).all("img")[0]
    assert (first.get("class") == "tiny") is is_tiny


def test_pictures_have_alternative_texts() -> None:
    images = Page(render_html([result()])).all("img")
    assert [image["alt"] for image in images][:2] == ["Query sample.png", "Training example train/00007.png"]


@pytest.mark.parametrize("data", [b"", b"<svg onload=alert(1)>", picture(8, "GIF"), b"\x89PNG\r\n\x1a\n"])
def test_a_thumbnail_of_another_kind_is_refused(data: bytes) -> None:
    with pytest.raises(
        ArgumentError, match=r"^`thumbnail` of example 7 must be PNG or JPEG bytes, got b'.*; encode it"
    ):
        render_html([result(proponents=(match(thumbnail=data),))])


def test_a_page_of_nothing_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"^`results` must hold at least one answer, got none"):
        render_html([])


def test_page_shows_scores_settings_and_cost() -> None:
    text = " ".join("".join(Page(render_html([result()])).text).split())
    for shown in (
        "0.842 ± 0.051",
        "0.250 ± n/a",
        "\N{MINUS SIGN}0.500 ± 0.10",
        "kernel",
        "draws",
        "network_evaluations",
    ):
        assert shown in text


def test_page_says_how_many_scores_are_clear_of_zero() -> None:
    answer = result(proponents=(match(1, 0.5, 0.1), match(2, 0.1, 0.1), match(3, -0.1, 0.1), match(4, 0.1, None)))
    text = render_html([answer])
    assert "1 of 3 proponents lie above zero" in text
    assert text.count("Not clear of zero") == 2


def test_bars_are_in_proportion_across_both_groups() -> None:
    answer = result(proponents=(match(1, 0.8, None), match(2, 0.4, None)), opponents=(match(3, -0.2, None),))
    bars = [(bar["x"], bar["width"]) for bar in Page(render_html([answer])).all("rect")]
    assert bars == [("1.00%", "98.00%"), ("1.00%", "49.00%"), ("74.50%", "24.50%")]


def test_whisker_reaches_the_interval() -> None:
    answer = result(proponents=(match(1, 0.0, 1.0),), opponents=())
    zero, whisker = Page(render_html([answer])).all("line")[:2]
    assert (whisker["x1"], zero["x1"], whisker["x2"]) == ("1.00%", "50.00%", "99.00%")


def test_scores_that_are_all_zero_or_unknown_have_no_bar() -> None:
    answer = result(proponents=(match(1, 0.0, None), match(2, float("nan"), None)), opponents=())
    assert Page(render_html([answer])).all("rect") == []


def test_one_answer_needs_no_navigation() -> None:
    assert Page(render_html([result()])).all("nav") == []


def test_no_opponents_no_section() -> None:
    assert "Opponents" not in render_html([result(opponents=())])


# Files


def test_report_is_written_without_leftovers(tmp_path: Path) -> None:
    result().save_report(str(tmp_path / "report.html"))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_html([result()])


def test_report_in_a_folder_of_all_is_not_writable_by_all(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    result().save_report(tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_mode & 0o777 == 0o664


def test_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CarvError, match=r"^`path` must be a file .*, got .*file/x\.html \(Not a directory\); choose [^\n]*$"
    ):
        result().save_report(tmp_path / "file" / "x.html")


def test_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CarvError, match=r"none/x\.html \(No such file or directory\); choose another path\.$"):
        result().save_report(tmp_path / "none" / "x.html")


def test_failed_write_leaves_the_old_report_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "report.html").write_text("old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CarvError, match=r"report\.html \(No space left on device\)"):
        write_html([result()], tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


# Terminal


def test_terminal_shows_scores_with_errors() -> None:
    text = terminal_text(result())
    for shown in (
        "sample.png",
        "label 3",
        "0.842 ± 0.051",
        "0.250 ± n/a",
        "-0.500 ± 0.10",
        "Opponents",
        "seconds=0.25",
    ):
        assert shown in text


def test_terminal_neutralises_escape_sequences() -> None:
    bad = "\x1b[2J\x07\u202egnp"
    text = terminal_text(
        result(query=bad, condition=bad, proponents=(match(key=bad, label=bad, caption=bad),), cost={bad: bad})
    )
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", text)
    assert text.count(r"\x1b[2J\x07\u202egnp") == 7


def test_terminal_leaves_markup_as_text() -> None:
    assert "[bold red]hi[/]" in terminal_text(result(query="[bold red]hi[/]", opponents=()))
    assert "[red]x[/]" in terminal_text(result(proponents=(match(key="[red]x[/]", caption=":smile: [/oops]"),)))


def test_terminal_fits_eighty_columns_with_long_captions() -> None:
    text = terminal_text(result(proponents=(match(caption="word " * 100),)), width=80)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "train/00007.png" in text


# Imports


def test_import_loads_no_renderer() -> None:
    code = (  # a bare parent package, so that only what the report itself imports is seen
        "import sys, types; package = types.ModuleType('carv_attrib'); package.__path__ = [sys.argv[1]]; "
        "sys.modules['carv_attrib'] = package; import carv_attrib.report; "
        "print(sorted({'pandas', 'jinja2', 'rich', 'torch'} & set(sys.modules)))"
    )
    folder = str(Path(carv_attrib.__file__).parent)
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_groups_are_shown_with_shares_and_errors() -> None:
    answer = result(groups=(group(), group("Bob", None, None), group("")))
    text = terminal_text(answer)
    assert [line.split() for line in text.splitlines() if " 4.50" in line] == [
        "12.3 % ± 2.5 % 4.50 ± 0.50 12 Ada".split(),
        "n/a 4.50 ± n/a 12 Bob".split(),
        "12.3 % ± 2.5 % 4.50 ± 0.50 12 (none)".split(),
    ]
    page = render_html([answer])
    assert page.count("12.3 % ± 2.5 % of positive scores; sum 4.50 ± 0.50 (12 examples)") == 2
    both = render_html([result(groups=(group(""), group("(none)")))])
    assert (page.count("(none)"), both.count("(none)")) == (1, 2)
    shares = [row["share"] for row in answer.to_dict()["groups"]]
    assert shares == [0.123, None, 0.123]


def test_many_figures_are_rows_so_that_none_is_cut_in_a_narrow_terminal() -> None:
    measures = {group: {f"method {i}": Measured(i + 0.125, 0.25) for i in range(6)} for group in ("1 %", "10 %")}
    for names, lines in ((6, "method 5|5.125 ± 0.250|5.125 ± 0.250"), (3, "10 %|0.125 ± 0.250|1.125 ± 0.250")):
        few = {group: dict(list(row.items())[:names]) for group, row in measures.items()}
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(measures_table(few, corner="removed", title=""))
        rows = [line.split("│")[1:-1] for line in console.export_text().splitlines()]
        shown = ["|".join(cell.strip() for cell in row) for row in rows]
        assert any(line.startswith(lines) for line in shown)
