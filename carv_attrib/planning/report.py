"""A plan as text for a terminal, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from carv_attrib.planning import Forecast, Plan
from carv_attrib.report.formatting import format_error, format_number
from carv_attrib.report.plot import new_figure, save_figure
from carv_attrib.variance import Measured

if TYPE_CHECKING:
    import rich.console
    import rich.table

_BARS = 10
_BAR_WIDTH = 40


def plan_report(plan: Plan) -> rich.console.Group:
    """Return the profile, the shares of variance, the costs, the comparison and what to expect."""
    from rich.console import Group
    from rich.text import Text

    pilot = f"pilot of {plan.pilot_examples} examples, {plan.pilot_evaluations} network evaluations, "
    return Group(
        Text(pilot + format_seconds(plan.pilot_seconds), style="dim"),
        _profile(plan),
        _shares(plan),
        _costs(plan),
        _comparison(plan),
        _recommendation(plan),
    )


def format_seconds(seconds: int | float) -> str:
    """Return a time as a person would say it.

    >>> format_seconds(0.00123), format_seconds(95.0), format_seconds(8000)
    ('1.23 ms', '1m35s', '2h13m')
    """
    if seconds < 1:
        return f"{format_number(1e3 * seconds)} ms"
    if seconds < 60:
        return f"{format_number(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def format_bytes(count: int | float) -> str:
    """Return a size with a decimal prefix.

    >>> format_bytes(999), format_bytes(29_500_000)
    ('999 B', '29.5 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _measured(figure: Measured) -> str:
    return f"{format_number(figure.value)} {format_error(figure.standard_error)}"


def _table(title: str, *columns: str) -> rich.table.Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, "bold"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.show_header = any(columns)
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right", no_wrap=True)
    return table


def _profile(plan: Plan) -> rich.table.Table:
    """Return bars of the rms gradient norm, each of some neighbouring points of the profile."""
    points = list(zip(plan.profile.timesteps, plan.profile.rms_norms, strict=True))
    size = max(1, len(points) // _BARS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    rows = [[sum(column) / len(group) for column in zip(*group, strict=True)] for group in groups]
    largest = max(norm for _, norm in rows)
    table = _table("Gradient norm over timesteps, before weighting", "t", "rms norm", "")
    table.columns[2].justify = "left"
    for timestep, norm in rows:
        table.add_row(f"{timestep:.0f}", format_number(norm), "█" * max(1, round(_BAR_WIDTH * norm / largest)))
    return table


def _shares(plan: Plan) -> rich.table.Table:
    table = _table("Variance of one independent draw", "part", "share", "what lessens it")
    table.columns[2].justify = "left"
    ways = {
        "upstream": "more encodings",
        "between_timesteps": "strata",
        "odd_noise": "antithetic pairs",
        "even_noise": "more draws",
    }
    for name, way in ways.items():
        share: Measured = getattr(plan.shares, name)
        if name != "upstream" or share.value:
            percent = Measured(100 * share.value, 100 * share.standard_error)
            table.add_row(name.replace("_", " "), f"{percent.value:.1f} ± {percent.standard_error:.1f} %", way)
    return table


def _costs(plan: Plan) -> rich.table.Table:
    units = plan.costs.units
    table = _table("Costs on this machine", "work", "time", "± half quartile range")
    for name, unit in (
        ("read an example", units.read),
        (
            "encode it, alone in a call",
            Measured(units.encode_call.value + units.encode_row.value, units.encode_call.standard_error),
        ),
        ("encode it, in a large call", units.encode_row),
        ("one draw", units.draw),
    ):
        table.add_row(name, format_seconds(unit.value), format_seconds(unit.standard_error))
    table.add_row("projection's share of a draw", f"{100 * units.projection_share:.0f} %", "")
    return table


def _comparison(plan: Plan) -> rich.table.Table:
    names = ["scheme", "proposal", "R", "K", "feature error", "score SNR", "time"]
    table = _table("The best of each scheme" + _aim(plan), *names)
    for forecast in plan.compared:
        table.add_row(*_row(forecast), style="bold" if forecast == plan.recommended else None)
    return table


def _aim(plan: Plan) -> str:
    if plan.budget is not None:
        return f" within {format_seconds(plan.budget)}"
    return "" if plan.target_snr is None else f" for a score SNR of {plan.target_snr:g}"


def _row(forecast: Forecast) -> list[str]:
    return [
        forecast.scheme,
        forecast.proposal,
        str(forecast.num_encodings),
        str(forecast.num_draws),
        _measured(forecast.feature_error),
        _measured(forecast.score_snr),
        format_seconds(forecast.seconds.value),
    ]


def _recommendation(plan: Plan) -> rich.table.Table:
    best = plan.recommended
    table = _table(f"To expect of all {plan.costs.num_examples} examples", "", "")
    table.show_header = False
    table.columns[1].justify = "left"
    rows = {
        "relative error of a feature": _measured(best.feature_error),
        "score SNR": _measured(best.score_snr),
        "time": f"{format_seconds(best.seconds.value)} ± {format_seconds(best.seconds.standard_error)}",
        "peak memory": format_bytes(best.memory_bytes),
        "peak GPU memory": format_bytes(best.device_memory_bytes) if best.device_memory_bytes else "",
        "disk": format_bytes(best.disk_bytes),
        "K*, best draws for an encoding": str(plan.best_num_draws or ""),
    }
    for name, text in rows.items():
        if text:
            table.add_row(name, text)
    return table


def save_plot(plan: Plan, path: str | Path) -> None:
    """Draw the norm profile over t, and the predicted error against the time for each scheme.

    Raises:
        CarvError: without matplotlib, or if the file cannot be written.
    """
    figure = new_figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    left.semilogy(plan.profile.timesteps, plan.profile.rms_norms, marker=".", color="C0")
    left.set(xlabel="timestep", ylabel="rms gradient norm")
    for number, candidate in enumerate(plan.candidates):
        way = (candidate.scheme, candidate.proposal)
        points = [f for f in plan.curves if (f.scheme, f.proposal) == way]
        errors = [f.feature_error for f in points]
        right.errorbar(
            [f.seconds.value for f in points],
            [e.value for e in errors],
            [e.standard_error for e in errors],
            marker=".",
            linestyle=("-", "--", ":")[number % 3],
            color=f"C{number}",
            label=", ".join(way),
        )
    best = plan.recommended
    right.plot(best.seconds.value, best.feature_error.value, "*", color="black", markersize=12, label="recommended")
    right.set(xlabel="seconds for the whole dataset", ylabel="relative error of a feature", xscale="log", yscale="log")
    right.legend()
    save_figure(figure, path)
