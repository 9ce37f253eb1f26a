"""Memory of network calls: measured, bounded by a training step, searched for what fits, and outlived."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from carv_attrib import featurize, memory
from carv_attrib.cli import main
from carv_attrib.config import FeaturizeConfig
from carv_attrib.data import open_dataset
from carv_attrib.errors import ArgumentError, TeacherError
from carv_attrib.estimator import Encoded, Estimator, build_estimator, measure_profile
from carv_attrib.gradient import project_gradient, row_objective
from carv_attrib.manifest import choose_micro_batch, measure_micro_batch, open_or_create
from carv_attrib.memory import CallCost, free_host_bytes, largest_that_fits, less_memory, measure_call, peak_bytes
from carv_attrib.planning import plan
from carv_attrib.sampling import Draws
from carv_attrib.teacher import Teacher
from carv_attrib.teachers import load_teacher
from tests.conftest import SETTINGS, TinyTeacher

CPU = torch.device("cpu")
FAMILIES = ("ddpm_folder", "dit_sigma_folder", "sd_folder", "demo", "demo-pixels")
KINDS_OF_DENOISER = FAMILIES[:3]
ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:1] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
)


@pytest.fixture
def teacher_of(request: pytest.FixtureRequest) -> Callable[[str], Teacher]:
    """Return a function that loads the teacher of a family, or a packaged one."""
    return lambda name: load_teacher(request.getfixturevalue(name) if name.endswith("folder") else name)


def case_of(teacher: Teacher, rows: int, **settings: Any) -> tuple[Estimator, Encoded, Draws]:
    """Return an estimator of one draw, and as many random examples as fill one call of so many rows."""
    config = FeaturizeConfig.from_flat({"num_draws": 1, "num_bands": 1, "proj_dim": 64, **settings})
    estimator = build_estimator(teacher, config, rows, profile=None)
    latents = torch.randn(rows, 1, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    condition = teacher.condition(
        [0] * rows if teacher.condition_kind == "label" else None,
        ["fox"] * rows if teacher.condition_kind == "prompt" else None,
    )
    return estimator, Encoded(latents, condition), estimator.draws([0])


def training_step(teacher: Teacher, encoded: Encoded, draws: Draws) -> None:
    """Run forward and backward with gradients of all weights, and keep them, as before an optimizer's step."""
    latents = encoded.latents[:, 0]
    noise, timesteps = draws.noise[0].expand_as(latents), draws.timesteps[0].expand(len(latents))
    teacher.denoiser.requires_grad_(True)
    noisy_latents = teacher.noise_schedule.add_noise(latents, noise, timesteps)
    output = teacher.predict(noisy_latents, timesteps, encoded.condition)
    target = teacher.noise_schedule.target(latents, noise, timesteps)
    row_objective("loss", output, target).sum().backward()  # type: ignore[no-untyped-call]
    teacher.denoiser.requires_grad_(False)


def test_the_peak_is_of_what_lives_at_once() -> None:
    def work() -> Tensor:
        ones = torch.ones(1000, 1000)
        twos = ones + 1
        del ones
        return twos * 2

    assert 8_000_000 <= peak_bytes(work, CPU) < 8_001_000  # two of three matrices of 4 MB


def test_a_call_costs_its_peak_and_its_shortest_time() -> None:
    made = []
    cost = measure_call(lambda: made.append(torch.ones(500, 1000)), 7, CPU)
    assert cost.rows == 7
    assert 2_000_000 <= cost.peak_bytes < 2_001_000
    assert len(made) == 4
    assert 0 < cost.seconds < 1


@pytest.mark.parametrize("rows", [4, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_features_take_no_more_memory_than_a_training_step(
    teacher_of: Callable[[str], Teacher], family: str, rows: int
) -> None:
    teacher = teacher_of(family)
    rank = 1 if family in KINDS_OF_DENOISER else 8  # they have 4 to 8 channels, a fraction of which is kept
    estimator, encoded, draws = case_of(teacher, rows, rank=rank)
    kept = [estimator.project(encoded, draws, rows)]  # whatever is made once is made here
    peak = peak_bytes(lambda: kept.append(estimator.project(encoded, draws, rows)), CPU)
    assert peak <= peak_bytes(lambda: training_step(teacher, encoded, draws), CPU) + kept[1].nbytes


@pytest.mark.parametrize(
    ("fixed", "per_row", "most", "budget", "expected"),
    [
        (0, 10, 256, 1e4, 256),
        (0, 10, 96, 1e4, 96),
        (0, 10, 96, 950.0, 64),
        (0, 10, 256, 640.0, 64),
        (0, 10, 256, 639.0, 32),
        (600, 1, 256, 1e3, 256),
        (600, 1, 256, 700.0, 64),
        (5000, 10, 256, 1e3, 1),
        (0, 10, 1, 1e3, 1),
    ],
)
def test_the_largest_power_of_two_that_fits(fixed: int, per_row: int, most: int, budget: float, expected: int) -> None:
    tried = []

    def measure(rows: int) -> CallCost:
        tried.append(rows)
        return CallCost(rows, fixed + per_row * rows, 0.01 * rows)

    assert largest_that_fits(measure, most, budget) == expected
    assert fixed + per_row * max(tried) <= max(budget, fixed + 2 * per_row)  # found by measuring, not by running out


def test_a_line_that_bends_is_believed_where_it_was_measured() -> None:
    peaks = {1: 10, 2: 20, 4: 40, 8: 1000}
    assert largest_that_fits(lambda rows: CallCost(rows, peaks[rows], 0.01 * rows), 256, 500.0) == 4


def test_rows_that_take_longer_in_larger_calls_are_not_worth_it() -> None:
    seconds_a_row = {1: 2.0, 2: 1.1, 4: 1.0, 8: 1.05, 16: 1.2, 32: 1.5}
    costs = {rows: CallCost(rows, rows, 1e-3 * rows * seconds) for rows, seconds in seconds_a_row.items()}
    assert largest_that_fits(lambda rows: costs[rows], 32, 1e3) == 8


def test_a_slow_call_is_not_tried_with_more_rows() -> None:
    tried = []

    def measure(rows: int) -> CallCost:
        tried.append(rows)
        return CallCost(rows, rows, 20.0 * rows)

    assert largest_that_fits(measure, 256, 1e3) == 2
    assert tried == [1, 2]


def test_running_out_while_measuring_ends_the_search() -> None:
    def measure(rows: int) -> CallCost:
        if rows > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return CallCost(rows, rows, 0.01 * rows)

    assert largest_that_fits(measure, 256, 1e3) == 4

    def broken(rows: int) -> CallCost:
        raise RuntimeError("another error")

    with pytest.raises(RuntimeError, match="another error"):
        largest_that_fits(broken, 256, 1e3)


@pytest.mark.parametrize("family", KINDS_OF_DENOISER)
def test_auto_measures_real_calls_of_every_family(
    teacher_of: Callable[[str], Teacher], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "SLOWER", 1e9)  # memory decides, not the clock
    teacher = teacher_of(family)
    config = FeaturizeConfig.from_flat(
        {"micro_batch": "auto", "num_draws": 3, "num_bands": 1, "batch_size": 4, "proj_dim": 512}
    )
    assert choose_micro_batch(teacher, config) == 12  # all draws of a batch
    estimator, encoded, draws = case_of(teacher, 4, proj_dim=512)
    peak = peak_bytes(lambda: estimator.project(encoded, draws, 4), CPU)
    monkeypatch.setattr("carv_attrib.manifest.call_budget", lambda device: 1.5 * peak)
    assert measure_micro_batch(teacher, config) == 4


def test_auto_goes_into_the_manifest_and_a_resume_keeps_it(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def measured(teacher: Teacher, config: FeaturizeConfig) -> int:
        calls.append(config.execution.micro_batch)
        return 8

    monkeypatch.setattr("carv_attrib.manifest.measure_micro_batch", measured)
    settings = SETTINGS | {"micro_batch": "auto"}
    store = featurize(dit_folder, digits_folder, tmp_path / "index", **settings)
    assert store.manifest["micro_batch"] == 8
    assert "micro_batch" not in store.manifest["config"]
    featurize(dit_folder, digits_folder, tmp_path / "index", **settings)
    config = FeaturizeConfig.from_flat(settings)
    _, again = open_or_create(load_teacher(dit_folder), open_dataset(digits_folder), tmp_path / "index", config)
    assert again.micro_batch == 8
    assert calls == ["auto"]


@pytest.mark.parametrize(("text", "expected"), [("64", 64), ("auto", "auto")])
@pytest.mark.parametrize("in_a_file", [False, True])
def test_the_flag_takes_a_number_or_auto(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: object, in_a_file: bool
) -> None:
    seen = []

    def stop(*arguments: object, **settings: Any) -> None:
        seen.append(FeaturizeConfig.from_flat(settings).execution.micro_batch)
        raise ArgumentError("that was all.")

    monkeypatch.setattr("carv_attrib.pipeline.featurize", stop)
    (tmp_path / "config.yaml").write_text(f"micro-batch: {text}\n")
    more = ["--config", str(tmp_path / "config.yaml")] if in_a_file else ["--micro-batch", text]
    CliRunner().invoke(main, ["featurize", "--teacher", "demo", "--dataset", "digits", "--output", "x", *more])
    assert seen == [expected]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("text", ["most", "0", "-3", "1.5"])
def test_another_word_for_the_flag_is_one_line(tmp_path: Path, text: str) -> None:
    flags = ["--teacher", "demo", "--dataset", "digits", "--output", str(tmp_path / "x"), "--micro-batch", text]
    result = CliRunner().invoke(main, ["featurize", *flags])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "`micro_batch` must be a whole number of at least 1, or auto, got" in result.stderr


def test_a_plan_measures_once_and_goes_on_with_the_number(
    dit_folder: Path, digits_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def measured(teacher: Teacher, config: FeaturizeConfig) -> int:
        calls.append(config.execution.micro_batch)
        return 64

    def stop(teacher: Teacher, examples: object, config: FeaturizeConfig, *arguments: object) -> None:
        calls.append(config.execution.micro_batch)
        raise ArgumentError("that was all.")

    monkeypatch.setattr("carv_attrib.manifest.measure_micro_batch", measured)
    monkeypatch.setattr("carv_attrib.planning.study", stop)
    with pytest.raises(ArgumentError, match="that was all"):
        plan(dit_folder, digits_folder, micro_batch="auto", device="cpu")
    assert calls == ["auto", 64]


def test_only_a_cpu_and_cuda_tell_their_memory() -> None:
    message = "`micro_batch` auto cannot measure the memory of `device` meta; give a number"
    with pytest.raises(ArgumentError, match=message):
        memory.call_budget(torch.device("meta"))
    with pytest.raises(ArgumentError, match=message):
        peak_bytes(lambda: None, torch.device("meta"))


def write(folder: Path, files: dict[str, str]) -> Path:
    """Write files below a folder, and return it."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


MEMINFO = {"proc/meminfo": "MemTotal: 4000 kB\nMemFree: 100 kB\nMemAvailable: 2000 kB\n"}
VERSION_2 = {
    "proc/self/cgroup": "0::/user/job\n",
    "sys/fs/cgroup/user/job/memory.max": "max\n",
    "sys/fs/cgroup/user/job/memory.current": "1000\n",
    "sys/fs/cgroup/user/job/memory.stat": "anon 900\ninactive_file 100\n",
    "sys/fs/cgroup/user/memory.max": "90000\n",
    "sys/fs/cgroup/user/memory.current": "30000\n",
    "sys/fs/cgroup/user/memory.stat": "inactive_file 5000\n",
}
VERSION_1 = {
    "proc/self/cgroup": "4:cpu,memory:/on/the/host\n3:pids:/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "50000\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "30000\n",
    "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 2000\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (MEMINFO, 2_048_000),
        (MEMINFO | VERSION_2, 65_000),
        (MEMINFO | VERSION_1, 22_000),
        (MEMINFO | VERSION_1 | {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}, 2_048_000),
        (MEMINFO | VERSION_1 | {"sys/fs/cgroup/memory/memory.limit_in_bytes": "10000"}, 0),
    ],
)
def test_free_memory_is_the_least_of_the_machine_and_its_groups(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    assert free_host_bytes(write(tmp_path, files)) == expected


def test_free_memory_of_a_system_that_tells_nothing_is_all_there_is(tmp_path: Path) -> None:
    assert free_host_bytes(tmp_path) >= free_host_bytes() > 0


class Scarce:
    """`project_gradient` with memory for so many rows."""

    def __init__(self, rows: int, error: Callable[[], BaseException]) -> None:
        self.rows, self.error, self.calls = rows, error, list[int]()

    def __call__(self, *args: Any, micro_batch: int, **settings: Any) -> Tensor:
        """Return the gradients, or raise."""
        self.calls.append(micro_batch)
        if micro_batch > self.rows:
            raise self.error()
        return project_gradient(*args, micro_batch=micro_batch, **settings)


ERRORS = [
    lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    lambda: RuntimeError(f"{ALLOCATOR} 8 bytes. Error code 12 (Cannot allocate memory)"),
    lambda: MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS)
def test_features_survive_running_out_of_memory_and_remember_it(
    dit_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Callable[[], BaseException],
) -> None:
    estimator, encoded, draws = case_of(load_teacher(dit_folder), 12)
    expected = estimator.features(encoded, draws)
    scarce = Scarce(3, error)
    monkeypatch.setattr("carv_attrib.estimator.project_gradient", scarce)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(estimator.features(encoded, draws), expected, rtol=1e-4, atol=1e-5)
    assert scarce.calls == [12, 6, 3, 3]
    assert [record.name for record in caplog.records] == ["carv_attrib.memory"] * 2
    assert caplog.messages[1].startswith("out of memory: network calls have 3 rows instead of 6 from here on")
    assert "`--micro-batch 3` has them so" in caplog.messages[1]
    assert "\n" not in caplog.messages[1]


def test_the_pilot_survives_too(dit_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estimator, encoded, _ = case_of(load_teacher(dit_folder), 12)
    expected = measure_profile(estimator, encoded, ["x"] * 12)
    scarce = Scarce(6, MemoryError)
    monkeypatch.setattr("carv_attrib.estimator.project_gradient", scarce)
    assert measure_profile(estimator, encoded, ["x"] * 12).rms_norms == pytest.approx(expected.rms_norms, rel=1e-4)
    assert scarce.calls == [12, 6]


@pytest.mark.parametrize("error", ERRORS)
def test_one_row_that_does_not_fit_is_one_line(
    dit_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]
) -> None:
    estimator, encoded, draws = case_of(load_teacher(dit_folder), 4)
    scarce = Scarce(0, error)
    monkeypatch.setattr("carv_attrib.estimator.project_gradient", scarce)
    message = "out of memory with one row for each network call; use a smaller `dtype`, `gradient_checkpointing`, or"
    with pytest.raises(TeacherError, match=message) as caught:
        estimator.features(encoded, draws)
    assert "\n" not in str(caught.value)
    assert scarce.calls == [4, 2, 1]


def test_other_errors_are_not_taken_for_a_lack_of_memory(dit_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estimator, encoded, draws = case_of(load_teacher(dit_folder), 4)
    scarce = Scarce(0, lambda: RuntimeError("shapes do not match"))
    monkeypatch.setattr("carv_attrib.estimator.project_gradient", scarce)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        estimator.features(encoded, draws)
    assert scarce.calls == [4]


@pytest.mark.parametrize("family", KINDS_OF_DENOISER)
def test_recomputed_activations_give_the_same_features_in_less_memory(
    teacher_of: Callable[[str], Teacher], family: str
) -> None:
    teacher = teacher_of(family)
    estimator, encoded, draws = case_of(teacher, 16, rank=1)  # of 4 to 8 channels: else blocks are most of it
    features = estimator.features(encoded, draws)
    peak = peak_bytes(lambda: estimator.project(encoded, draws, 16), CPU)
    with less_memory(teacher.denoiser, gradient_checkpointing=True, channels_last=False):
        torch.testing.assert_close(estimator.features(encoded, draws), features, rtol=0, atol=0)
        assert peak_bytes(lambda: estimator.project(encoded, draws, 16), CPU) < 0.95 * peak
    assert not teacher.denoiser.is_gradient_checkpointing


def test_a_denoiser_that_recomputes_anyway_goes_on_with_it(dit_folder: Path) -> None:
    denoiser: Any = load_teacher(dit_folder).denoiser
    denoiser.enable_gradient_checkpointing()
    with less_memory(denoiser, gradient_checkpointing=True, channels_last=False):
        assert denoiser.is_gradient_checkpointing
    assert denoiser.is_gradient_checkpointing


def test_a_denoiser_that_cannot_recompute_is_one_line(linear_teacher: TinyTeacher) -> None:
    message = "`gradient_checkpointing` is not supported by .* FlatLinear; leave it out"
    with (
        pytest.raises(ArgumentError, match=message),
        less_memory(linear_teacher.denoiser, gradient_checkpointing=True, channels_last=False),
    ):
        pass


@pytest.mark.parametrize("family", ["ddpm_folder", "sd_folder"])
def test_channels_last_differs_by_rounding_and_is_undone(teacher_of: Callable[[str], Teacher], family: str) -> None:
    teacher = teacher_of(family)
    estimator, encoded, draws = case_of(teacher, 4)
    features = estimator.features(encoded, draws)
    seen = []
    handle = teacher.denoiser.conv_in.register_forward_hook(  # type: ignore[union-attr]
        lambda module, args, output: seen.append(module.weight.is_contiguous(memory_format=torch.channels_last))
    )
    try:
        with less_memory(teacher.denoiser, gradient_checkpointing=False, channels_last=True):
            inner = estimator.features(encoded, draws)
    finally:
        handle.remove()
    assert seen == [True]
    assert (inner - features).norm() < 1e-5 * features.norm()
    assert all(weight.is_contiguous() for weight in teacher.denoiser.parameters())
    torch.testing.assert_close(estimator.features(encoded, draws), features, rtol=0, atol=0)


@pytest.mark.usefixtures("few_replicates")
def test_featurize_and_plan_use_the_settings_and_undo_them(
    tmp_path: Path, dit_folder: Path, digits_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser: Any = (teacher := load_teacher(dit_folder)).denoiser
    seen = []

    def watched(*arguments: Any, **keywords: Any) -> Any:
        weight = denoiser.pos_embed.proj.weight
        seen.append((denoiser.is_gradient_checkpointing, weight.is_contiguous(memory_format=torch.channels_last)))
        return project_gradient(*arguments, **keywords)

    monkeypatch.setattr("carv_attrib.estimator.project_gradient", watched)
    flags = {"gradient_checkpointing": True, "channels_last": True}
    store = featurize(teacher, digits_folder, tmp_path / "index", **SETTINGS, **flags)
    plan(teacher, digits_folder, **SETTINGS, **flags)
    assert set(seen) == {(True, True)}
    assert not denoiser.is_gradient_checkpointing
    assert denoiser.pos_embed.proj.weight.is_contiguous()
    assert not set(flags) & set(store.manifest["config"])
