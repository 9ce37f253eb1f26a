"""The one-step distillation benchmark: its gradient, its variances and its metric."""

from __future__ import annotations

from dataclasses import replace

import bench_distillation as bench
import pytest
import torch
from bench_distillation import METHODS, State
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from carv_attrib.sampling import Draws, importance_proposal, uniform_proposal
from carv_attrib.teachers._diffusers import DiffusersTeacher, schedule_of

UNIFORM = uniform_proposal(bench.num_levels())
SKEWED = importance_proposal(torch.linspace(1, 5, bench.num_levels()))


def tiny_teacher(seed: int) -> DiffusersTeacher:
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=2,
        mid_block_type=None,
    )
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    return DiffusersTeacher(
        source="tiny",
        fingerprint="",
        pixel_spec=bench.PIXELS,
        latent_shape=(1, 8, 8),
        noise_schedule=schedule_of(scheduler),
        condition_kind="none",
        num_classes=0,
        denoiser=unet.eval(),
    )


@pytest.fixture
def state() -> State:
    return State(tiny_teacher(0), tiny_teacher(1), tiny_teacher(2))


@pytest.fixture
def noise() -> Tensor:
    return bench.upstream_noise(3, torch.Generator().manual_seed(0))


def parameter_gradient(state: State, noise: Tensor, draws: Draws) -> Tensor:
    state.generator.denoiser.zero_grad()
    bench.add_parameter_gradient(state, noise, draws)
    return torch.cat([p.grad.flatten() for p in state.generator.denoiser.parameters() if p.grad is not None])


@pytest.mark.parametrize(("name", "proposal"), [("strata", UNIFORM), ("importance + antithetic", SKEWED)])
def test_reuse_is_the_mean_of_separate_gradients(state, noise, name, proposal):
    draws = bench.draws_of(METHODS[name], proposal, 4, 0, len(noise))
    singles = [
        replace(draws, timesteps=draws.timesteps[:, [k]], noise=draws.noise[:, [k]], weights=draws.weights[:, [k]])
        for k in range(4)
    ]
    mean = torch.stack([parameter_gradient(state, noise, single) for single in singles]).mean(0)
    torch.testing.assert_close(parameter_gradient(state, noise, draws), mean, rtol=1e-3, atol=1e-4 * mean.abs().max())


def test_chunks_change_nothing(state, noise, monkeypatch):
    draws = bench.draws_of(METHODS["strata"], UNIFORM, 5, 0, len(noise))
    whole = bench.draw_gradients(state, noise, draws)
    monkeypatch.setattr(bench, "CHUNK", 4)
    torch.testing.assert_close(bench.draw_gradients(state, noise, draws), whole)


def test_weights_multiply_the_gradients_of_draws(state, noise):
    draws = bench.draws_of(METHODS["importance"], SKEWED, 3, 0, len(noise))
    plain = bench.draw_gradients(state, noise, replace(draws, weights=torch.ones_like(draws.weights)))
    weighted = bench.draw_gradients(state, noise, draws)
    torch.testing.assert_close(weighted, plain * draws.weights.float()[..., None, None, None])
    assert not torch.allclose(weighted, plain)


def test_no_gradient_where_fake_and_real_agree(state, noise):
    draws = bench.draws_of(METHODS["strata"], UNIFORM, 4, 0, len(noise))
    assert parameter_gradient(replace(state, fake=tiny_teacher(0)), noise, draws).count_nonzero() == 0
    assert parameter_gradient(state, noise, draws).count_nonzero() > 0


class Ones(torch.nn.Module):
    def forward(self, noisy: Tensor, timestep: Tensor) -> UNet2DOutput:
        return UNet2DOutput(sample=torch.ones_like(noisy))


def test_clean_estimate_of_the_true_noise_is_the_clean_image(state):
    clean, levels = torch.full((2, 1, 8, 8), 0.5), torch.tensor([100, 900])
    noisy = state.real.noise_schedule.add_noise(clean, torch.ones_like(clean), levels)
    teacher = replace(state.real, denoiser=Ones())
    torch.testing.assert_close(bench.clean_estimate(teacher, noisy, levels), clean, rtol=1e-3, atol=1e-3)


def test_coordinates_keep_inner_products():
    rows = torch.randn(6, 100, generator=torch.Generator().manual_seed(0))
    values = bench.coordinates(rows)
    torch.testing.assert_close(values @ values.T, (rows @ rows.T).double(), rtol=1e-4, atol=1e-4)


def test_pixel_coordinates_are_as_long_as_parameter_gradients(state, noise):
    draws = bench.draws_of(METHODS["iid"], UNIFORM, 2, 0, 1)
    images = bench.generate(state.generator, noise[:1])
    pixels = bench.draw_gradients(state, images.detach(), draws).mean(1).flatten(1)
    length = (pixels.double() @ bench.pixel_coordinates(state, noise[:1])[0]).norm()
    torch.testing.assert_close(length.float(), parameter_gradient(state, noise[:1], draws).norm(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["strata", "antithetic", "importance + strata", "importance + antithetic"])
def test_schemes_agree_in_the_mean(state, noise, name):
    count, replicates, basis = 1000, 30, torch.eye(64).double().expand(len(noise), 64, 64)
    error, reference = bench.variance_of(bench.iid_pool(state, noise, UNIFORM, count, seed=0), basis)
    proposal = SKEWED if METHODS[name].importance else UNIFORM
    values = bench.estimates(state, noise, METHODS[name], proposal, 4, replicates)
    variance, mean = bench.variance_of(values, basis)
    assert 0.3 < bench.bias_check(mean, variance, reference, error / count, replicates).value < 4
    assert bench.bias_check(mean * 1.5, variance, reference, error / count, replicates).value > 6


def test_pool_is_shuffled(state, noise):
    same = bench.iid_pool(state, noise, UNIFORM, 400, seed=0)
    halves = same.unflatten(1, (2, 200)).mean(2)
    spread = same.var(1) / 200 * 2
    assert (halves[:, 0] - halves[:, 1]).square().sum() < 2 * spread.sum()


def test_frechet_distance_of_gaussians():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(50_000, 3, generator=generator, dtype=torch.float64)
    second = torch.randn(50_000, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0]) + 2
    assert bench.frechet_distance(first, second) == pytest.approx(3 * 4 + 0 + 1 + 4, rel=0.02)
    assert bench.frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_equal_cost_arm_spends_the_same():
    costs, base = bench.Costs(upstream=4.0, draw=2.0), bench.Arm("iid", 1, 30)
    arm = bench.equal_cost_arm("strata", 16, base, costs)
    assert bench.cost_of(arm, costs) == bench.cost_of(base, costs) == 180
