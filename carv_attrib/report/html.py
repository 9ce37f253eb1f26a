"""One self-contained web page: no script, no request, every picture inside."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from carv_attrib.errors import ArgumentError, CarvError
from carv_attrib.files import atomic_file
from carv_attrib.report.formatting import format_error, format_number, format_share, format_value, is_known, visible
from carv_attrib.report.result import GroupScore, Match, QueryResult

if TYPE_CHECKING:
    import jinja2

_TITLE = "Training data attribution"
_HELPS = "Keeping these in training lowers the loss on the query."
_HINDERS = "Keeping these in training raises the loss on the query."
_MAX_GROUPS = 100
_PIXEL_ART = 64  # pixels; smaller pictures are enlarged without smoothing


def render_html(results: Sequence[QueryResult], *, title: str = _TITLE) -> str:
    """Return one page with a section a query.

    Args:
        results: The answers, in the order of the page.
        title: Heading of the page.

    Raises:
        ArgumentError: There is no result, or a thumbnail is not a PNG or JPEG picture.
    """
    if not results:
        raise ArgumentError("`results` must hold at least one answer, got none; query an image first.")
    return _template().render(title=title, sections=[_section(result) for result in results])


def write_html(results: Sequence[QueryResult], path: str | Path, *, title: str = _TITLE) -> None:
    """Write `render_html` to `path`, which appears whole or not at all.

    Args:
        results: The answers, in the order of the page.
        path: File to write.
        title: Heading of the page.

    Raises:
        CarvError: The file cannot be written.
    """
    page = render_html(results, title=title)
    try:
        with atomic_file(Path(path)) as temporary:
            temporary.write_text(page, encoding="utf-8", newline="\n")
    except OSError as err:
        got = f"{visible(str(path))} ({err.strerror or err})"
        raise CarvError(f"`path` must be a file that can be written, got {got}; choose another path.") from err


@functools.cache
def _template() -> jinja2.Template:
    """Return the page's template; every value that it prints is made visible first, and then escaped."""
    import jinja2

    source = resources.files(__package__).joinpath("template.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, finalize=_finalize, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


def _finalize(value: object) -> object:
    from markupsafe import Markup

    return value if isinstance(value, Markup) else visible(str(value))


@dataclass(frozen=True)
class _Picture:
    """A picture as a data URI; sizes in pixels."""

    uri: str
    width: int
    height: int

    @property
    def is_tiny(self) -> bool:
        return max(self.width, self.height) < _PIXEL_ART


@dataclass(frozen=True)
class _Axis:
    """A stretch of the score axis that the bars of a group are drawn on; it always holds zero."""

    low: float
    high: float

    def percent(self, value: float) -> str:
        """Return the place of `value`, between 1 % and 99 % of the width."""
        return f"{1 + 98 * (value - self.low) / (self.high - self.low):.2f}%"

    def percent_width(self, value: float) -> str:
        """Return the length of `value`, without its sign."""
        return f"{98 * abs(value) / (self.high - self.low):.2f}%"


@dataclass(frozen=True)
class _Bar:
    """The bar of one score and the whisker of its interval, all in per cent of the width."""

    zero: str
    start: str
    width: str
    whisker: tuple[str, str] | None


@dataclass(frozen=True)
class _Card:
    """What the template shows of one match."""

    rank: int
    match: Match
    picture: _Picture
    score: str
    error: str
    bar: _Bar | None
    may_be_zero: bool
    probability: str
    bands: tuple[_Bar, ...]


@dataclass(frozen=True)
class _Group:
    """Proponents or opponents."""

    name: str
    side: str  # "helps" or "hinders"; the page colours by it
    meaning: str
    cards: tuple[_Card, ...]


@dataclass(frozen=True)
class _Section:
    """What the template shows of one answer."""

    query: str
    condition: str
    picture: _Picture
    certainty: str
    warning: str
    groups: tuple[_Group, ...]
    tables: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


def _section(result: QueryResult) -> _Section:
    proponent_axis, opponent_axis = _axes(result)
    groups = [_Group("Proponents", "helps", _HELPS, _cards(result.proponents, proponent_axis))]
    if result.opponents:
        groups.append(_Group("Opponents", "hinders", _HINDERS, _cards(result.opponents, opponent_axis)))
    return _Section(
        query=result.query,
        condition=result.condition,
        picture=_picture(result.thumbnail, f"query {result.query}"),
        certainty=_certainty(result.proponents),
        warning=result.warning,
        groups=tuple(groups),
        tables=(
            ("Groups", tuple((group.title, _group(group)) for group in result.groups[:_MAX_GROUPS])),
            ("Settings", _table(result.settings)),
            ("Cost", _table(result.cost)),
        ),
    )


def _table(values: Mapping[str, str | int | float]) -> tuple[tuple[str, str], ...]:
    return tuple((name, format_value(value)) for name, value in values.items())


def _group(group: GroupScore) -> str:
    share = format_share(group.share, group.share_standard_error)
    score = f"{format_number(group.score)} {format_error(group.standard_error)}"
    return f"{share} of positive scores; sum {score} ({group.num_examples} examples)"


def _certainty(matches: tuple[Match, ...]) -> str:
    """Return one sentence on how many matches stand clear of zero."""
    intervals = [interval for match in matches if (interval := _interval(match))]
    if not matches:
        return "No proponents were asked for or found."
    if not intervals:
        return "No standard errors are available for this answer."
    clear = sum(low > 0 for low, _ in intervals)
    return f"The 90 % intervals of {clear} of {len(intervals)} proponents lie above zero."


def _interval(match: Match) -> tuple[float, float] | None:
    return (match.low, match.high) if is_known(match.low) and is_known(match.high) else None


def _axes(result: QueryResult) -> tuple[_Axis | None, _Axis | None]:
    """Return the axes of proponents and opponents: one scale, zero on the left and on the right."""
    low, high = _range(result.proponents)
    opponent_low, opponent_high = _range(result.opponents)
    span = max(high - low, opponent_high - opponent_low)
    if span == 0:
        return None, None
    return _Axis(low, low + span), _Axis(opponent_high - span, opponent_high)


def _range(matches: tuple[Match, ...]) -> tuple[float, float]:
    """Return the ends of the shortest stretch that holds zero, the scores and their intervals."""
    ends = [0.0, *(match.score for match in matches if is_known(match.score))]
    ends += [end for match in matches for end in _interval(match) or ()]
    return min(ends), max(ends)


def _cards(matches: tuple[Match, ...], axis: _Axis | None) -> tuple[_Card, ...]:
    return tuple(_card(rank, match, axis) for rank, match in enumerate(matches, 1))


def _card(rank: int, match: Match, axis: _Axis | None) -> _Card:
    interval = _interval(match)
    return _Card(
        rank=rank,
        match=match,
        picture=_picture(match.thumbnail, f"example {match.id}"),
        score=format_number(match.score).replace("-", "\N{MINUS SIGN}"),
        error=format_error(match.standard_error).replace("-", "\N{MINUS SIGN}"),
        bar=_bar(match, axis) if axis and is_known(match.score) else None,
        may_be_zero=interval is not None and interval[0] <= 0 <= interval[1],
        bands=_band_bars(match.bands),
        probability=f"{match.top_probability:.0%}" if is_known(match.top_probability) else "",
    )


def _bar(match: Match, axis: _Axis) -> _Bar:
    interval = _interval(match)
    return _Bar(
        zero=axis.percent(0.0),
        start=axis.percent(min(match.score, 0.0)),
        width=axis.percent_width(match.score),
        whisker=(axis.percent(interval[0]), axis.percent(interval[1])) if interval else None,
    )


def _band_bars(bands: tuple[float, ...]) -> tuple[_Bar, ...]:
    """Return one bar for each band of timesteps, on a scale of their own that holds zero; none for a single band."""
    low, high = min(0.0, *bands, 0.0), max(0.0, *bands, 0.0)
    if len(bands) < 2 or low == high or not all(is_known(score) for score in bands):
        return ()
    axis = _Axis(low, high)
    return tuple(
        _Bar(axis.percent(0.0), axis.percent(min(score, 0.0)), axis.percent_width(score), None) for score in bands
    )


def _picture(thumbnail: bytes, owner: str) -> _Picture:
    """Return the picture as a data URI; its kind is told by its first bytes, its size by its header."""
    try:
        with Image.open(io.BytesIO(thumbnail), formats=("PNG", "JPEG")) as image:
            mime, (width, height) = Image.MIME[image.format or ""], image.size
    except (UnidentifiedImageError, Image.DecompressionBombError) as err:
        raise ArgumentError(
            f"`thumbnail` of {visible(owner)} must be PNG or JPEG bytes, got {thumbnail[:8]!r}...; encode it as PNG."
        ) from err
    return _Picture(f"data:{mime};base64,{base64.b64encode(thumbnail).decode('ascii')}", width, height)
