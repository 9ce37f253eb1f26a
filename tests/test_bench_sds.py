"""What can break in `scripts/bench_sds.py`: the renderer, the reuse of a render, and the accounting."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import bench_sds
import pytest
import torch
from bench_sds import Design, Distillation, Judge
from PIL import Image
from torch import Tensor

from carv_attrib import load_teacher
from carv_attrib.noise_schedule import NoiseSchedule
from carv_attrib.sampling import Draws, importance_proposal, sample_draws, uniform_proposal
from carv_attrib.variance import Costs, Measured, RunningVariance


@pytest.fixture(scope="module")
def problem() -> Distillation:
    teacher = load_teacher("demo")
    uniform = uniform_proposal(teacher.noise_schedule.num_timesteps)
    return Distillation(teacher, 3, {"uniform": uniform, "pilot": uniform})


@pytest.fixture(scope="module")
def judge(problem: Distillation) -> Judge:
    return bench_sds.fit_judge(problem.teacher)


def even_scene(density: float) -> Tensor:
    """A cube of one density that shines with all its light."""
    raw = math.log(math.expm1(density / bench_sds.DENSITY_SCALE))
    size = (bench_sds.GRID_SIZE,) * 3
    return torch.stack([torch.full(size, raw), torch.full(size, 50.0)])


def test_light_of_an_even_medium_is_one_minus_transmittance() -> None:
    density, step = torch.full((1, 7, 2, 2), 0.3, dtype=torch.float64), torch.full((2, 2), 0.25, dtype=torch.float64)
    light = bench_sds.composite(density, torch.ones_like(density), step)
    torch.testing.assert_close(light, torch.full_like(light, 1 - math.exp(-0.3 * 7 * 0.25)))


def test_what_is_in_front_hides_what_is_behind() -> None:
    density, emission = torch.full((1, 2, 1, 1), 1000.0), torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    step = torch.ones(1, 1)
    assert bench_sds.composite(density, emission, step).item() == pytest.approx(1)
    assert bench_sds.composite(density, emission.flip(1), step).item() == pytest.approx(0)


@pytest.mark.parametrize("degrees", [0, 30])
def test_ray_through_a_cube_is_as_long_as_the_cube(degrees: float) -> None:
    azimuth = torch.tensor([math.radians(degrees)])
    pixels = bench_sds.render(even_scene(0.5), azimuth)[0, 0]
    voxel = 2 / (bench_sds.GRID_SIZE - 1)  # interpolation to nothing adds half a voxel at each side
    length = (2 + voxel) / math.cos(azimuth.item())
    middle = bench_sds.IMAGE_SIZE // 2
    assert (pixels[middle, middle].item() + 1) / 2 == pytest.approx(1 - math.exp(-0.5 * length), rel=0.02)


def test_empty_space_is_black() -> None:
    assert bench_sds.render(even_scene(1e-6), torch.zeros(1)).max() < -0.999


def test_turning_the_camera_is_turning_the_scene() -> None:
    scene = bench_sds.new_scene(0) + torch.linspace(-1, 1, bench_sds.GRID_SIZE)
    turned = scene.flip(1).transpose(1, 3)
    side = bench_sds.render(scene, torch.tensor([math.pi / 2]))
    torch.testing.assert_close(side, bench_sds.render(turned, torch.zeros(1)), atol=1e-4, rtol=1e-4)
    assert (side - bench_sds.render(scene, torch.zeros(1))).abs().max() > 0.1


def test_encoding_is_the_teachers(problem: Distillation) -> None:
    pixels = bench_sds.render(bench_sds.new_scene(0), torch.tensor([0.0, 0.3]))
    torch.testing.assert_close(bench_sds.encode(problem.teacher, pixels), problem.teacher.encode(pixels))


def test_gradients_reach_density_and_emission(problem: Distillation) -> None:
    gradient = problem.estimate(bench_sds.new_scene(0), Design(1, 2), seed=0, purpose="test")
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(1).norm(dim=1) > 1e-3).all()


def test_gradient_is_that_of_the_residual_dotted_with_the_latents(problem: Distillation) -> None:
    """A step along the gradient changes `<residual, latents>` by what the gradient says."""
    scene, azimuths = bench_sds.new_scene(0), torch.tensor([0.2])
    draws = sample_draws(problem.proposals["uniform"], (4, 8, 8), num_draws=2, ids=[0])
    latents = bench_sds.encode(problem.teacher, bench_sds.render(scene, azimuths))
    residual = bench_sds.latent_gradients(problem.teacher, latents, draws, 3).mean(1)
    gradient = bench_sds.scene_gradient(problem.teacher, scene, azimuths, draws, 3)
    step = 0.01 * gradient / gradient.norm()
    ahead, behind = (bench_sds.encode(problem.teacher, bench_sds.render(scene + x, azimuths)) for x in (step, -step))
    slope = ((ahead - behind) * residual).sum() / 0.02
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=0.02)


def test_reuse_is_the_mean_of_separate_gradients(problem: Distillation) -> None:
    scene, azimuths = bench_sds.new_scene(0), torch.tensor([0.2])
    draws = sample_draws(problem.proposals["uniform"], (4, 8, 8), num_draws=4, ids=[0])
    together = bench_sds.scene_gradient(problem.teacher, scene, azimuths, draws, 3)
    alone = [
        Draws(draws.timesteps[:, [k]], draws.noise[:, [k]], draws.weights[:, [k]], (1,))
        for k in range(draws.noise.shape[1])
    ]
    separate = [bench_sds.scene_gradient(problem.teacher, scene, azimuths, one, 3) for one in alone]
    torch.testing.assert_close(together, torch.stack(separate).mean(0), atol=1e-6, rtol=1e-4)
    assert (separate[0] - separate[1]).norm() > 0.1 * together.norm()


def test_single_draws_average_to_the_estimate(problem: Distillation) -> None:
    scene = bench_sds.new_scene(0)
    _, gradients = bench_sds.single_draws(problem, scene, cameras=3, draws=2, purpose="same")
    estimate = problem.estimate(scene, Design(3, 2), seed=0, purpose="same").flatten()
    torch.testing.assert_close(gradients.mean((0, 1)), estimate, atol=1e-6, rtol=1e-4)


@dataclass
class SquareTeacher:
    """Predicts `z_t + z_t^2`, whose mean over noise has a closed form."""

    noise_schedule: NoiseSchedule

    def condition(self, labels: list[int], prompts: None) -> dict:
        return {}

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, condition: dict) -> Tensor:
        return noisy_latents + noisy_latents**2


@pytest.mark.parametrize("scheme", ["iid", "stratified", "antithetic", "orthogonal"])
@pytest.mark.parametrize("skewed", [False, True])
def test_every_scheme_is_unbiased(scheme: str, skewed: bool) -> None:
    signal = torch.linspace(0.95, 0.05, 10)
    teacher = SquareTeacher(NoiseSchedule(signal, "epsilon"))
    proposal = importance_proposal(torch.arange(1.0, 11)) if skewed else uniform_proposal(10)
    draws = sample_draws(proposal, (3,), num_draws=8, scheme=scheme, ids=range(100))
    latents = torch.tensor([0.5, -1.0, 2.0]).expand(100, 3)
    with torch.no_grad():
        estimates = bench_sds_latent_means(teacher, latents, draws)
    sigma_squared = 1 - signal
    wanted = [
        float((sigma_squared * (signal.sqrt() * z + signal * z**2 + sigma_squared)).mean()) for z in (0.5, -1.0, 2.0)
    ]
    error = estimates.std(0) / len(estimates) ** 0.5
    assert ((estimates.mean(0) - torch.tensor(wanted)).abs() < 4 * error).all()


def bench_sds_latent_means(teacher: SquareTeacher, latents: Tensor, draws: Draws) -> Tensor:
    """Latents as vectors: the script's are pictures, (channels, height, width)."""
    pictures = replace(draws, noise=draws.noise[..., None, None])
    return bench_sds.latent_gradients(teacher, latents[..., None, None], pictures, 0).mean(1)[..., 0, 0]


def test_pilot_favours_timesteps_with_large_gradients() -> None:
    timesteps = torch.arange(0, 1000, 5).view(50, 4)
    gradients = torch.where(timesteps < 500, 1.0, 3.0)[..., None] * torch.tensor([0.6, 0.8])
    density = bench_sds.pilot_proposal(timesteps, gradients).density
    assert (density[900] / density[100]).item() == pytest.approx((0.9 * 1.5 + 0.1) / (0.9 * 0.5 + 0.1), rel=0.02)


def test_squared_deviations_average_to_the_trace_of_the_covariance() -> None:
    replicates, running = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), RunningVariance()
    for row in replicates:
        running.add(row)
    assert bench_sds.squared_deviations(replicates).mean().item() == pytest.approx(running.total_variance().item())


def test_bias_scores_count_standard_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(1000, 2, generator=generator) for _ in range(2))
    shifted = ours + torch.tensor([0.0, 0.5])
    still, moved = bench_sds.bias_scores(shifted, theirs, torch.eye(2)).tolist()
    assert abs(still) < 3
    assert moved == pytest.approx(0.5 / math.sqrt(2 / 1000), abs=3)


def test_jackknife_error_covers_the_known_components() -> None:
    generator = torch.Generator().manual_seed(0)
    values = 2 * torch.randn(256, 1, 1, generator=generator) + torch.randn(256, 4, 1, generator=generator)
    components, errors = bench_sds.components_and_errors(values)
    assert abs(components.upstream - 4) < 3 * errors["upstream"] < 2.5
    assert abs(components.draw - 1) < 3 * errors["draw"] < 0.5


def test_multipliers_weigh_efficiency_by_cost() -> None:
    parts = {"render": 2.0, "encode": 1.0, "denoise 8": 8.0, "(1, 1) iid, uniform": 5.0, "(1, 8) iid, uniform": 10.0}
    seconds = {name: {"median": value} for name, value in parts.items()}
    result = bench_sds.multipliers(Design(1, 8, "antithetic", "pilot"), Measured(8.0, 1.0), seconds)
    assert {name: x.value for name, x in result.items()} == pytest.approx(
        {"measured": 8 * 4 / 11, "0": 1, "1": 8 * 2 / 9, "5": 8 * 6 / 13, "clock": 4}
    )
    assert result["1"].standard_error == pytest.approx(2 / 9)


def test_arms_spend_the_same_and_start_alike(problem: Distillation, judge: Judge, tmp_path: Path) -> None:
    contest = bench_sds.Contest(problem, Costs(10.0, 1.0), 8 * 18.0, judge)
    assert contest.checkpoints(Design(1, 8)) == [1, 2, 4, 8]
    assert contest.checkpoints(Design(1, 1)) == [2, 3, 7, 13]
    first, last = problem.optimise(Design(1, 1), learning_rate=0.1, checkpoints=[0, 2], seed=4)
    assert torch.equal(first, bench_sds.new_scene(4))
    assert (last - first).abs().max().item() == pytest.approx(0.2, rel=0.2)
    verdicts, _ = contest.run(Design(8, 1), 0.1, 3)
    assert [0 <= x["probability"] <= 1 for x in verdicts] == [True] * 4
    bench_sds.draw_picture({"a": {3: first}, "b": {3: last}}, [3], tmp_path / "views.png")
    with Image.open(tmp_path / "views.png") as picture:
        assert picture.width > 500


def test_real_digit_is_judged_to_be_what_it_is(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge.accuracy > 0.9
    row = int((judge.labels == 7).nonzero()[0])
    monkeypatch.setattr(bench_sds, "render", lambda scene, azimuths: judge.digits[row].expand(len(azimuths), 1, 32, 32))
    verdict = judge(bench_sds.new_scene(0), 7)
    assert verdict["probability"] > 0.9
    assert verdict["accuracy"] == 1
    assert verdict["distance"] == pytest.approx(0, abs=1e-3)
    assert judge(bench_sds.new_scene(0), 1)["distance"] > 0.1
