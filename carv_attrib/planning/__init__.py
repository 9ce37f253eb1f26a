"""`plan`: from a pilot on a few dozen examples to the settings that make the most of a budget (`docs/plan.md`)."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from carv_attrib.batches import check_columns
from carv_attrib.config import EstimatorConfig, FeaturizeConfig, ProposalKind, check_at_least, check_choice
from carv_attrib.data import ExampleDataset, open_dataset
from carv_attrib.errors import ArgumentError, StoreMismatchError
from carv_attrib.estimator import GradientProfile
from carv_attrib.manifest import choose_micro_batch, settle_micro_batch
from carv_attrib.memory import less_memory
from carv_attrib.planning.costs import CostModel, parse_budget
from carv_attrib.planning.forecast import Candidate, jackknife_error
from carv_attrib.planning.pilot import Choice, VarianceShares, num_evaluations, study
from carv_attrib.progress import progress
from carv_attrib.sampling import Scheme, pair_size
from carv_attrib.store import FeatureStore
from carv_attrib.teacher import Teacher, loaded_placement
from carv_attrib.teachers import load_teacher
from carv_attrib.variance import Measured

if TYPE_CHECKING:
    import datasets

PlanKind = Literal["auto"]

Split = tuple[int, int]
"""(R, K): random encodings, and draws for each."""

SCHEMES: tuple[Scheme, ...] = ("stratified", "antithetic", "orthogonal")
PROPOSALS: tuple[ProposalKind, ...] = ("uniform", "pilot")
MOST_DRAWS = 512
MOST_ENCODINGS = 32


@dataclass(frozen=True)
class Forecast:
    """What a run with some settings is expected to give, and to take, over the whole dataset.

    Attributes:
        scheme: how draws depend on one another.
        proposal: what timesteps are drawn from.
        num_encodings: R.
        num_draws: K.
        feature_error: Monte-Carlo standard error of a feature over its norm.
        score_snr: spread of a query's scores over examples, over the standard error of a score.
        seconds: of `featurize` with a loaded teacher.
        memory_bytes: most host memory.
        device_memory_bytes: most GPU memory; 0 without one.
        disk_bytes: of the index.
    """

    scheme: Scheme
    proposal: ProposalKind
    num_encodings: int
    num_draws: int
    feature_error: Measured
    score_snr: Measured
    seconds: Measured
    memory_bytes: int
    device_memory_bytes: int
    disk_bytes: int

    def settings(self) -> dict[str, Any]:
        """Return the settings that were chosen, named as the flags are."""
        return {name: getattr(self, name) for name in ("scheme", "proposal", "num_encodings", "num_draws")}


@dataclass(frozen=True)
class Plan:
    """What a pilot found, and the settings that follow from it; print it with `report.plan_report`.

    Attributes:
        recommended: the settings to use and what to expect of them.
        compared: the best settings of every scheme and proposal.
        curves: what they give and take at other numbers of draws.
        candidates: the schemes and proposals, with all that their forecasts rest on.
        best_num_draws: K*, the draws of each random encoding that give the least variance for the time; None where
            all encodings are the same.
        profile: rms gradient norm over timesteps.
        shares: of the variance of one draw.
        costs: time, memory and disk as functions of the settings.
        given: the settings that were given.
        teacher: where it came from.
        dataset: where it came from.
        budget: seconds to spend on featurizing, or None.
        target_snr: the score SNR to reach, or None.
        pilot_examples: how many examples were looked at.
        pilot_evaluations: network evaluations that it took.
        pilot_seconds: that it took.
    """

    recommended: Forecast
    compared: Sequence[Forecast]
    curves: Sequence[Forecast]
    candidates: Sequence[Candidate]
    best_num_draws: int | None
    profile: GradientProfile
    shares: VarianceShares
    costs: CostModel
    given: Mapping[str, Any]
    teacher: str
    dataset: str
    budget: float | None
    target_snr: float | None
    pilot_examples: int
    pilot_evaluations: int
    pilot_seconds: float

    @property
    def settings(self) -> dict[str, Any]:
        """The settings to featurize with: the given ones and the recommended ones."""
        return {**self.given, **self.recommended.settings()}

    def command(self) -> str:
        """Return the `featurize` command that follows the plan."""
        words = ["carv-attrib", "featurize", "--teacher", self.teacher, "--dataset", self.dataset, "--output", "INDEX"]
        for name, value in self.settings.items():
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                words += [flag] * value
            else:
                for one in value if isinstance(value, list | tuple) else [value]:
                    words += [flag, str(one)]
        return shlex.join(words)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values; figures that are not finite are None."""
        content: dict[str, Any] = _json(vars(self))
        return {"settings": self.recommended.settings(), "command": self.command()} | content


def plan(
    teacher: Teacher | str | Path,
    dataset: str | Path | datasets.Dataset,
    *,
    budget: str | float | None = None,
    target_snr: float | None = None,
    **settings: Any,
) -> Plan:
    """Return the settings that make the most of a budget, and what to expect of them, from a pilot.

    Chosen are, where they are not given: the scheme, the proposal, the number of draws, and with random encodings
    how many of those. All other settings are kept.

    Args:
        teacher: a loaded teacher, a folder or a hub id.
        dataset: what `featurize` takes.
        budget: time to spend on `featurize`: 90s, 30m, 2h, 1h30m, or seconds.
        target_snr: score SNR to reach in the least time; excludes a budget. With neither, the number of draws is
            the given one or the default.
        **settings: named as the flags of `featurize` are.

    Raises:
        ArgumentError: for a bad value, or a budget or target that no setting meets.
        DataError: if the dataset cannot be read, or lacks what the teacher needs.
        NonFiniteGradientError: for a gradient with NaN or infinity, naming the example.
    """
    if not isinstance(teacher, str | Path):
        settings = settings | loaded_placement(teacher, settings)
    config = starting_config(settings)
    check_aims(budget, target_snr)
    if isinstance(teacher, str | Path):
        teacher = load_teacher(teacher, device=config.execution.device, dtype=config.storage.dtype)
    examples = open_dataset(dataset, **asdict(config.data))
    check_columns(teacher, examples)
    with less_memory(teacher.denoiser, **config.execution.memory_savers):
        return make_plan(teacher, examples, settings, budget=budget, target_snr=target_snr)


def starting_config(settings: Mapping[str, Any]) -> FeaturizeConfig:
    """Return the config of settings whose number of draws, if not given, is the default or the next that fits.

    Raises:
        ArgumentError: for an unknown setting or a bad value.
    """
    if "num_draws" in settings:
        return FeaturizeConfig.from_flat(settings)
    scheme = FeaturizeConfig.from_flat({**settings, "num_bands": 1}).estimator.scheme
    num_bands = settings.get("num_bands", EstimatorConfig.num_bands)
    check_at_least("num_bands", num_bands, 1)
    unit = num_bands * pair_size(scheme)
    return FeaturizeConfig.from_flat({**settings, "num_draws": unit * math.ceil(EstimatorConfig.num_draws / unit)})


def check_aims(budget: str | float | None, target_snr: float | None) -> float | None:
    """Return the budget in seconds.

    Raises:
        ArgumentError: for a budget or target that is not positive, or both at once.
    """
    if budget is not None and target_snr is not None:
        raise ArgumentError("`budget` and `target_snr` exclude each other; give one of them.")
    if target_snr is not None and (not isinstance(target_snr, int | float) or not 0 < target_snr < math.inf):
        raise ArgumentError(f"`target_snr` must be a positive number, got {target_snr!r}; 3 is a fair one.")
    return None if budget is None else parse_budget(budget)


def make_plan(
    teacher: Teacher,
    examples: ExampleDataset,
    settings: Mapping[str, Any],
    *,
    budget: str | float | None,
    target_snr: float | None,
) -> Plan:
    """Return the plan for a loaded teacher and an open dataset."""
    seconds = check_aims(budget, target_snr)
    config = settle_micro_batch(teacher, starting_config(settings))  # once: it is asked for at every split
    choices = possible_choices(config, settings)
    with progress("pilot", num_evaluations(config, choices)) as advance:
        found = study(teacher, examples, config, choices, advance)
    planner = Planner(teacher, config, settings, CostModel(found.units, len(examples), found.proj_dim))
    splits = {candidate: planner.best(candidate, seconds, target_snr) for candidate in found.candidates}
    best = {candidate: split for candidate, split in splits.items() if split}
    if not best:
        raise planner.out_of_reach(found.candidates, seconds, target_snr)
    chosen = planner.choose(best, target_snr)
    return Plan(
        recommended=planner.forecast(chosen, *best[chosen]),
        compared=[planner.forecast(candidate, *split) for candidate, split in best.items()],
        curves=[point for candidate in best for point in planner.curve(candidate, best[candidate][0])],
        candidates=found.candidates,
        best_num_draws=planner.best_num_draws(chosen),
        profile=found.profile,
        shares=found.shares,
        costs=planner.costs,
        given={name: value for name, value in settings.items() if value is not None},
        teacher=teacher.source,
        dataset=examples.source,
        budget=seconds,
        target_snr=target_snr,
        pilot_examples=found.num_examples,
        pilot_evaluations=found.num_evaluations,
        pilot_seconds=found.seconds,
    )


def check_plan(plan: str | None, budget: str | float | None, target_snr: float | None) -> None:
    """Check the arguments of `featurize` that are about a plan.

    Raises:
        ArgumentError: for an unknown plan, a bad aim, or an aim without a plan.
    """
    if plan is not None:
        check_choice("plan", plan, PlanKind)
    check_aims(budget, target_snr)
    for name, value in (("budget", budget), ("target_snr", target_snr)):
        if plan is None and value is not None:
            raise ArgumentError(f"`{name}` is for a plan, got {value!r} without one; add `plan` auto.")


def follow_plan(
    teacher: Teacher,
    examples: ExampleDataset,
    output: str | Path,
    settings: Mapping[str, Any],
    budget: str | float | None,
    target_snr: float | None,
) -> dict[str, Any]:
    """Return the plan, as the manifest keeps it, that an index was begun with; a new one if none was begun.

    A pilot's timings would differ the second time, and an index must go on as it was begun.

    Raises:
        StoreMismatchError: if it was begun without a plan, or with another aim.
        ArgumentError: for a budget or target that no setting meets.
    """
    if not (Path(output) / "manifest.json").is_file():
        return make_plan(teacher, examples, settings, budget=budget, target_snr=target_snr).to_dict()
    store = FeatureStore.open(output)
    if "plan" not in store.manifest:
        raise StoreMismatchError(f"{output} was begun without a plan; leave `plan` out, or use another folder.")
    store.check_matches({"plan": {"budget": check_aims(budget, target_snr), "target_snr": target_snr}})
    planned: dict[str, Any] = store.manifest["plan"]
    return planned


def possible_choices(config: FeaturizeConfig, settings: Mapping[str, Any]) -> list[Choice]:
    """Return the schemes and proposals to compare: the given ones, else those that fit, the plainest first.

    With balanced weights all timesteps weigh alike, so that the pilot's proposal is the uniform one.
    """
    schemes = [config.estimator.scheme] if "scheme" in settings else SCHEMES
    proposals = PROPOSALS if config.estimator.weighting == "uniform" else PROPOSALS[:1]
    if "proposal" in settings:
        proposals = (config.estimator.proposal,)
    bands, draws = config.estimator.num_bands, config.estimator.num_draws
    fitting = [s for s in schemes if "num_draws" not in settings or draws % (bands * pair_size(s)) == 0]
    return [(scheme, proposal) for scheme in fitting for proposal in proposals]


@dataclass(frozen=True)
class Planner:
    """Chooses numbers of encodings and draws.

    Attributes:
        teacher: the frozen model.
        config: the settings that are not chosen.
        settings: the given ones.
        costs: what a run takes.
    """

    teacher: Teacher
    config: FeaturizeConfig
    settings: Mapping[str, Any]
    costs: CostModel

    def configure(self, candidate: Candidate, num_encodings: int, num_draws: int) -> tuple[FeaturizeConfig, int]:
        """Return the config of a run, and the rows of its network calls."""
        changes: dict[str, Any] = {"scheme": candidate.scheme, "proposal": candidate.proposal}
        changes |= {"num_encodings": num_encodings, "num_draws": num_draws}
        config = replace(self.config, estimator=replace(self.config.estimator, **changes))
        return config, choose_micro_batch(self.teacher, config)

    def seconds(self, candidate: Candidate, num_encodings: int, num_draws: int) -> float:
        """Return the seconds of a run."""
        return self.costs.seconds(*self.configure(candidate, num_encodings, num_draws)).value

    def forecast(self, candidate: Candidate, num_encodings: int, num_draws: int) -> Forecast:
        """Return what a run gives and takes."""
        config, micro_batch = self.configure(candidate, num_encodings, num_draws)
        return Forecast(
            scheme=candidate.scheme,
            proposal=candidate.proposal,
            num_encodings=num_encodings,
            num_draws=num_draws,
            feature_error=candidate.feature_error(num_encodings, num_draws),
            score_snr=candidate.score_snr(num_encodings, num_draws),
            seconds=self.costs.seconds(config, micro_batch),
            memory_bytes=self.costs.memory_bytes(config),
            device_memory_bytes=self.costs.units.device_memory_bytes,
            disk_bytes=self.costs.disk_bytes(config),
        )

    def draw_counts(self, scheme: Scheme) -> list[int]:
        """Return the K to choose from: one draw (pair) a band, or an even number, which gives scores an error bar."""
        if "num_draws" in self.settings:
            return [self.config.estimator.num_draws]
        unit = self.config.estimator.num_bands * pair_size(scheme)
        return [unit, *range(2 * unit, max(MOST_DRAWS, 2 * unit) + 1, 2 * unit)]

    def splits(self, candidate: Candidate, aimed: bool) -> Iterator[Split]:
        """Yield the (R, K) to choose from; without an aim, the given or default ones."""
        if not aimed:
            wanted = self.config.estimator.num_draws
            least = min(self.draw_counts(candidate.scheme), key=lambda k: (k < wanted, abs(k - wanted)))
            yield self.config.estimator.num_encodings, least
            return
        free = self.config.estimator.random_encoding and "num_encodings" not in self.settings
        encodings = range(1, MOST_ENCODINGS + 1) if free else (self.config.estimator.num_encodings,)
        for num_draws in self.draw_counts(candidate.scheme):
            for num_encodings in encodings:
                # where each draw is a band, encodings share their draws, and more of them help less than eq. (6) says
                config, _ = self.configure(candidate, num_encodings, num_draws)
                if num_encodings == 1 or not config.estimator.every_draw_a_band:
                    yield num_encodings, num_draws

    def best(self, candidate: Candidate, budget: float | None, target_snr: float | None) -> Split | None:
        """Return the (R, K) with the smallest feature error within the budget, or the fastest with the SNR wanted."""
        splits = list(self.splits(candidate, aimed=budget is not None or target_snr is not None))
        if target_snr is not None:
            reaching = [split for split in splits if candidate.moments.score_snr(*split) >= target_snr]
            return min(reaching, key=lambda split: self.seconds(candidate, *split), default=None)
        affordable = [split for split in splits if budget is None or self.seconds(candidate, *split) <= budget]
        return min(affordable, key=lambda split: candidate.moments.feature_variance(*split), default=None)

    def choose(self, best: Mapping[Candidate, Split], target_snr: float | None) -> Candidate:
        """Return which candidate to recommend, each with its best (R, K).

        For a target the fastest. Else the one with the largest score SNR; where several come within a standard error
        of it, the one of them with the smallest feature error, which a pilot tells far better.
        """
        if target_snr is not None:
            return min(best, key=lambda candidate: self.seconds(candidate, *best[candidate]))
        top = max(best, key=lambda candidate: candidate.moments.score_snr(*best[candidate]))
        target = [moments.score_snr(*best[top]) for moments in (top.moments, *top.left_out)]

        def within_an_error(candidate: Candidate) -> bool:
            snrs = [moments.score_snr(*best[candidate]) for moments in (candidate.moments, *candidate.left_out)]
            differences = [a - b for a, b in zip(target, snrs, strict=True)]
            return differences[0] <= jackknife_error(differences[1:])

        return min(
            filter(within_an_error, best), key=lambda candidate: candidate.moments.feature_error(*best[candidate])
        )

    def best_num_draws(self, candidate: Candidate) -> int | None:
        """Return the K that gives features of random encodings the least variance times time (eq. (6))."""
        if not self.config.estimator.random_encoding:
            return None

        def inefficiency(num_draws: int) -> float:
            return candidate.moments.feature_variance(1, num_draws) * self.encoding_seconds(candidate, num_draws)

        return min(self.draw_counts(candidate.scheme), key=inefficiency)

    def encoding_seconds(self, candidate: Candidate, num_draws: int) -> float:
        """Return the seconds for encoding an example once more and for its K draws."""
        config, micro_batch = self.configure(candidate, 1, num_draws)
        per_call = config.estimator.examples_per_call(micro_batch)
        return self.costs.upstream_seconds(per_call) + num_draws * self.costs.units.draw.value

    def curve(self, candidate: Candidate, num_encodings: int) -> list[Forecast]:
        """Return forecasts at some numbers of draws, each about twice the last."""
        counts = self.draw_counts(candidate.scheme)
        return [
            self.forecast(candidate, num_encodings, counts[0] * 2**i) for i in range(8) if counts[0] * 2**i in counts
        ]

    def out_of_reach(
        self, candidates: Sequence[Candidate], budget: float | None, target_snr: float | None
    ) -> ArgumentError:
        """Return the error for a budget or a target that no setting meets."""
        splits = [(c, split) for c in candidates for split in self.splits(c, aimed=True)]
        if budget is not None:
            least = min(self.seconds(c, *split) for c, split in splits)
            return ArgumentError(
                f"`budget` must be at least {math.ceil(least)} seconds, which the fewest draws take, got {budget:g}; "
                "use more, fewer `num_bands` or a part of the dataset."
            )
        most = max(c.moments.score_snr(*split) for c, split in splits)
        return ArgumentError(
            f"`target_snr` must be at most {most:.3g} with up to {MOST_DRAWS} draws, got {target_snr:g}; use a budget."
        )


def _json(value: Any) -> Any:
    """Return dataclasses as dicts without their jackknife, tuples as lists, and None for what is not finite."""
    if is_dataclass(value):
        value = {name: one for name, one in vars(value).items() if name != "left_out"}
    if isinstance(value, Mapping):
        return {str(key): _json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_json(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
