"""Pictures in a file, by matplotlib, which is optional."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from carv_attrib.errors import CarvError

if TYPE_CHECKING:
    import matplotlib.figure


def new_figure(width: int | float, height: int | float) -> matplotlib.figure.Figure:
    """Return an empty figure of a size in inches.

    Raises:
        CarvError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as err:
        raise CarvError("`plot` needs matplotlib, which is not installed; `pip install 'carv-attrib[plot]'`.") from err
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: matplotlib.figure.Figure, path: str | Path) -> None:
    """Write a figure to a file of a kind that its name tells.

    Raises:
        CarvError: if the file cannot be written.
    """
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as err:
        raise CarvError(f"`plot` cannot be written to {path}: {err}; name a .png, .pdf or .svg file.") from err
