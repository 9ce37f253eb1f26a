"""Print the tables of docs/benchmarks.md of scores against retrained models, both tasks side by side.

Command:  python scripts/lds_tables.py     (needs lds.json of both tasks, by bench_lds.py)
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

import click
from bench_lds import DEFAULT, methods
from make_lds_ground_truth import FOLDER, TASKS

MAIN = [
    *(f"ours, {k} draws" for k in (1, 2, 4, 8, 16)),
    "ours, 16 draws, 8 bands",
    "ours, 16 draws, 16 bands",
    "ours, 64 draws",
    *(f"TRAK, {k} draws" for k in (4, 16, 64)),
    *(f"D-TRAK, {k} draws" for k in (10, 100)),
    "D-TRAK, 100 draws, 4096 dims",
    "latent cosine",
    "pixel cosine",
    "random",
]
PARTS = [
    "ours, 16 draws",
    *(name for name in methods() if name.startswith("ours, 16 draws, ") and "blocks" not in name),
]
BLOCKS = [
    name
    for own in ("ours, 4 draws", "ours, 8 draws", "ours, 16 draws, 8 bands")
    for name in (own, *(other for other in methods() if other.startswith(own) and "blocks" in other))
]
PROJECTION = [DEFAULT, *(name for name in methods() if name.startswith(DEFAULT) and ("dim" in name or "unp" in name))]


def cell(row: dict[str, Any]) -> str:
    """Return the LDS, its error, and that with the automatic damping."""
    text = "{:.3f} ± {:.3f}".format(*row["lds"])
    return f"{text} ({row['lds_auto'][0]:.3f})" if "lds_auto" in row else text


def table(kinds: dict[str, dict[str, Any]], names: Sequence[str], last: Sequence[str] = ()) -> str:
    """Return a table of some methods, a column for each kind of query."""
    lines = [["", *kinds], ["---"] * (1 + len(kinds))]
    lines += [[name.removeprefix("ours, "), *(cell(kind["rows"][name]) for kind in kinds.values())] for name in names]
    lines += [[name, *("{:.3f} ± {:.3f}".format(*kind[name]) for kind in kinds.values())] for name in last]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def luck(kinds: dict[str, dict[str, Any]], word: str) -> str:
    """Return the mean LDS over the default and its rows of other seeds or projections, and their standard deviation."""
    cells = []
    for kind in kinds.values():
        rows = [row["lds"][0] for name, row in kind["rows"].items() if name.startswith(f"{DEFAULT}, {word} ")]
        runs = [kind["rows"][DEFAULT]["lds"][0], *rows]
        cells.append(f"{statistics.fmean(runs):.3f} (sd {statistics.stdev(runs):.3f})")
    return f"| 4 draws, {len(runs)} {word}s | {' | '.join(cells)} |"


@click.command()
def main() -> None:
    """Print them."""
    tasks = {task: json.loads((FOLDER / task / "lds.json").read_text())["queries"] for task in TASKS}
    kinds = {f"{task}: {kind}": found for task, queries in tasks.items() for kind, found in queries.items()}
    click.echo(table(kinds, MAIN, ["ceiling"]))
    click.echo(table(kinds, PARTS))
    click.echo(table(kinds, BLOCKS))
    click.echo(table(kinds, PROJECTION))
    click.echo("\n".join(luck(kinds, word) for word in ("seed", "projection")))


if __name__ == "__main__":
    main()
