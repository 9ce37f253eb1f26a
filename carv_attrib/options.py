"""Arguments and flags that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from carv_attrib.kernel import KernelKind, ScoreKind

Command = TypeVar("Command", bound=Callable[..., Any])
INDEX = click.argument("index", type=click.Path(path_type=Path))


def score_options(score: str, kernel: str, damping: str) -> Callable[[Command], Command]:
    """Return a decorator that adds the flags that choose a score, with these defaults in their help."""

    def add(command: Command) -> Command:
        command = click.option("--damping", type=float, help=f"Over the mean eigenvalue. [default: {damping}]")(command)
        command = click.option("--kernel", type=click.Choice(get_args(KernelKind)), help=f"[default: {kernel}]")(
            command
        )
        return click.option("--score", type=click.Choice(get_args(ScoreKind)), help=f"[default: {score}]")(command)

    return add


AS_INDEXED = score_options(*["as the index was built"] * 3)
