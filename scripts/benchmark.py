"""What benchmarks share: the machine they ran on, quartiles, and results that are written cell by cell."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from carv_attrib.files import atomic_file


def describe_machine() -> dict[str, str | int]:
    """Return the processor, cores, threads, GPU and library versions of this machine."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def quartiles(values: Sequence[float] | np.ndarray) -> list[float]:
    """Return the quartiles, the median in the middle."""
    return np.quantile(values, (0.25, 0.5, 0.75)).tolist()


class Results:
    """A JSON file of cells, written after every one, so that a killed run goes on where it was.

    Raises:
        click.UsageError: if the file was measured on another machine.
    """

    def __init__(self, path: Path, command: str, *, fresh: bool) -> None:
        self.path = path
        machine = describe_machine()
        del machine["threads"]  # each cell has its own
        self.content: dict[str, Any] = {"command": command, "machine": machine, "cells": {}}
        if path.is_file() and not fresh and "cells" in (content := json.loads(path.read_text())):
            if content["machine"] != machine:
                raise click.UsageError(f"{path} was measured on another machine; use --fresh or another --output.")
            self.content = content

    def __contains__(self, key: str) -> bool:
        return key in self.content["cells"]

    def add(self, key: str, cell: Any) -> None:
        """Keep a cell and write the file."""
        self.content["cells"][key] = cell
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path) as temporary:
            temporary.write_text(json.dumps(self.content, indent=1) + "\n")

    def cell(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return the cell called `key`, computed, printed and kept if it is not there."""
        if key not in self:
            self.add(key, compute())
            click.echo(f"{key}: {json.dumps(self.content['cells'][key])[:400]}")
        return self.content["cells"][key]

    def of_part(self, part: str) -> dict[str, Any]:
        """Return the cells of one part, without its name in their keys."""
        return {
            key.removeprefix(f"{part}/"): cell
            for key, cell in self.content["cells"].items()
            if key.startswith(f"{part}/")
        }
