"""Arguments and flags that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from carv_attrib.kernel import KernelKind, ScoreKind

Command = TypeVar("Command", bound=Callable[..., Any])
INDEX = click.argument("index", type=click.Path(path_type=Path))


class NewFile(click.Path):
    """A file to write when all is done, whose folder must be there at the start."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path.

        Raises:
            click.BadParameter: if nothing can be written there.
        """
        path = Path(value)
        if not path.absolute().parent.is_dir():
            self.fail(f"the folder of {path} does not exist; make it, or choose another.", param, ctx)
        return super().convert(value, param, ctx)


def score_options(score: str, kernel: str, damping: str) -> Callable[[Command], Command]:
    """Return a decorator that adds the flags that choose a score, with these defaults in their help."""

    def add(command: Command) -> Command:
        text = f"Over the mean eigenvalue, or auto. [default: {damping}]"
        command = click.option("--damping", type=_damping, metavar="FLOAT|auto", help=text)(command)
        command = click.option("--kernel", type=click.Choice(get_args(KernelKind)), help=f"[default: {kernel}]")(
            command
        )
        return click.option("--score", type=click.Choice(get_args(ScoreKind)), help=f"[default: {score}]")(command)

    return add


def _damping(text: str) -> float | str:
    """Return a number where `text` is one; words are for the score to check."""
    try:
        return float(text)
    except ValueError:
        return text


AS_INDEXED = score_options(*["as the index was built"] * 3)
