"""Does reuse and stratification help one-step distillation: the variance of the gradient, and what comes of it?

Command:  python scripts/bench_distillation.py
Hardware: 1 CPU thread; 43 minutes beside other jobs
Writes:   docs/benchmarks/distillation.json, docs/images/distillation.png and the tables that it prints

A generator that makes a digit in one step is trained by distribution matching (DMD, arXiv:2311.18828) from the packaged
teacher in pixel space. Its gradient is an expectation over the generator's noise xi (the upstream draw: a forward and a
backward pass of the generator) and over timesteps and noise (the draw: a pass of the teacher and one of the score of
the fakes). At frozen states of a run the variance of the parameter gradient is measured for every scheme and number of
draws K; then runs at equal cost are compared by the Frechet distance of their digits to real ones. Generator, teacher
and fake score are the same UNet.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import torch
from benchmark import describe_machine
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from sklearn.neural_network import MLPClassifier
from torch import Tensor
from train_demo_teacher import denoising_loss, digits
from train_pixel_teacher import PIXELS

from carv_attrib.sampling import Draws, Proposal, Scheme, importance_proposal, sample_draws, uniform_proposal
from carv_attrib.teachers import load_teacher
from carv_attrib.teachers._diffusers import DiffusersTeacher
from carv_attrib.variance import (
    Costs,
    Measured,
    RunningVariance,
    VarianceComponents,
    effective_compute_multiplier,
    mean_and_error,
    relative_efficiency,
)

FIRST, LAST = 20, 980  # timesteps of DMD, of 1,000
GENERATOR_TIMESTEP = 500  # where the teacher's UNet is run once to generate
NUM_DRAWS = (1, 2, 4, 8, 16, 32)
HEADLINE = 16
CHUNK = 512


@dataclass(frozen=True)
class Method:
    """How the K draws of a generated digit are taken."""

    scheme: Scheme
    importance: bool


METHODS = {
    "iid": Method("iid", False),
    "strata": Method("stratified", False),
    "antithetic": Method("antithetic", False),
    "importance": Method("iid", True),
    "importance + strata": Method("stratified", True),
    "importance + antithetic": Method("antithetic", True),
}


@dataclass(frozen=True)
class Arm:
    """One way to spend a step: R generated digits, K draws each."""

    method: str
    num_draws: int
    num_upstream: int


@dataclass(frozen=True)
class State:
    """What a step of distribution matching needs: the teacher, the score of the fakes, and the generator."""

    real: DiffusersTeacher
    fake: DiffusersTeacher
    generator: DiffusersTeacher


def trainable_copy(teacher: DiffusersTeacher) -> DiffusersTeacher:
    """Return a teacher with a denoiser of its own, whose weights can be trained."""
    return replace(teacher, denoiser=copy.deepcopy(teacher.denoiser).requires_grad_(True))


def clone(state: State) -> State:
    """Return a state that trains on its own; the teacher is shared."""
    return State(state.real, trainable_copy(state.fake), trainable_copy(state.generator))


def clean_estimate(teacher: DiffusersTeacher, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """Return the clean image that a teacher of the noise sees: `(x_t - sigma_t eps_hat) / alpha_t`."""
    signal = teacher.noise_schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1).to(noisy)
    return (noisy - (1 - signal).sqrt() * teacher.predict(noisy, timesteps, {})) / signal.sqrt()


def generate(generator: DiffusersTeacher, noise: Tensor) -> Tensor:
    """Return digits made in one step."""
    return clean_estimate(generator, noise, torch.full((len(noise),), GENERATOR_TIMESTEP))


def upstream_noise(count: int, generator: torch.Generator) -> Tensor:
    """Return the generator's noise xi."""
    return torch.randn(count, PIXELS.channels, PIXELS.height, PIXELS.width, generator=generator)


def difference(state: State, images: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
    """Return DMD's gradient with respect to images, for one draw each (eq. (7) and (8) of arXiv:2311.18828).

    `(mu_fake - mu_real) / mean |x - mu_real|` at `x_t`: the scores differ as the clean estimates mu do, and the weight
    makes it of the same size at all t. Zero where fake and real agree.
    """
    noisy = state.real.noise_schedule.add_noise(images, noise, timesteps)
    real, fake = (clean_estimate(teacher, noisy, timesteps) for teacher in (state.real, state.fake))
    return (fake - real) / (images - real).abs().mean(dim=(1, 2, 3), keepdim=True)


@torch.no_grad()
def draw_gradients(state: State, images: Tensor, draws: Draws) -> Tensor:
    """Return the weighted gradient of every draw with respect to its image, (images, draws, 1, 8, 8)."""
    count = draws.timesteps.shape[1]
    parts = zip(
        images.repeat_interleave(count, 0).split(CHUNK),
        (FIRST + draws.timesteps).flatten().split(CHUNK),
        draws.noise.flatten(0, 1).split(CHUNK),
        strict=True,
    )
    values = torch.cat([difference(state, *part) for part in parts]).unflatten(0, draws.timesteps.shape)
    return values * draws.weights.to(values)[..., None, None, None]


def add_parameter_gradient(state: State, noise: Tensor, draws: Draws) -> None:
    """Add the gradient to the generator's weights: one forward and backward pass, whatever the number of draws."""
    images = generate(state.generator, noise)
    images.backward(draw_gradients(state, images.detach(), draws).mean(1) / len(images))


def num_levels() -> int:
    """Return how many timesteps distribution matching uses."""
    return LAST - FIRST


def draws_of(method: Method, proposal: Proposal, num_draws: int, seed: int, count: int) -> Draws:
    """Return K draws for each of `count` generated digits."""
    return sample_draws(
        proposal,
        (PIXELS.channels, PIXELS.height, PIXELS.width),
        num_draws=num_draws,
        scheme=method.scheme,
        seed=seed,
        purpose="distillation",
        ids=range(count),
    )


def pilot_proposal(state: State, count: int = 64, num_draws: int = 32, num_bins: int = 16) -> Proposal:
    """Return the proposal q ∝ root mean square of the draws' gradients at t, from strata of a pilot."""
    images = generate(state.generator, upstream_noise(count, torch.Generator().manual_seed(99))).detach()
    draws = draws_of(METHODS["strata"], uniform_proposal(num_levels()), num_draws, 10**6, count)
    squares = draw_gradients(state, images, draws).square().sum(dim=(2, 3, 4)).flatten().numpy()
    bins = draws.timesteps.flatten().numpy() * num_bins // num_levels()
    sizes = np.sqrt(np.bincount(bins, squares, num_bins) / np.bincount(bins, minlength=num_bins))
    centres = (np.arange(num_bins) + 0.5) * num_levels() / num_bins
    return importance_proposal(torch.from_numpy(np.interp(np.arange(num_levels()), centres, sizes)))


# Training


def train_fake(state: State, optimizer: torch.optim.Optimizer, generator: torch.Generator, count: int) -> None:
    """Take one step of the fake score on new digits of the generator."""
    with torch.no_grad():
        images = generate(state.generator, upstream_noise(count, generator))
    loss = denoising_loss(state.fake.denoiser, images, (), state.real.noise_schedule.alphas_cumprod, generator)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@dataclass(frozen=True)
class Recipe:
    """How a run goes: the same for all arms."""

    steps: int
    warmup_steps: int = 200  # of the fake score, before the first
    fake_steps: int = 2
    fake_batch: int = 16
    generator_rate: float = 1e-4
    fake_rate: float = 1e-3

    @property
    def last_steps(self) -> list[int]:
        """After which steps the digits are compared to real ones."""
        return [self.steps * tenths // 10 for tenths in (7, 8, 9, 10)]


def new_state(teacher: DiffusersTeacher, recipe: Recipe) -> State:
    """Return where all runs start: the teacher's weights everywhere, and a fake score that knows its fakes."""
    state = State(teacher, trainable_copy(teacher), trainable_copy(teacher))
    optimizer = torch.optim.Adam(state.fake.denoiser.parameters(), lr=recipe.fake_rate, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(0)
    for _ in range(recipe.warmup_steps):
        train_fake(state, optimizer, generator, recipe.fake_batch)
    return state


def train(start: State, arm: Arm, proposal: Proposal, recipe: Recipe, seed: int) -> Iterator[State]:
    """Yield the state after every step: fake score first, then one step of the generator."""
    state, generator = clone(start), torch.Generator().manual_seed(1000 + seed)
    fakes = torch.optim.Adam(state.fake.denoiser.parameters(), lr=recipe.fake_rate, betas=(0.9, 0.99))
    optimizer = torch.optim.Adam(state.generator.denoiser.parameters(), lr=recipe.generator_rate, betas=(0.9, 0.99))
    for step in range(recipe.steps):
        for _ in range(recipe.fake_steps):
            train_fake(state, fakes, generator, recipe.fake_batch)
        optimizer.zero_grad()
        draws = draws_of(METHODS[arm.method], proposal, arm.num_draws, 10**4 * seed + step, arm.num_upstream)
        add_parameter_gradient(state, upstream_noise(arm.num_upstream, generator), draws)
        optimizer.step()
        yield state


# Variance


def coordinates(rows: Tensor) -> Tensor:
    """Return as many coordinates as there are rows, float64, with the same inner products: distances are kept."""
    values, vectors = torch.linalg.eigh((rows @ rows.T).double())
    return vectors * values.clamp(min=0).sqrt()


def parameter_gradient(state: State, images: Tensor, pixels: Tensor) -> Tensor:
    """Return the gradient of all the generator's weights, in one vector, that pixel gradients lead to."""
    weights = list(state.generator.denoiser.parameters())
    parts = torch.autograd.grad(images, weights, pixels, retain_graph=True, allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None])


def pixel_coordinates(state: State, noise: Tensor) -> Tensor:
    """Return, for each digit, a matrix L such that `v @ L` is as long as the parameter gradient of pixel gradient v.

    With J the derivative of the pixels with respect to all weights the parameter gradient is `J^T v`, and `L L^T` is
    `J J^T`: variances of parameter gradients, given xi, come from 64 numbers a draw without a backward pass for each.
    """
    matrices = []
    for row in noise.split(1):
        image = generate(state.generator, row)
        basis = torch.eye(image.numel()).view(-1, *image.shape)
        matrices.append(coordinates(torch.stack([parameter_gradient(state, image, pixel) for pixel in basis])))
    return torch.stack(matrices)


def separate_draws(method: Method, proposal: Proposal, num_draws: int, seed: int, count: int) -> Draws:
    """Return K draws for each digit, independent of the other digits': without strata across the batch."""
    rows = [draws_of(method, proposal, num_draws, count * seed + i, 1) for i in range(count)]
    timesteps, noise, weights = (
        torch.cat([getattr(row, name) for row in rows]) for name in ("timesteps", "noise", "weights")
    )
    return Draws(timesteps, noise, weights, rows[0].band_sizes)


def estimates(
    state: State, images: Tensor, method: Method, proposal: Proposal, num_draws: int, replicates: int
) -> Tensor:
    """Return replicates of the mean over K draws, independent between digits, (images, replicates, pixels)."""
    seeds = range(1000 * num_draws, 1000 * num_draws + replicates)
    draws = (separate_draws(method, proposal, num_draws, seed, len(images)) for seed in seeds)
    return torch.stack([draw_gradients(state, images, d).mean(1).flatten(1) for d in draws], dim=1)


def iid_pool(state: State, images: Tensor, proposal: Proposal, count: int, seed: int) -> Tensor:
    """Return `count` independent draws of each image in random order: the package sorts them by timestep."""
    draws = draws_of(METHODS["iid"], proposal, count, seed, len(images))
    order = torch.rand(draws.timesteps.shape, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return draw_gradients(state, images, draws).flatten(2).gather(1, order[..., None].expand(-1, -1, images[0].numel()))


def all_estimates(
    state: State, images: Tensor, replicates: int
) -> tuple[dict[str, dict[int, Tensor]], Tensor, Proposal]:
    """Return replicates for every method and K, a long iid reference, and the pilot's proposal.

    The estimates of iid draws are means over disjoint blocks of one pool; all others are whole estimates of K draws
    each, since the draws within one depend on one another.
    """
    proposals = {False: uniform_proposal(num_levels()), True: pilot_proposal(state)}
    count, found = max(NUM_DRAWS) * replicates, {}
    for name, method in METHODS.items():
        proposal = proposals[method.importance]
        if method.scheme == "iid":
            pool = iid_pool(state, images, proposal, count, seed=int(method.importance))
            found[name] = {num_draws: pool.unflatten(1, (-1, num_draws)).mean(2) for num_draws in NUM_DRAWS}
        else:
            found[name] = {k: estimates(state, images, method, proposal, k, replicates) for k in NUM_DRAWS[1:]}
    return found, found["iid"][1], proposals[True]


def variance_of(replicates: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return the variance and the mean of each digit's parameter gradient over replicates, given its xi."""
    running = RunningVariance()
    for replicate in torch.einsum("nrp,npq->rnq", replicates.double(), basis):
        running.add(replicate)
    return running.total_variance(), running.mean


def upstream_variance(state: State, noise: Tensor, pool: Tensor, draw_variance: Tensor) -> Tensor:
    """Return each digit's share of the variance between digits, without bias: the noise of its mean is taken off."""
    rows = []
    for xi, mean in zip(noise.split(1), pool.mean(1), strict=True):
        image = generate(state.generator, xi)
        rows.append(parameter_gradient(state, image, mean.view_as(image)))
    values = coordinates(torch.stack(rows))
    spread = (values - values.mean(0)).square().sum(1) * len(values) / (len(values) - 1)
    return spread - draw_variance / pool.shape[1]


def bias_check(mean: Tensor, variance: Tensor, reference: Tensor, error: Tensor, replicates: int) -> Measured:
    """Return the squared distance of a method's mean from the reference over what chance explains: 1 without bias.

    The standard error is from a bootstrap over digits. For plain iid draws the reference is their own pool: 0.
    """
    distance = (mean - reference).square().sum(-1)
    return relative_efficiency(distance, variance / replicates + error)


def batch_gradients(state: State, noise: Tensor, method: Method, replicates: int) -> Tensor:
    """Return replicates of the parameter gradient of a batch with one draw a digit, (replicates, parameters)."""
    images, uniform = generate(state.generator, noise), uniform_proposal(num_levels())
    draws = (draws_of(method, uniform, 1, seed, len(images)) for seed in range(replicates))
    pixels = (draw_gradients(state, images.detach(), d).mean(1) / len(images) for d in draws)
    return torch.stack([parameter_gradient(state, images, p) for p in pixels])


def batch_strata(state: State, noise: Tensor, replicates: int) -> Measured:
    """Return how much less a batch with one draw a digit varies, given xi, when strata run across the batch.

    The bootstrap is over replicates.
    """
    rows = torch.cat([batch_gradients(state, noise, METHODS[name], replicates) for name in ("iid", "strata")])
    iid, strata = coordinates(rows).split(replicates)
    return relative_efficiency(*((x - x.mean(0)).square().sum(1) for x in (iid, strata)))


def measure_costs(state: State, batch: int = 32, repeats: int = 7) -> Costs:
    """Return median CPU seconds of one digit (forward and backward) and of one draw (teacher and fake score)."""
    noise = upstream_noise(batch, torch.Generator().manual_seed(0))
    images = generate(state.generator, noise).detach()
    draws = draws_of(METHODS["strata"], uniform_proposal(num_levels()), 4, 0, batch)
    upstream, draw = [], []
    for _ in range(repeats):
        start = time.process_time()
        generate(state.generator, noise).backward(images)
        upstream.append((time.process_time() - start) / batch)
        start = time.process_time()
        draw_gradients(state, images, draws)
        draw.append((time.process_time() - start) / draws.timesteps.numel())
    return Costs(float(np.median(upstream)), float(np.median(draw)))


def sampling_cost(num_draws: int, batch: int = 32) -> float:
    """Return CPU seconds of `sample_draws` for one draw."""
    start = time.process_time()
    draws_of(METHODS["strata"], uniform_proposal(num_levels()), num_draws, 0, batch)
    return (time.process_time() - start) / batch / num_draws


@dataclass(frozen=True)
class Row:
    """One method at one K, against one iid draw a digit at the same R; ECM counts the costs."""

    draw_ratio: Measured
    total_ratio: Measured
    ecm: Measured
    bias: Measured


@dataclass(frozen=True)
class Report:
    """What was measured at one state."""

    components: VarianceComponents
    optimal_num_draws: float
    best_num_draws: int
    strata_over_iid: Measured
    batch_strata: Measured
    rows: dict[str, dict[int, Row]]


@dataclass(frozen=True)
class Reference:
    """One iid draw a digit, from a long pool: the variance between digits, and given xi; the means and their errors."""

    upstream: Tensor
    one_draw: Tensor
    mean: Tensor
    error: Tensor


def reference_of(state: State, noise: Tensor, pool: Tensor, basis: Tensor) -> Reference:
    """Return what all methods are compared to, for each digit."""
    one_draw, mean = variance_of(pool, basis)
    upstream = upstream_variance(state, noise, pool, one_draw)
    return Reference(upstream, one_draw, mean, one_draw / pool.shape[1])


def row_of(values: Tensor, basis: Tensor, reference: Reference, num_draws: int, costs: Costs) -> Row:
    """Return the ratios of one method at one K; standard errors are from a bootstrap over digits."""
    variance, mean = variance_of(values, basis)
    total = relative_efficiency(reference.upstream + reference.one_draw, reference.upstream + variance)
    return Row(
        relative_efficiency(reference.one_draw, variance),
        total,
        effective_compute_multiplier(total, costs.of(1.0, 1.0), costs.of(1.0, float(num_draws))),
        bias_check(mean, variance, reference.mean, reference.error, values.shape[1]),
    )


def measure(state: State, costs: Costs, num_digits: int, replicates: int) -> tuple[Report, Proposal]:
    """Return all variances at one state, and the pilot's proposal."""
    noise = upstream_noise(num_digits, torch.Generator().manual_seed(7))
    images, basis = generate(state.generator, noise).detach(), pixel_coordinates(state, noise)
    found, pool, proposal = all_estimates(state, images, replicates)
    reference = reference_of(state, noise, pool, basis)
    components = VarianceComponents(max(0.0, float(reference.upstream.mean())), float(reference.one_draw.mean()))
    rows = {
        name: {k: row_of(values, basis, reference, k, costs) for k, values in by_count.items()}
        for name, by_count in found.items()
    }
    iid, strata = (variance_of(found[name][HEADLINE], basis)[0] for name in ("iid", "strata"))
    report = Report(
        components,
        components.optimal_num_draws(costs),
        max(NUM_DRAWS, key=lambda k: rows["iid"][k].ecm.value),
        relative_efficiency(iid, strata),
        batch_strata(state, noise, replicates=8 * replicates),
        rows,
    )
    return report, proposal


# Downstream


def distance_to(images: Tensor, labels: Tensor) -> Callable[[Tensor], float]:
    """Return the Frechet distance to real digits, in the hidden layer of a small classifier of them."""
    network = MLPClassifier((32,), alpha=1e-2, max_iter=300, random_state=0)
    network.fit(images.flatten(1).numpy(), labels.numpy())
    weights, bias = (torch.from_numpy(x[0]).double() for x in (network.coefs_, network.intercepts_))
    real = (images.flatten(1).double() @ weights + bias).relu()
    return lambda other: frechet_distance(real, (other.flatten(1).double() @ weights + bias).relu())


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`, the distance of two sets' Gaussians."""
    mean = (first.mean(0) - second.mean(0)).square().sum()
    one, two = first.T.cov(), second.T.cov()
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ two @ root).clamp(min=0).sqrt().sum()
    return float(mean + one.trace() + two.trace() - 2 * cross)


@torch.no_grad()
def held_out_digits(generator: DiffusersTeacher, count: int) -> Tensor:
    """Return generated digits, pixels in [-1, 1], from noise that no run has seen."""
    noise = upstream_noise(count, torch.Generator().manual_seed(12345))
    return torch.cat([generate(generator, part) for part in noise.split(CHUNK)]).clamp(-1, 1)


@torch.no_grad()
def teacher_digits(teacher: DiffusersTeacher, count: int, num_steps: int = 20) -> Tensor:
    """Return the teacher's own digits by DDIM (arXiv:2010.02502) from the same noise."""
    images = upstream_noise(count, torch.Generator().manual_seed(12345))
    levels = torch.linspace(999, 0, num_steps + 1).long()
    for level, following in pairwise(levels):
        clean = clean_estimate(teacher, images, level.expand(count)).clamp(-1, 1)
        signal, lower = teacher.noise_schedule.alphas_cumprod[torch.stack([level, following])]
        noise = (images - signal.sqrt() * clean) / (1 - signal).sqrt()
        images = lower.sqrt() * clean + (1 - lower).sqrt() * noise
    return images.clamp(-1, 1)


@dataclass(frozen=True)
class Outcome:
    """What an arm came to: the Frechet distance of each seed."""

    name: str
    arm: Arm
    distances: list[float]
    frechet: Measured


def cost_of(arm: Arm, costs: Costs) -> float:
    """Return the seconds of an arm's gradient."""
    return costs.of(float(arm.num_upstream), float(arm.num_draws))


def equal_cost_arm(method: str, num_draws: int, base: Arm, costs: Costs) -> Arm:
    """Return an arm with as many digits a step as cost what the base costs, rounded."""
    num_upstream = cost_of(base, costs) / costs.of(1.0, float(num_draws))
    return Arm(method, num_draws, max(1, round(num_upstream)))


def run_seed(start: State, arm: Arm, proposal: Proposal, recipe: Recipe, seed: int) -> dict[int, State]:
    """Return copies of the states of a run after a fifth of its steps and along its last third."""
    keep = {recipe.steps // 5, *recipe.last_steps}
    states = enumerate(train(start, arm, proposal, recipe, seed), start=1)
    return {step: clone(state) for step, state in states if step in keep}


def evaluate(
    name: str, arm: Arm, runs: list[dict[int, State]], recipe: Recipe, distance: Callable[[Tensor], float], count: int
) -> Outcome:
    """Return the distances of an arm's runs, each the mean over the last steps: runs swing."""
    distances = [
        float(np.mean([distance(held_out_digits(run[step].generator, count)) for step in recipe.last_steps]))
        for run in runs
    ]
    return Outcome(name, arm, distances, mean_and_error(distances))


def draw_sheet(rows: dict[str, Tensor], path: Path, per_row: int = 24) -> None:
    """Draw two lines of digits for each name, with the name beside them."""
    side, left, scale = 9, 60, 3
    sheet = Image.new("L", (left * scale + per_row * side * scale, len(rows) * (2 * side + 3) * scale), 255)
    for row, (name, digits_) in enumerate(rows.items()):
        top = row * (2 * side + 3) * scale
        ImageDraw.Draw(sheet).text((2, top + side * scale - 6), name, fill=0)
        for i, digit in enumerate(digits_[: 2 * per_row]):
            pixels = ((digit[0] + 1) * 127.5).round().byte().numpy()
            tile = Image.fromarray(pixels).resize((8 * scale, 8 * scale), Image.Resampling.NEAREST)
            sheet.paste(tile, ((left + i % per_row * side) * scale, top + i // per_row * side * scale))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def show(value: Measured) -> str:
    """Return a figure with its standard error."""
    return f"{value.value:.2f} ± {value.standard_error:.2f}"


def print_report(step: int, report: Report, console: Console) -> None:
    """Print the ratios of one state."""
    title = f"after {step} steps: variance against (R, 1) iid; K* predicted {report.optimal_num_draws:.1f}"
    table = Table("method", "K", "given xi", "total", "ECM", "bias (1: none)", title=title)
    for name, by_count in report.rows.items():
        for num_draws, row in by_count.items():
            cells = (row.draw_ratio, row.total_ratio, row.ecm, row.bias)
            table.add_row(name, str(num_draws), *(show(cell) for cell in cells))
    console.print(table)
    console.print(f"strata over iid at K = {HEADLINE}: {show(report.strata_over_iid)} (given xi)")
    console.print(f"strata across the batch over iid at K = 1: {show(report.batch_strata)} (given xi)")


def print_outcomes(outcomes: list[Outcome], costs: Costs, yardsticks: dict[str, float], console: Console) -> None:
    """Print the Frechet distances, and what the gradient of a step costs by the model."""
    table = Table("arm", "R", "K", "CPU ms a step", "Frechet distance", title="Downstream, mean ± standard error")
    for outcome in outcomes:
        arm, cost = outcome.arm, f"{1000 * cost_of(outcome.arm, costs):.0f}"
        table.add_row(outcome.name, str(arm.num_upstream), str(arm.num_draws), cost, show(outcome.frechet))
    for name, distance in yardsticks.items():
        table.add_row(name, "", "", "", f"{distance:.2f}")
    console.print(table)


def the_arms(base: Arm, costs: Costs, report: Report) -> dict[str, Arm]:
    """Return the arms to compare, all at the cost of the base: strata and iid, least variance, and highest ECM."""
    least = max(METHODS, key=lambda name: report.rows[name][HEADLINE].total_ratio.value)
    pairs = [(name, k) for name, by_count in report.rows.items() for k in by_count]
    cheapest = max(pairs, key=lambda pair: report.rows[pair[0]][pair[1]].ecm.value)
    arms = {"K = 1, iid": base, "K = 1, strata": replace(base, method="strata")}
    for name, num_draws in (("iid", HEADLINE), (least, HEADLINE), cheapest):
        arms[f"K = {num_draws}, {name}"] = equal_cost_arm(name, num_draws, base, costs)
    return arms


@click.command()
@click.option("--teacher", default="carv_attrib/demo/pixel_teacher", show_default=True)
@click.option("--steps", default=80, show_default=True, help="Steps of the generator in a run.")
@click.option("--seeds", default=3, show_default=True, help="Runs of each arm.")
@click.option("--batch", default=18, show_default=True, help="Digits a step with one draw each; other arms get fewer.")
@click.option("--num-digits", default=12, show_default=True, help="Upstream draws at which variances are measured.")
@click.option("--replicates", default=6, show_default=True, help="Estimates of each kind at each of them.")
@click.option("--num-generated", default=500, show_default=True, help="Digits for the Frechet distance.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("docs/benchmarks/distillation.json"))
@click.option("--picture", type=click.Path(path_type=Path), default=Path("docs/images/distillation.png"))
def main(
    teacher: str,
    steps: int,
    seeds: int,
    batch: int,
    num_digits: int,
    replicates: int,
    num_generated: int,
    output: Path,
    picture: Path,
) -> None:
    """Measure variances along one run, then compare runs at equal cost."""
    console, recipe, uniform = Console(width=120), Recipe(steps), uniform_proposal(num_levels())
    start = new_state(load_teacher(teacher), recipe)
    costs, base = measure_costs(start), Arm("iid", 1, batch)
    base_runs = [run_seed(start, base, uniform, recipe, seed) for seed in range(seeds)]
    reports = {}
    for step in (steps // 5, steps):
        reports[step], pilot = measure(base_runs[0][step], costs, num_digits, replicates)
        print_report(step, reports[step], console)
    real, labels = digits(PIXELS)
    distance = distance_to(real, labels)
    sheets = {"real": real, "teacher, DDIM": teacher_digits(start.real, num_generated)}
    sheets["start"] = held_out_digits(start.generator, num_generated)
    yardsticks = {name: distance(images) for name, images in sheets.items()}
    outcomes = []
    for name, arm in the_arms(base, costs, reports[steps]).items():
        proposal, runs = pilot if METHODS[arm.method].importance else uniform, base_runs
        if arm != base:
            runs = [run_seed(start, arm, proposal, recipe, seed) for seed in range(seeds)]
        outcomes.append(evaluate(name, arm, runs, recipe, distance, num_generated))
        sheets[name] = held_out_digits(runs[0][steps].generator, num_generated)
    print_outcomes(outcomes, costs, yardsticks, console)
    draw_sheet(sheets, picture)
    result = {
        "command": "python scripts/bench_distillation.py",
        "machine": describe_machine(),
        "recipe": asdict(recipe),
        "costs": asdict(costs),
        "sampling_seconds_a_draw": {k: sampling_cost(k) for k in (1, HEADLINE)},
        "states": {step: asdict(report) for step, report in reports.items()},
        "downstream": [asdict(outcome) | {"cost": cost_of(outcome.arm, costs)} for outcome in outcomes],
        "yardsticks": yardsticks,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
