"""The command line: each command calls the API function of the same name, and prints."""

from __future__ import annotations

import inspect as introspection
import json
import re
import signal
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

import click

from carv_attrib.config import COMPONENTS, read_config_file
from carv_attrib.errors import ArgumentError, CarvError
from carv_attrib.evaluate_cli import evaluate
from carv_attrib.maintenance import ExportFormat
from carv_attrib.options import AS_INDEXED, INDEX, NewFile, score_options
from carv_attrib.progress import quiet_libraries

if TYPE_CHECKING:
    from carv_attrib.index import SearchSettings

Command = TypeVar("Command", bound=Callable[..., Any])


class CarvGroup(click.Group):
    """A group whose commands print a `CarvError` as one line, and keep the traceback of anything else."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        before = signal.signal(signal.SIGTERM, _stop)  # as schedulers send before they kill
        try:
            return super().invoke(ctx)
        except CarvError as err:
            raise _OneLine(err) from err
        except KeyboardInterrupt as err:
            stopped = CarvError("stopped; finished parts are kept, and the same command goes on from there.")
            raise _OneLine(stopped) from err
        except PermissionError as err:
            raise _OneLine(CarvError(f"{err.filename}: permission denied; use a folder that you may use.")) from err
        finally:
            signal.signal(signal.SIGTERM, before)


def _stop(*_: Any) -> None:
    """Stop as Ctrl-C does."""
    raise KeyboardInterrupt


class _OneLine(click.ClickException):
    """A `CarvError` as click prints it, with its exit code."""

    def __init__(self, err: CarvError) -> None:
        super().__init__(str(err))
        self.exit_code = err.exit_code  # type: ignore[misc]


def setting_options(*components: str) -> Callable[[Command], Command]:
    """Return a decorator that adds a flag for every setting of `FeaturizeConfig`, or of some components of it.

    Its type, default and description come from there.
    """

    def add(command: Command) -> Command:
        for name in reversed(components or tuple(COMPONENTS)):
            kind = COMPONENTS[name]
            hints, texts = get_type_hints(kind), _attribute_texts(kind)
            for setting in reversed(fields(kind)):
                option = _setting_option(setting.name, hints[setting.name], setting.default, texts[setting.name])
                command = option(command)
        return command

    return add


def _setting_option(name: str, hint: Any, default: Any, text: str) -> Callable[[Command], Command]:
    flag = f"--{name.replace('_', '-')}"
    if hint is bool:
        return click.option(flag, is_flag=True, default=None, help=text)
    shown = f"{text} [default: {default}]" if default not in (None, ()) else text
    choices = [choice for choice in get_args(hint) if isinstance(choice, str)]
    if choices:
        return click.option(flag, type=click.Choice(choices), default=None, help=shown)
    if default == ():
        return click.option(flag, multiple=True, default=None, help=shown + " Can be given several times.")
    if any(get_args(part) for part in get_args(hint)):  # a number, or a word that means one
        return click.option(flag, type=_number_or_word, metavar="INTEGER|WORD", default=None, help=shown)
    return click.option(flag, type=int if int in (hint, *get_args(hint)) else str, default=None, help=shown)


def _number_or_word(text: str) -> int | str:
    """Return a number where `text` is one; words are for the settings to check."""
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _attribute_texts(kind: type) -> dict[str, str]:
    """Return the descriptions in the `Attributes:` section of a docstring."""
    section = (introspection.getdoc(kind) or "").split("Attributes:\n")[1]
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section, re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()) for name, text in entries}


def _window(text: str) -> tuple[int, int]:
    """Return the ends of a window of timesteps."""
    if not (found := re.fullmatch(r"(\d+):(\d+)", text)):
        raise click.BadParameter(f"{text} is not two numbers with a colon, such as 0:200.")
    return int(found[1]), int(found[2])


def aim_options(command: Command) -> Command:
    """Add the flags that say what a plan is to make the most of."""
    command = click.option("--target-snr", type=float, help="Score SNR to reach in the least time; for a plan.")(
        command
    )
    return click.option("--budget", help="Time to spend: 90s, 30m, 2h, 1h30m; for a plan.")(command)


@click.group(cls=CarvGroup)
@click.version_option(package_name="carv-attrib")
def main() -> None:
    """Which training examples made a diffusion model produce this image, and how sure are we?"""


@main.command()
@click.option(
    "--teacher",
    multiple=True,
    help="Folder of a diffusers pipeline, a hub id, or `demo`. Several: scores are averaged.",
)
@click.option("--dataset", help="Folder, .parquet file, hub id, or `digits`.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the index.")
@click.option("--config", type=click.Path(path_type=Path), help="YAML file with the same keys as the flags.")
@click.option("--plan", type=click.Choice(["auto"]), help="First run a pilot, and use the settings it recommends.")
@aim_options
@setting_options()
def featurize(config: Path | None, **flags: Any) -> None:
    """Compute the features of every example of DATASET, and index them. Run it again to go on after a stop."""
    from carv_attrib.ensemble import featurize_ensemble
    from carv_attrib.pipeline import featurize as run

    settings = _settings(config, flags, ("teacher", "dataset", "output"))
    teachers, dataset, output = (settings.pop(name) for name in ("teacher", "dataset", "output"))
    teachers = [teachers] if isinstance(teachers, str) else list(teachers)  # a config file may hold one or a list
    quiet_libraries()
    if len(teachers) == 1:
        stores = [run(teachers[0], dataset, output, **settings)]
    else:
        stores = featurize_ensemble(teachers, dataset, output, **settings)
    for store in stores:
        skipped = store.num_skipped()
        click.echo(f"{len(store.ids)} examples in {store.path}" + (f", {skipped} skipped" if skipped else ""))


@main.command()
@click.option("--teacher", help="Folder of a diffusers pipeline, a hub id, or `demo`.")
@click.option("--dataset", help="Folder, .parquet file, hub id, or `digits`.")
@click.option("--config", type=click.Path(path_type=Path), help="YAML file with the same keys as the flags.")
@aim_options
@click.option("--plot", type=NewFile(), help="Draw the profile, and error against time, to a file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@setting_options()
def plan(config: Path | None, plot: Path | None, as_json: bool, **flags: Any) -> None:
    """Run a pilot on a few dozen examples of DATASET: what to run featurize with, and what to expect of it."""
    from carv_attrib.planning import plan as make
    from carv_attrib.planning.report import plan_report, save_plot

    settings = _settings(config, flags, ("teacher", "dataset"))
    settings = {name: value for name, value in settings.items() if name not in ("output", "plan")}
    quiet_libraries()
    result = make(settings.pop("teacher"), settings.pop("dataset"), **settings)
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=1))
    else:
        from rich.console import Console

        Console().print(plan_report(result))
        click.echo(result.command())
    if plot:
        save_plot(result, plot)
        click.echo(f"plot: {plot}", err=True)


@main.command()
@INDEX
@score_options("preconditioned", "bands", "auto")
@click.option("--factory", help="FAISS factory string, or auto. [default: Flat; auto with --target-recall]")
@click.option(
    "--target-recall", type=float, help="Choose how it is searched so that it finds this share of the top 10."
)
@click.option("--queries", help="Pictures to measure recall on: folder, .parquet file, hub id. [default: examples]")
@click.option("--teacher", help="Where the teacher lies now, if it was moved; for --queries.")
@click.option("--device", default="auto", show_default=True, help="Of the teacher; for --queries.")
def index(
    index: Path, queries: str | None, teacher: str | None, device: str, target_recall: float | None, **choices: Any
) -> None:
    """Fit the kernel of INDEX and build its search index, for one score."""
    from carv_attrib.ensemble import member_folders
    from carv_attrib.pipeline import build_index
    from carv_attrib.recall import query_features
    from carv_attrib.store import FeatureStore

    if queries and target_recall is None:
        raise ArgumentError("`queries` is what recall is measured on; give --target-recall too.")
    for folder in member_folders(index):
        store = FeatureStore.open(folder)
        features = query_features(store, queries, teacher, device) if queries else None
        with store.writing():
            given = {name: value for name, value in choices.items() if value is not None}
            built = build_index(store, target_recall=target_recall, queries=features, **given)
        click.echo(f"{len(store.ids)} examples indexed in {folder}")
        if target_recall:
            asked = "your pictures" if queries else "examples of the index"
            click.echo(_describe_search(built.settings.search, target_recall, asked))


@main.command()
@INDEX
@click.option("--dataset", required=True, help="The new examples: folder, .parquet file, hub id, or `digits`.")
@click.option("--teacher", help="Where the teacher lies now, if it was moved.")
@setting_options("data", "execution")
def append(index: Path, dataset: str, teacher: str | None, **settings: Any) -> None:
    """Add the examples of another data set to INDEX. Run it again to go on after a stop."""
    from carv_attrib.maintenance import append as run

    quiet_libraries()
    given = {name: value for name, value in settings.items() if value not in (None, ())}
    store = run(index, dataset, teacher=teacher, **given)
    click.echo(f"{len(store.ids)} examples in {store.path}")


@main.command()
@INDEX
@click.option("--id", "ids", type=int, multiple=True, help="Of an example. Can be given several times.")
@click.option("--key", "keys", multiple=True, help="Name of an example. Can be given several times.")
@click.option(
    "--ids-from",
    type=click.File(errors="replace"),
    help="A text file with an id on each line, or - for standard input.",
)
def remove(index: Path, ids: tuple[int, ...], keys: tuple[str, ...], ids_from: Any) -> None:
    """Take examples out of INDEX, for good, and build it again."""
    from carv_attrib.maintenance import remove as run

    lines = [line.strip() for line in ids_from or () if line.strip()]
    if bad := [line for line in lines if not re.fullmatch(r"-?\d+", line)]:
        raise click.UsageError(f"--ids-from must have a whole number on each line, got {bad[0][:40]!r}.")
    count = run(index, ids=[*ids, *map(int, lines)], keys=keys)
    click.echo(f"{count} {'example' if count == 1 else 'examples'} removed from {index}")


@main.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.argument("shards", type=click.Path(path_type=Path), nargs=-1, required=True)
def merge(output: Path, shards: tuple[Path, ...]) -> None:
    """Put SHARDS, made by `featurize --shard`, together in the new index OUTPUT."""
    from carv_attrib.maintenance import merge as run

    click.echo(f"{len(run(output, shards).ids)} examples in {output}")


@main.command()
@INDEX
@click.option("--format", type=click.Choice(get_args(ExportFormat)), required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="A new folder.")
def export(index: Path, format: Any, output: Path) -> None:
    """Write the features of INDEX for other programs."""
    from carv_attrib.maintenance import export as run

    for file in run(index, output, format):
        click.echo(file)


@main.command()
@INDEX
@click.option("--image", type=click.Path(path_type=Path), required=True, help="The picture to explain.")
@click.option("--prompt", help="What a text-conditional teacher made it from.")
@click.option("--label", type=int, help="The class that a class-conditional teacher made it for.")
@click.option("--top-k", type=int, default=10, show_default=True)
@click.option("--opponents", is_flag=True, help="Also show the examples with the smallest scores.")
@click.option("--timesteps", type=_window, metavar="FIRST:LAST", help="Score only bands of timesteps in [FIRST, LAST).")
@click.option("--group-by", help="Also add up scores by label, caption, folder, or a column of the data set.")
@click.option("--refine", type=int, help="Take more draws of so many of the first examples, and rank them again.")
@click.option("--target-se", type=float, help="Stop refining when the standard errors shown are at most this.")
@click.option("--max-draws", type=int, help="Draws of an example, at most; for --refine. [default: 64]")
@click.option(
    "--mask",
    type=click.Path(path_type=Path),
    help="A grey picture, white where the image is asked about; or all of it.",
)
@AS_INDEXED
@click.option("--teacher", multiple=True, help="Where the teacher lies now, if it was moved; all of them, if several.")
@click.option(
    "--dataset", help="Where the training examples lie now, if they were moved; for --refine, --group-by COLUMN."
)
@click.option("--device", default="auto", show_default=True)
@click.option("--report", type=NewFile(), help="Write a web page in one file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
def query(
    index: Path,
    teacher: tuple[str, ...],
    dataset: str | None,
    device: str,
    report: Path | None,
    as_json: bool,
    as_csv: bool,
    **question: Any,
) -> None:
    """Show the training examples of INDEX that made the model produce an image."""
    from carv_attrib.attributor import Attributor

    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other; give one of them.")
    if as_csv and question["group_by"]:
        raise click.UsageError("--csv has no room for groups; give --json with --group-by.")
    quiet_libraries()
    attributor = Attributor.open(index, teacher=teacher or None, dataset=dataset, device=device)
    result = attributor.query(question.pop("image"), **question)
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=1))
    elif as_csv:
        click.echo(result.to_csv(), nl=False)
    else:
        _print_result(result)
    if report:
        result.save_report(report)
        click.echo(f"report: {report}", err=True)


@main.command()
@INDEX
@click.option("--top", type=click.Choice(["self"]), help="Show the examples that influence themselves most, instead.")
@click.option("--num", type=int, help="How many of them; for --top. [default: 10]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(index: Path, top: str | None, num: int | None, as_json: bool) -> None:
    """Describe INDEX: what it was made from and how, its size and its spectrum."""
    from rich.console import Console
    from rich.table import Table

    from carv_attrib.inspection import inspect as describe

    if top:
        _print_top_self(index, 10 if num is None else num, as_json)
        return
    if num is not None:
        raise click.UsageError("--num is how many examples to show; give --top self too.")
    facts = describe(index)
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, str(value), style=None)
    Console().print(table, markup=False)


@main.command()
@INDEX
def verify(index: Path) -> None:
    """Check every file of INDEX; exit code 1 and one line for each problem."""
    from carv_attrib.inspection import verify as find_problems

    problems = find_problems(index)
    for problem in problems:
        click.echo(problem, err=True)
    if problems:
        raise click.exceptions.Exit(1)
    click.echo(f"{index}: no problems found")


main.add_command(evaluate)


@main.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("demo-out"), show_default=True)
def demo(output: Path) -> None:
    """Featurize the digits with the packaged teacher, generate some, and ask where they come from."""
    from carv_attrib.demo import run_demo

    quiet_libraries()
    click.echo("1,797 digits and five queries: a minute or two on two cores.", err=True)
    results, report = run_demo(output)
    for result in results:
        _print_result(result)
    click.echo(f"report: {report}")


def _settings(config: Path | None, flags: dict[str, Any], needed: tuple[str, ...]) -> dict[str, Any]:
    """Return the settings of a config file with flags in their place."""
    settings = read_config_file(config) if config else {}
    settings |= {name: value for name, value in flags.items() if value not in (None, ())}
    if missing := [name for name in needed if name not in settings]:
        raise click.UsageError(f"missing --{missing[0]}; give it as a flag or in --config.")
    return settings


def _describe_search(search: SearchSettings, target_recall: float, asked: str) -> str:
    """Return a line on how an index is searched, and how well that finds what exact search does."""
    how = " ".join([search.factory, search.parameters]).strip()
    recall, error = search.recall or 0.0, search.recall_error or 0.0
    short = "" if recall + error >= target_recall else f"; below {target_recall:g}: try --factory with a finer code"
    return (
        f"{how}, {search.candidates} candidates: recall@10 {recall:.3f} ± {error:.3f} on {asked}, "
        f"{search.milliseconds} ms a query{short}"
    )


def _print_top_self(index: Path, num: int, as_json: bool) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from carv_attrib.inspection import top_self
    from carv_attrib.report.formatting import format_number, visible

    found = top_self(index, num)
    if as_json:
        click.echo(json.dumps([asdict(example) for example in found], indent=1))
        return
    table = Table("#", "self-influence", "id", "key", "label", box=SIMPLE_HEAD, pad_edge=False)
    for rank, example in enumerate(found, 1):
        texts = Text(visible(example.key)), Text(visible(example.label or ""))
        table.add_row(str(rank), format_number(example.score), str(example.id), *texts)
    Console().print(table)


def _print_result(result: Any) -> None:
    from rich.console import Console

    from carv_attrib.report import result_table

    Console().print(result_table(result))
