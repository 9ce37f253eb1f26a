"""Measured figures, in groups, as a table for a terminal and as bars in a picture."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from carv_attrib.report.formatting import format_error, format_number, visible
from carv_attrib.report.plot import new_figure, save_figure
from carv_attrib.variance import Measured

if TYPE_CHECKING:
    import matplotlib.axes
    import rich.table

_MAX_COLUMNS = 4  # of figures with errors that 80 characters have room for

Measures = dict[str, dict[str, Measured]]
"""Figures by name, in groups that have the same names."""


def three_decimals(figure: Measured) -> str:
    """Return a correlation or a share with its error.

    >>> three_decimals(Measured(0.98, 0.0123))
    '0.980 ± 0.012'
    """
    return f"{figure.value:.3f} ± {figure.standard_error:.3f}"


def significant_digits(figure: Measured) -> str:
    """Return a figure of any size with its error.

    >>> significant_digits(Measured(0.00123, 0.0001))
    '0.00123 ± 0.00010'
    """
    return f"{format_number(figure.value)} {format_error(figure.standard_error)}"


def measures_table(
    measures: Mapping[str, Mapping[str, Measured]],
    *,
    corner: str,
    title: str,
    text: Callable[[Measured], str] = three_decimals,
) -> rich.table.Table:
    """Return a row for each group and a column for each name, or the other way round where names are many.

    Args:
        measures: the figures.
        corner: what the groups are.
        title: of the table.
        text: how a figure is written.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(visible(title)))
    rows = measures
    if len(_names(measures)) > max(_MAX_COLUMNS, len(measures)):
        rows = {name: {group: row[name] for group, row in measures.items()} for name in _names(measures)}
    for name in (corner, *_names(rows)):
        table.add_column(Text(visible(name)))
    for name, row in rows.items():
        table.add_row(Text(visible(name)), *map(text, row.values()))
    return table


def save_bars(
    measures: Mapping[str, Mapping[str, Measured]],
    path: str | Path,
    *,
    corner: str,
    label: str,
    lines: Collection[str] = (),
) -> None:
    """Draw the figures with their standard errors to a file.

    Args:
        measures: the figures.
        path: of a .png, .pdf or .svg file.
        corner: what the groups are.
        label: of the vertical axis.
        lines: names, such as a ceiling, that are drawn as a line over their group where they are there.

    Raises:
        CarvError: without matplotlib, or if the file cannot be written.
    """
    num_bars = len(measures) * len(_names(measures))
    figure = new_figure(max(4.8, 2.5 + 0.5 * num_bars), 3.6)
    axes = figure.subplots()
    draw_bars(axes, measures, lines)
    axes.set(xlabel=corner, ylabel=label)
    save_figure(figure, path)


def draw_bars(
    axes: matplotlib.axes.Axes, measures: Mapping[str, Mapping[str, Measured]], lines: Collection[str] = ()
) -> None:
    """Draw a cluster of bars for each group, and lines over them."""
    names = [name for name in _names(measures) if name not in lines]
    lines = [name for name in _names(measures) if name in lines]
    centres, width = np.arange(len(measures)), 0.8 / max(1, len(names))
    axes.axhline(0, color="black", linewidth=0.8)
    for number, name in enumerate(names):
        values, errors = _columns(measures, name)
        places = centres + (number - (len(names) - 1) / 2) * width
        axes.bar(places, values, 0.9 * width, yerr=errors, capsize=3, color=f"C{number}", label=_plain(name))
    for name in lines:
        values, errors = _columns(measures, name)
        axes.hlines(values, centres - 0.45, centres + 0.45, colors="black", linestyles="dashed", label=_plain(name))
        axes.errorbar(centres, values, errors, fmt="none", ecolor="black", capsize=3)
    axes.set_xticks(centres, [_plain(group) for group in measures])
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _names(measures: Mapping[str, Mapping[str, Measured]]) -> list[str]:
    return list(next(iter(measures.values())))


def _columns(measures: Mapping[str, Mapping[str, Measured]], name: str) -> tuple[list[float], list[float]]:
    """Return the values and the errors of a figure in all groups."""
    own = [row[name] for row in measures.values()]
    return [figure.value for figure in own], [figure.standard_error for figure in own]


def _plain(text: str) -> str:
    """Return a text in which matplotlib finds no formula."""
    return visible(text).replace("$", r"\$")
