"""The answer to one query as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from carv_attrib.report.formatting import format_error, format_number, format_share, format_value, is_known, visible
from carv_attrib.report.result import GroupScore, Match, QueryResult

if TYPE_CHECKING:
    import rich.console
    import rich.table
    import rich.text

_MAX_GROUPS = 20  # of those with the largest sums; JSON has all of them
_MAX_CELLS = 80  # characters of a key or caption; the page and the data frame have all of it


def result_table(result: QueryResult) -> rich.console.Group:
    """Return a heading, the proponents, the opponents if any, and a line each of settings and cost.

    Names and captions are plain text here: neither rich markup nor escape sequences in them take effect.

    Args:
        result: The answer to show, with `rich.console.Console().print`.
    """
    from rich.console import Group
    from rich.text import Text

    tables = [_table("Proponents", result.proponents, "cyan")]
    if result.opponents:
        tables.append(_table("Opponents", result.opponents, "yellow"))
    facts = [_facts(values) for values in (result.settings, result.cost) if values]
    if result.groups:
        tables.append(_group_table(result.groups))
    warning = [Text(result.warning, "bold red")] if result.warning else []
    return Group(_heading(result), *tables, *warning, *facts)


def _heading(result: QueryResult) -> rich.text.Text:
    from rich.text import Text

    condition = f"  {visible(result.condition)}" if result.condition else ""
    return Text.assemble((visible(result.query), "bold"), (condition, "dim"))


def _facts(values: Mapping[str, str | int | float]) -> rich.text.Text:
    from rich.text import Text

    return Text(visible("  ".join(f"{name}={format_value(value)}" for name, value in values.items())), "dim")


def _table(role: str, matches: tuple[Match, ...], colour: str) -> rich.table.Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(role, f"bold {colour}"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("#", justify="right", style="dim", no_wrap=True)
    table.add_column("score ± SE", no_wrap=True)
    table.add_column(f"P(top {len(matches)})", justify="right", no_wrap=True)
    table.add_column("id", justify="right", no_wrap=True)
    for name in _text_columns(matches):
        table.add_column(name, overflow="fold")
    for rank, (match, score) in enumerate(zip(matches, _scores(matches), strict=True), 1):
        texts = [_shortened(getattr(match, name) or "") for name in _text_columns(matches)]
        table.add_row(str(rank), score, _probability(match), str(match.id), *texts)
    return table


def _group_table(groups: tuple[GroupScore, ...]) -> rich.table.Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text("Groups", "bold"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("share ± SE", "sum of scores ± SE", "examples", "group"):
        table.add_column(name, overflow="fold")
    for group in groups[:_MAX_GROUPS]:
        score = f"{format_number(group.score)} {format_error(group.standard_error)}"
        table.add_row(
            format_share(group.share, group.share_standard_error),
            score,
            str(group.num_examples),
            _shortened(group.title),
        )
    return table


def _text_columns(matches: tuple[Match, ...]) -> list[str]:
    """Return the key, and the label and caption where a match has one."""
    return ["key", *(name for name in ("label", "caption") if any(getattr(match, name) for match in matches))]


def _scores(matches: tuple[Match, ...]) -> list[str]:
    """Return scores with their standard errors, aligned at the ±."""
    scores = [format_number(match.score) for match in matches]
    width = max(map(len, scores), default=0)
    errors = [format_error(match.standard_error) for match in matches]
    return [f"{score:>{width}} {error}" for score, error in zip(scores, errors, strict=True)]


def _probability(match: Match) -> str:
    return f"{match.top_probability:.2f}" if is_known(match.top_probability) else "n/a"


def _shortened(text: str) -> rich.text.Text:
    from rich.text import Text

    shortened = Text(visible(text))
    shortened.truncate(_MAX_CELLS, overflow="ellipsis")
    return shortened
