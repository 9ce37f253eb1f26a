"""`carv-attrib evaluate`: the commands that measure how good scores are."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from carv_attrib.options import AS_INDEXED, INDEX, Command, NewFile
from carv_attrib.progress import quiet_libraries
from carv_attrib.report.measures import Measures, measures_table, save_bars, significant_digits, three_decimals
from carv_attrib.variance import Measured


def index_options(command: Command) -> Command:
    """Add the flags of an index that is asked: the score, and where its teacher is and runs."""
    command = click.option("--device", default="auto", show_default=True)(command)
    command = click.option("--teacher", help="Where the teacher lies now, if it was moved.")(command)
    return AS_INDEXED(command)


def sample_options(command: Command) -> Command:
    """Add the flags that say how many queries there are, and how many examples count as found."""
    command = click.option("--top-k", type=int, default=10, show_default=True)(command)
    return click.option(
        "--num-queries", type=int, default=100, show_default=True, help="At most so many, chosen by a hash."
    )(command)


def output_options(command: Command) -> Command:
    """Add the flags that say what is printed and drawn."""
    command = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)
    return click.option("--plot", type=NewFile(), help="Draw bars to a file.")(command)


@click.group()
def evaluate() -> None:
    """Compare the scores of an index with what is known to be true."""


@evaluate.command()
@INDEX
@click.option("--ground-truth", type=click.Path(path_type=Path), required=True, help="npz of retrained models' losses.")
@index_options
@output_options
def lds(
    index: Path, ground_truth: Path, teacher: str | None, device: str, as_json: bool, plot: Path | None, **choice: Any
) -> None:
    """Correlate the scores of INDEX with the losses of models that were retrained on subsets: the LDS."""
    from carv_attrib.attributor import Attributor
    from carv_attrib.evaluation import GroundTruth
    from carv_attrib.evaluation import lds as correlate

    quiet_libraries()
    truth = GroundTruth.load(ground_truth)
    scores = truth.scores(Attributor.open(index, teacher=teacher, device=device), **choice)
    figures = correlate(truth, {"LDS": scores})
    _show(figures, as_json, "queries", f"{len(truth.masks)} subsets, mean ± standard error")
    drawn = {kind: {name: x for name, x in row.items() if name != "seed to seed"} for kind, row in figures.items()}
    _draw(drawn, plot, "queries", "LDS", lines=["ceiling"])


@evaluate.command()
@INDEX
@click.argument("other_index", type=click.Path(path_type=Path))
@click.option("--images", help="Pictures to ask about: folder, .parquet file, hub id.")
@click.option("--ground-truth", type=click.Path(path_type=Path), help="npz whose queries to ask about instead.")
@sample_options
@index_options
@output_options
def agreement(
    index: Path,
    other_index: Path,
    images: str | None,
    ground_truth: Path | None,
    num_queries: int,
    top_k: int,
    teacher: str | None,
    device: str,
    as_json: bool,
    plot: Path | None,
    **choice: Any,
) -> None:
    """Compare the scores of INDEX with those of OTHER_INDEX, of the same examples: with more draws, for example."""
    from carv_attrib.attributor import Attributor
    from carv_attrib.evaluation import GroundTruth, Queries, check_same_examples
    from carv_attrib.evaluation import agreement as compare

    if (images is None) == (ground_truth is None):
        raise click.UsageError("give the queries by --images or by --ground-truth, one of them.")
    quiet_libraries()
    indexes = [Attributor.open(path, teacher=teacher, device=device) for path in (index, other_index)]
    check_same_examples(*indexes)
    if ground_truth is not None:
        queries = GroundTruth.load(ground_truth).queries.choose(num_queries)
    else:
        queries = Queries.sample(str(images), num_queries)
    scores = [queries.scores(each, **choice) for each in indexes]
    figures = compare(*scores, top_k=top_k, kinds=queries.kinds)
    counts = f"{len(queries.images)} queries, {scores[0].shape[1]} examples"
    _show(figures, as_json, "queries", f"{counts}, mean ± standard error")
    _draw(figures, plot, "queries", "mean over queries")


@evaluate.command()
@INDEX
@click.option("--dataset", help="What INDEX was made from, if it was moved.")
@sample_options
@index_options
@output_options
def self_retrieval(
    index: Path, teacher: str | None, device: str, as_json: bool, plot: Path | None, **question: Any
) -> None:
    """Ask INDEX about some of its own examples: how often is an example found by itself?"""
    from carv_attrib.attributor import Attributor
    from carv_attrib.evaluation import self_retrieval as ask

    quiet_libraries()
    attributor = Attributor.open(index, teacher=teacher, device=device)
    figures = ask(attributor, question.pop("dataset"), **question)
    num_queries = min(question["num_queries"], len(attributor.ids))
    _show(figures, as_json, "queries", f"{num_queries} of {len(attributor.ids)} examples, mean ± standard error")
    _draw(figures, plot, "queries", "share, or mean of 1 / rank")


@evaluate.command()
@click.argument("results", type=click.Path(path_type=Path))
@click.option("--against", metavar="METHOD", help="What the others are compared with.  [default: the first]")
@output_options
def counterfactual(results: Path, against: str | None, as_json: bool, plot: Path | None) -> None:
    """Show how much the losses in RESULTS, an npz, rose when the highest scores' examples were removed."""
    from carv_attrib.evaluation import Counterfactuals
    from carv_attrib.evaluation import counterfactual as compare

    found = Counterfactuals.load(results)
    figures = compare(found, against)
    full, seeds = found.full_losses[found.whole.any(0)].mean(), found.whole.sum(2)[found.whole.any(2)]
    num_seeds = f"{seeds.max()}" if (seeds == seeds[0]).all() else f"{seeds.min()} to {seeds.max()} a query"
    title = f"rise of the loss from {full:.4g}, mean ± standard error, seeds: {num_seeds}"
    _show(figures, as_json, "removed", title, significant_digits)
    rises = {group: {name: row[name] for name in found.methods} for group, row in figures.items()}
    _draw(rises, plot, "removed", "rise of the loss")


def _show(
    figures: Measures, as_json: bool, corner: str, title: str, text: Callable[[Measured], str] = three_decimals
) -> None:
    """Print figures as JSON or as a table."""
    from rich.console import Console

    if as_json:
        click.echo(json.dumps({group: {name: asdict(x) for name, x in row.items()} for group, row in figures.items()}))
    else:
        Console().print(measures_table(figures, corner=corner, title=title, text=text))


def _draw(figures: Measures, plot: Path | None, corner: str, label: str, lines: Collection[str] = ()) -> None:
    """Draw figures to a file, if one was named."""
    if plot:
        save_bars(figures, plot, corner=corner, label=label, lines=lines)
        click.echo(f"plot: {plot}", err=True)
