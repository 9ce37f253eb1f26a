from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from carv_attrib import featurize, load_teacher
from carv_attrib.batches import encode_batch, read_batch
from carv_attrib.cli import main
from carv_attrib.config import FeaturizeConfig
from carv_attrib.data import open_dataset
from carv_attrib.errors import ArgumentError, CarvError, DataError, StoreMismatchError
from carv_attrib.estimator import build_estimator
from carv_attrib.noise_schedule import NoiseSchedule
from carv_attrib.planning import MOST_DRAWS, Plan, Planner, plan, possible_choices, starting_config
from carv_attrib.planning.costs import CostModel, UnitCosts, parse_budget
from carv_attrib.planning.forecast import (
    Candidate,
    Decay,
    Moments,
    build_candidate,
    fit_decay,
    jackknife_error,
    mean_product,
    sampling_variance,
    upstream_variance,
)
from carv_attrib.planning.report import format_bytes, format_seconds, save_plot
from carv_attrib.store import FeatureStore
from carv_attrib.variance import Measured
from tests.conftest import SETTINGS, FlatLinear, TinyTeacher, shorten_pilots

FREE = {name: value for name, value in SETTINGS.items() if name != "num_draws"} | {"micro_batch": 80}


@pytest.fixture(scope="module")
def made(dit_folder: Path, digits_folder: Path) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        shorten_pilots(patch)
        return plan(dit_folder, digits_folder, budget="1m", **FREE)


# Pure parts, against closed forms.


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("1m5s", 65), ("7", 7), (2.5, 2.5)]
)
def test_budgets(text: str | float, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["soon", "", "2 days", "-3", "0s", "h", "1m2h", float("nan")])
def test_bad_budgets(text: str | float) -> None:
    with pytest.raises(ArgumentError, match=r"`budget` must be a positive time, got .*; use 90s, 30m, 2h"):
        parse_budget(text)


@pytest.mark.parametrize("decay", [Decay(2.0, 0.0), Decay(0.0, 5.0), Decay(1.5, 4.0)])
def test_a_decay_goes_through_both_points(decay: Decay) -> None:
    found = fit_decay((4, 16), (decay(4), decay(16)))
    assert (found.first, found.second) == pytest.approx((decay.first, decay.second))


def test_no_coefficient_of_a_decay_is_negative() -> None:
    assert fit_decay((4, 16), (1.0, 0.5)) == Decay(6.0, 0.0)
    assert fit_decay((4, 16), (1.0, 0.01)) == Decay(0.0, (16 + 2.56) / 2)


def test_products_of_different_replicates_are_unbiased_for_squared_norms() -> None:
    truth = torch.tensor([1.0, -2.0, 0.5])
    generator = torch.Generator().manual_seed(0)
    found = [mean_product(*[truth + 3 * torch.randn(4, 3, generator=generator)] * 2) for _ in range(4000)]
    values = torch.tensor(found)
    error = float(values.std() / len(values) ** 0.5)
    assert float(values.mean()) == pytest.approx(float(truth.square().sum()), abs=4 * error)
    assert error < 0.2


def test_the_upstream_variance_ignores_what_draws_do_to_all_encodings_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (5, 4, 300, 2)  # draws encodings items dims
    encodings = 2 * torch.randn(1, *shape[1:], generator=generator)  # tr Cov = 8
    draws = 30 * torch.randn(shape[0], 1, *shape[2:], generator=generator)
    both = 3 * torch.randn(shape, generator=generator)
    assert upstream_variance(encodings + draws + both) == pytest.approx(8, rel=0.15)
    assert upstream_variance(draws + both) == pytest.approx(0, abs=0.5)


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = torch.tensor([1.0, 4.0, 2.0, 7.0], dtype=torch.float64)
    left_out = [float((values.sum() - one) / 3) for one in values]
    assert jackknife_error(left_out) == pytest.approx(float(values.std() / 2))


def test_moments_of_replicates_with_known_variances() -> None:
    generator = torch.Generator().manual_seed(0)
    count, pair = 400, (4, 16)
    truth = torch.randn(6, 3, generator=generator)
    expected = torch.randn(6, 5, generator=generator)  # scores of 6 queries
    features = tuple(truth + torch.randn(count, 6, 3, generator=generator) * (2 / k) ** 0.5 for k in pair)
    scores = tuple(expected + torch.randn(count, 6, 5, generator=generator) * (8 / k) ** 0.5 for k in pair)
    found = build_candidate("stratified", "uniform", pair, features, scores, 1.0, 0.5)
    squared_norm = float(truth.square().sum(1).mean())
    spread = float(expected.var(1).mean())
    for r, k in ((1, 4), (2, 8), (1, 64)):
        feature_error = found.feature_error(r, k)
        assert feature_error.value == pytest.approx((((1 + 6 / k) / r) / squared_norm) ** 0.5, rel=0.05)
        assert 0 < feature_error.standard_error < 0.05 * feature_error.value
        assert found.score_snr(r, k).value == pytest.approx((spread / ((0.5 + 8 / k) / r)) ** 0.5, rel=0.1)
    assert sampling_variance(features[0]) == pytest.approx(3 * 2 / 4, rel=0.1)


def test_the_expected_score_is_linear_in_one_over_the_number_of_draws() -> None:
    moments = Moments(
        (2, 4), 1.0, Decay(1.0, 0.0), 0.0, Decay(1.0, 0.0), 0.0, spread=(9.0, 6.0, 4.0)
    )  # 3, 2 at 2, 4: so 1
    for draws, expected in ((2, 3.0), (4, 2.0), (8, 1.5), (10**9, 1.0)):
        assert moments.score_snr(1, draws) == pytest.approx(expected * draws**0.5, rel=1e-3)


# What is chosen.

ZERO = Measured(0.0, 0.0)


def planner(settings: dict[str, Any], units: dict[str, float], num_examples: int = 1000) -> Planner:
    """Return a planner whose costs are zero but for some."""
    names = [name for name, hint in UnitCosts.__annotations__.items() if hint == "Measured"]
    measured = {name: Measured(units.get(name, 0.0), 0.0) for name in names}
    costs = CostModel(UnitCosts(**measured, record_bytes=0.0, memory_bytes=0, device_memory_bytes=0), num_examples, 8)
    settings = {"micro_batch": 4, "weighting": "uniform"} | settings
    config = starting_config(settings)
    teacher = TinyTeacher(FlatLinear(4), NoiseSchedule(torch.linspace(0.95, 0.05, 10), "epsilon"))
    return Planner(teacher, config, settings, costs)


def candidate(upstream: float = 0.0, first: float = 1.0, scheme: Any = "stratified") -> Candidate:
    moments = Moments((4, 16), 1.0, Decay(first, 0.0), upstream, Decay(1.0, 0.0), 0.0, (1.0, 1.0, 1.0))
    return Candidate(scheme, "uniform", moments, [moments] * 3)


def test_the_budget_goes_into_draws() -> None:
    # 1,000 examples in parts of 128 and batches of 32, and a pilot of 32 x 16 rows, a millisecond a row
    found = planner({}, {"draw": 1e-3})
    assert found.best(candidate(), 24.6, None) == (1, 24)
    assert found.best(candidate(), 24.5, None) == (1, 16)
    assert found.best(candidate(scheme="antithetic"), 31.0, None) == (1, 16)
    assert found.best(candidate(), 4.0, None) is None
    assert found.best(candidate(), 1e9, None) == (1, MOST_DRAWS)


def test_a_target_is_reached_in_the_least_time() -> None:
    found = planner({}, {"draw": 1e-3})
    assert found.best(candidate(), None, 3.9) == (1, 16)  # the SNR is sqrt(K)
    assert found.best(candidate(), None, 100.0) is None


def test_random_encodings_share_the_budget_at_the_optimal_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """K* = sqrt(c_up V_draw / (c_draw V_up)) = 12."""
    monkeypatch.setattr("carv_attrib.planning.MOST_DRAWS", 256)  # all are tried
    found = planner({"augmentation": "flip", "num_bands": 1, "micro_batch": 1}, {"draw": 1e-3, "encode_row": 9e-3})
    flipped = candidate(upstream=1.0, first=16.0)
    assert found.best_num_draws(flipped) == 12
    encodings, draws = found.best(flipped, 90.0, None) or (0, 0)
    assert (encodings, draws) == (4, 12)
    assert planner({}, {"draw": 1e-3}).best_num_draws(candidate()) is None


def test_what_is_given_is_kept() -> None:
    found = planner({"num_draws": 24, "augmentation": "flip", "num_encodings": 2}, {"draw": 1e-3})
    assert list(found.splits(candidate(), aimed=True)) == [(2, 24)]
    config = starting_config({"scheme": "iid", "weighting": "uniform"})
    assert possible_choices(config, {"scheme": "iid"}) == [("iid", "uniform"), ("iid", "pilot")]
    config = starting_config({})
    assert possible_choices(config, {}) == [(s, "uniform") for s in ("stratified", "antithetic", "orthogonal")]
    config = starting_config({"num_draws": 4})
    assert possible_choices(config, {"num_draws": 4}) == [("stratified", "uniform")]


def test_the_numbers_of_draws_fit_bands_and_scheme() -> None:
    for bands in (1, 3, 4, 20):
        config = starting_config({"num_bands": bands})
        assert config.estimator.num_bands == bands
        for scheme in ("stratified", "antithetic"):
            counts = planner({"num_bands": bands}, {}).draw_counts(scheme)
            assert all(replace(config.estimator, scheme=scheme, num_draws=k).num_replicates == 2 for k in counts[1:])


def test_the_best_snr_wins_and_the_feature_error_decides_a_draw() -> None:
    found = planner({}, {})
    plain, better = candidate(first=2.0), candidate(first=1.0, scheme="antithetic")
    assert found.choose({plain: (1, 8), better: (1, 8)}, None) is better
    clear = replace(plain, moments=replace(plain.moments, spread=(4.0, 4.0, 4.0)))
    clear = replace(clear, left_out=[clear.moments] * 3)
    assert found.choose({clear: (1, 8), better: (1, 8)}, None) is clear
    noisy = replace(clear, left_out=[replace(clear.moments, spread=(s, s, s)) for s in (1.0, 4.0, 9.0)])
    assert found.choose({noisy: (1, 8), better: (1, 8)}, None) is better


def test_the_disk_is_what_an_index_takes(tiny_index: Path) -> None:
    config = FeaturizeConfig.from_flat(SETTINGS)
    costs = planner({}, {}, num_examples=20).costs
    disk = replace(costs, proj_dim=48, units=replace(costs.units, record_bytes=0.0)).disk_bytes(config)
    files = [tiny_index / "kernel.safetensors", tiny_index / "index-00000.faiss", *tiny_index.glob("features/*")]
    headers = 1500 * len(files)
    assert disk <= sum(file.stat().st_size for file in files) <= disk + headers


def test_network_calls_are_counted_as_featurize_makes_them(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from carv_attrib import gradient

    calls = []
    real = gradient._project_rows
    monkeypatch.setattr(gradient, "_project_rows", lambda *args: calls.append(1) or real(*args))
    settings = SETTINGS | {"num_draws": 6, "batch_size": 3}
    featurize(dit_folder, digits_folder, tmp_path / "index", **settings)
    found = planner(settings | {"weighting": "balanced"}, {"draw": 1.0}, num_examples=20)
    assert found.seconds(candidate(), 1, 6) == 16 * len(calls)


# A real pilot of a tiny teacher.


def test_a_plan_keeps_to_its_budget(made: Plan) -> None:
    assert made.budget == 60
    assert 0 < made.recommended.seconds.value <= 60
    assert made.recommended in made.compared
    assert {forecast.scheme for forecast in made.compared} == {"stratified", "antithetic", "orthogonal"}
    assert made.recommended.feature_error.value > 0
    assert made.pilot_examples == 20
    shares = [share.value for share in vars(made.shares).values()]
    assert sum(shares) == pytest.approx(1)
    assert made.shares.upstream.value == 0
    assert made.best_num_draws is None
    assert all(unit.value > 0 for name, unit in vars(made.costs.units).items() if name in ("read", "draw", "byte"))


def test_the_command_repeats_what_was_given(made: Plan, dit_folder: Path) -> None:
    best = made.recommended
    for words in (
        f"carv-attrib featurize --teacher {dit_folder} --dataset ",
        "--output INDEX --num-bands 2",
        f"--scheme {best.scheme} --proposal uniform --num-encodings 1 --num-draws {best.num_draws}",
    ):
        assert words in made.command()
    FeaturizeConfig.from_flat(made.settings)


def test_a_plan_is_json(made: Plan) -> None:
    content = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert content["settings"] == made.recommended.settings()
    assert content["recommended"]["seconds"]["value"] == made.recommended.seconds.value
    assert "left_out" not in content["candidates"][0]


def test_the_pilot_foretells_the_error_of_other_draws(made: Plan, dit_folder: Path, digits_folder: Path) -> None:
    teacher = load_teacher(dit_folder, device="cpu")
    config = FeaturizeConfig.from_flat(FREE | {"num_draws": 8})
    batch = read_batch(open_dataset(digits_folder), range(20), teacher, skip_bad=False)
    estimator = build_estimator(teacher, config, 80, made.profile)
    encoded = encode_batch(estimator, batch)
    found = []
    for seed in range(1, 9):
        other = replace(estimator, config=replace(estimator.config, seed=seed))
        found.append(other.features(encoded, other.draws([0])).mean(1))
    features = torch.stack(found)
    error = (sampling_variance(features) * 20 / mean_product(features, features)) ** 0.5
    assert made.candidates[0].feature_error(1, 8).value == pytest.approx(error, rel=0.25)


def test_random_encodings(few_replicates: None, dit_folder: Path, digits_folder: Path) -> None:
    settings = FREE | {"augmentation": "flip", "scheme": "stratified", "num_bands": 1}
    made = plan(dit_folder, digits_folder, budget=30.0, **settings)
    assert made.shares.upstream.value > 0
    assert made.candidates[0].moments.features_upstream > 0
    assert made.best_num_draws is not None
    assert made.recommended.num_encodings > 1


def test_the_plot(tmp_path: Path, made: Plan) -> None:
    save_plot(made, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(CarvError, match=r"`plot` cannot be written to .*plan\.docx: .*; name a \.png"):
        save_plot(made, tmp_path / "plan.docx")


def test_the_plot_without_matplotlib(made: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(CarvError, match=r"`plot` needs matplotlib, which is not installed; `pip install 'carv-attrib"):
        save_plot(made, tmp_path / "plan.png")


# The command, and featurize with a plan.


def flags(settings: dict[str, Any]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_prints_everything(made: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("carv_attrib.planning.plan", lambda *places, **settings: asked.update(settings) or made)
    common = ("plan", "--teacher", "demo", "--dataset", "digits", "--num-bands", 2, "--budget", "1m")
    shown = run(*common, "--plot", tmp_path / "plan.png")
    assert shown.exit_code == 0, shown.output
    assert asked == {"num_bands": 2, "budget": "1m"}
    for words in ("Gradient norm", "between timesteps", "one draw", "feature error", "To expect of all 20", "disk"):
        assert words in shown.stdout
    assert shown.stdout.endswith(made.command() + "\n")
    assert (tmp_path / "plan.png").is_file()
    assert json.loads(run(*common, "--json").stdout) == made.to_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "soon"}, "`budget` must be a positive time, got 'soon'"),
        ({"target_snr": -1.0}, "`target_snr` must be a positive number, got -1.0; 3 is a fair one"),
        ({"budget": 3.0, "target_snr": 3.0}, "`budget` and `target_snr` exclude each other; give one of them"),
        ({"num_bands": 0}, "`num_bands` must be a whole number of at least 1, got 0"),
        ({"num_drawz": 4}, "unknown setting 'num_drawz'"),
        ({"num_draws": 6}, "`num_bands` must divide `num_draws`"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        plan("demo", "digits", **settings)


def test_aims_out_of_reach() -> None:
    error = planner({}, {"draw": 1e-3}).out_of_reach([candidate()], 1.0, None)
    assert str(error).startswith("`budget` must be at least 5 seconds, which the fewest draws take, got 1; use more")
    error = planner({}, {"draw": 1e-3}).out_of_reach([candidate()], None, 30.0)
    assert str(error) == "`target_snr` must be at most 22.6 with up to 512 draws, got 30; use a budget."


def test_too_few_examples(tmp_path: Path, dit_folder: Path, digits_folder: Path) -> None:
    for path in (*sorted(digits_folder.glob("1/*"))[:2], *sorted(digits_folder.glob("2/*"))[:1]):
        copy = tmp_path / path.relative_to(digits_folder)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="a plan needs at least 4 readable examples"):
        plan(dit_folder, tmp_path, **FREE)


def test_featurize_with_a_plan_goes_on_with_it(
    few_replicates: None, tmp_path: Path, dit_folder: Path, digits_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("carv_attrib.planning.MOST_DRAWS", 12)
    teacher = load_teacher(dit_folder, device="cpu")
    settings = FREE | {"scheme": "stratified", "budget": "1m"}
    store = featurize(teacher, digits_folder, tmp_path / "index", plan="auto", **settings)
    planned = store.manifest["plan"]
    assert planned["settings"]["num_draws"] == store.manifest["config"]["num_draws"] >= 4
    assert planned["budget"] == 60
    assert planned["recommended"]["seconds"]["value"] <= 60
    before = (tmp_path / "index" / "features" / "part-000001.safetensors").read_bytes()

    def no_second_plan(*args: Any, **keywords: Any) -> Any:
        raise AssertionError("planned again")

    monkeypatch.setattr("carv_attrib.planning.study", no_second_plan)
    (tmp_path / "index" / "features" / "part-000001.safetensors").unlink()
    featurize(teacher, digits_folder, tmp_path / "index", plan="auto", **settings)
    assert (tmp_path / "index" / "features" / "part-000001.safetensors").read_bytes() == before
    assert FeatureStore.open(tmp_path / "index").manifest["plan"] == planned
    with pytest.raises(StoreMismatchError, match=r"plan\.budget: stored 60\.0, requested 120\.0"):
        featurize(teacher, digits_folder, tmp_path / "index", plan="auto", **(settings | {"budget": "2m"}))
    other = planned["settings"]["num_draws"] + 4
    with pytest.raises(StoreMismatchError, match=f"config.num_draws: stored {other - 4}, requested {other}"):
        featurize(teacher, digits_folder, tmp_path / "index", plan="auto", num_draws=other, **settings)


def test_featurize_with_a_plan_for_an_index_without_one(
    tiny_index: Path, dit_folder: Path, digits_folder: Path
) -> None:
    with pytest.raises(StoreMismatchError, match="was begun without a plan; leave `plan` out, or use another folder"):
        featurize(dit_folder, digits_folder, tiny_index, plan="auto", **FREE)


@pytest.mark.usefixtures("as_users_run_it")
def test_aims_without_a_plan(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"`budget` is for a plan, got '1h' without one; add `plan` auto"):
        featurize("demo", "digits", tmp_path, budget="1h")
    with pytest.raises(ArgumentError, match=r"`plan` must be one of auto, got 'manual'"):
        featurize("demo", "digits", tmp_path, plan="manual")  # type: ignore[arg-type]
    result = run("featurize", "--teacher", "demo", "--dataset", "digits", "--output", tmp_path, "--target-snr", 3)
    assert result.exit_code == 2
    assert "`target_snr` is for a plan, got 3.0 without one; add `plan` auto" in result.output


def test_figures_as_people_say_them() -> None:
    assert [format_seconds(x) for x in (0.5, 59.9, 60, 3600)] == ["500 ms", "59.9 s", "1m00s", "1h00m"]
    assert [format_bytes(x) for x in (0, 1500, 2e9, 3e15)] == ["0 B", "1.5 kB", "2 GB", "3e+03 TB"]


def test_the_package_loads_no_plotting() -> None:
    code = "import sys, carv_attrib; print([m for m in ('diffusers', 'faiss', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
