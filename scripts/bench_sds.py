"""Score distillation of a 3D scene: what do reuse of a render, importance sampling and strata save, and does it help?

Command:  python scripts/bench_sds.py
Hardware: 1 thread of a CPU, about 10 minutes; 17 beside other work
Writes:   docs/benchmarks/sds.json, docs/images/sds.png and the tables that it prints

A voxel grid (density and grey emission) is seen by a camera on a circle; the packaged teacher, told a class, pulls the
encoded picture towards a digit: the gradient is `E_{camera, t, eps}[sigma_t^2 (eps_hat(z_t) - eps) dz/dscene]`, t
uniform over all timesteps, no guidance. An upstream draw is a camera: a render and an encoding, there and back. The K
draws at one camera are averaged in latent space and sent back once.

Variance is the trace of the covariance of the gradient of the scene over independent replicates of the whole estimate,
at three frozen scenes. Then scenes are optimised from the same start, at equal cost, by the cheapest and by the least
noisy estimates, and a classifier of real digits says how often the wanted digit is seen.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import click
import numpy as np
import torch
from benchmark import describe_machine
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from carv_attrib import load_teacher
from carv_attrib.data import open_dataset, to_pixels
from carv_attrib.estimator import GradientProfile, binned_rms
from carv_attrib.sampling import Draws, Proposal, Scheme, importance_proposal, sample_draws, uniform_proposal
from carv_attrib.seeding import stream
from carv_attrib.teachers._diffusers import DiffusersTeacher
from carv_attrib.variance import (
    Costs,
    Measured,
    VarianceComponents,
    effective_compute_multiplier,
    mean_and_error,
    relative_efficiency,
    variance_components,
)

GRID_SIZE, IMAGE_SIZE, NUM_SAMPLES = 24, 32, 32  # voxels and pixels along a side, samples along a ray
CAMERA_DISTANCE, FIELD_OF_VIEW, MAX_AZIMUTH = 4.0, 0.5, 30.0  # the grid is [-1, 1]^3; width at distance 1; degrees
DENSITY_SCALE = 10.0
TEST_AZIMUTHS = np.linspace(-25, 25, 11)
LABEL = 3  # of the scenes at which variance is measured
LEARNING_RATES = (0.1, 0.2, 0.4, 0.8, 1.6)
BUDGET_SHARES = (0.125, 0.25, 0.5, 1.0)
RATIOS = (0.0, 1.0, 5.0)
PILOT_BINS, NUM_DIRECTIONS, BASELINE_REPEATS = 16, 8, 8


@dataclass(frozen=True)
class Design:
    """How many cameras and draws an estimate has, and how the draws are taken."""

    num_upstream: int
    num_draws: int
    scheme: Scheme = "iid"
    proposal: Literal["uniform", "pilot"] = "uniform"

    def __str__(self) -> str:
        return f"({self.num_upstream}, {self.num_draws}) {self.scheme}, {self.proposal}"

    @property
    def counts(self) -> tuple[float, float]:
        """R and K, as the accounting takes them."""
        return float(self.num_upstream), float(self.num_draws)


BASELINE, REUSE = Design(1, 1), Design(1, 8)
COUNTS = [Design(*counts) for counts in [(1, 1), (1, 2), (1, 4), (1, 8), (1, 16), (2, 4), (4, 2), (8, 1)]]
SCHEMES = [
    Design(1, 8, "iid", "pilot"),
    Design(1, 8, "stratified", "uniform"),
    Design(1, 8, "stratified", "pilot"),
    Design(1, 8, "antithetic", "uniform"),
    Design(1, 8, "antithetic", "pilot"),
    Design(1, 8, "orthogonal", "uniform"),
    Design(1, 8, "orthogonal", "pilot"),
]


def new_scene(seed: int) -> Tensor:
    """Return a grey ball with a little noise: density and emission before softplus and sigmoid, (2, z, y, x)."""
    axis = torch.linspace(-1, 1, GRID_SIZE)
    radius_squared = axis.view(-1, 1, 1) ** 2 + axis.view(-1, 1) ** 2 + axis**2
    noise = stream(seed, "scene").standard_normal((2, *radius_squared.shape), np.float32)
    return torch.stack([1 - 6 * radius_squared, torch.zeros_like(radius_squared)]) + 0.1 * torch.from_numpy(noise)


def rays(azimuths: Tensor) -> tuple[Tensor, Tensor]:
    """Return sample points (cameras, depth, height, width, xyz) and the length of a step along each ray (h, w)."""
    axis = FIELD_OF_VIEW / 2 * (torch.arange(IMAGE_SIZE) * 2 + 1 - IMAGE_SIZE) / IMAGE_SIZE
    down, right = torch.meshgrid(axis, axis, indexing="ij")
    directions = torch.stack([right, down, torch.ones_like(right)], -1)
    step = 2 * math.sqrt(2) / NUM_SAMPLES  # the grid is within sqrt(2) of its middle in depth, whatever the azimuth
    depths = CAMERA_DISTANCE + step * (torch.arange(NUM_SAMPLES) + 0.5 - NUM_SAMPLES / 2)
    points = depths.view(-1, 1, 1, 1) * directions - torch.tensor([0, 0, CAMERA_DISTANCE])
    cos, sin, zero = azimuths.cos(), azimuths.sin(), torch.zeros_like(azimuths)
    turn = torch.stack([cos, zero, sin, zero, zero + 1, zero, -sin, zero, cos], -1).view(-1, 3, 3)
    return torch.einsum("cij,dhwj->cdhwi", turn, points), step * directions.norm(dim=-1)


def composite(density: Tensor, emission: Tensor, step: Tensor) -> Tensor:
    """Return the light (cameras, height, width) that arrives from samples (cameras, depth, height, width)."""
    thickness = density * step
    in_front = thickness.cumsum(1) - thickness
    return ((-in_front).exp() * (1 - (-thickness).exp()) * emission).sum(1)


def render(scene: Tensor, azimuths: Tensor) -> Tensor:
    """Return pixels (cameras, 1, height, width) in [-1, 1] of the scene before black, azimuths in radians."""
    points, step = rays(azimuths)
    field = torch.stack([DENSITY_SCALE * F.softplus(scene[0]), scene[1].sigmoid()])
    samples = F.grid_sample(field.expand(len(azimuths), *field.shape), points, align_corners=True)
    return 2 * composite(samples[:, 0], samples[:, 1], step).unsqueeze(1) - 1


def encode(teacher: DiffusersTeacher, pixels: Tensor) -> Tensor:
    """Return what `teacher.encode` does, with a gradient."""
    config = teacher.autoencoder.config
    return teacher.autoencoder.encode(pixels).latent_dist.mode() * config.scaling_factor


@torch.no_grad()
def latent_gradients(teacher: DiffusersTeacher, latents: Tensor, draws: Draws, label: int) -> Tensor:
    """Return `p/q sigma_t^2 (eps_hat(z_t) - eps)` of each draw at each camera, (cameras, draws, *latent)."""
    schedule, timesteps, noise = teacher.noise_schedule, draws.timesteps.flatten(), draws.noise.flatten(0, 1)
    noisy = schedule.add_noise(latents.repeat_interleave(draws.timesteps.shape[1], 0), noise, timesteps)
    residual = teacher.predict(noisy, timesteps, teacher.condition([label] * len(noise), None)) - noise
    weights = draws.weights.flatten() * (1 - schedule.alphas_cumprod[timesteps])
    return (weights.float().view(-1, 1, 1, 1) * residual).unflatten(0, draws.timesteps.shape)


def scene_gradient(teacher: DiffusersTeacher, scene: Tensor, azimuths: Tensor, draws: Draws, label: int) -> Tensor:
    """Return the mean gradient over cameras and draws: one render, encoding and way back for each camera."""
    scene = scene.detach().requires_grad_()
    latents = encode(teacher, render(scene, azimuths))
    mean = latent_gradients(teacher, latents.detach(), draws, label).mean(1)
    return torch.autograd.grad(latents, scene, mean / len(azimuths))[0]


def draw_azimuths(seed: int, purpose: str, count: int) -> Tensor:
    """Return uniform azimuths in radians."""
    return torch.from_numpy(
        np.radians([stream(seed, purpose, "camera", r).uniform(-MAX_AZIMUTH, MAX_AZIMUTH) for r in range(count)])
    ).float()


@dataclass(frozen=True)
class Distillation:
    """A teacher, the class that it is told, and the proposals to draw timesteps from."""

    teacher: DiffusersTeacher
    label: int
    proposals: dict[str, Proposal]

    def estimate(self, scene: Tensor, design: Design, *, seed: int, purpose: str) -> Tensor:
        """Return one estimate of the gradient of the scene."""
        draws = sample_draws(
            self.proposals[design.proposal],
            self.teacher.latent_shape,
            num_draws=design.num_draws,
            scheme=design.scheme,
            seed=seed,
            purpose=purpose,
            ids=range(design.num_upstream),
        )
        azimuths = draw_azimuths(seed, purpose, design.num_upstream)
        return scene_gradient(self.teacher, scene, azimuths, draws, self.label)

    def replicates(self, scene: Tensor, design: Design, *, num: int, purpose: str) -> Tensor:
        """Return independent estimates (replicates, scene)."""
        return torch.stack([self.estimate(scene, design, seed=i, purpose=purpose).flatten() for i in range(num)])

    def optimise(self, design: Design, *, learning_rate: float, checkpoints: Sequence[int], seed: int) -> list[Tensor]:
        """Return the scenes after so many steps of Adam (increasing) from the start that `seed` names."""
        scene, saved = new_scene(seed).requires_grad_(), []
        optimizer = torch.optim.Adam([scene], lr=learning_rate)
        for step in range(checkpoints[-1] + 1):
            saved += [scene.detach().clone()] * checkpoints.count(step)
            if step < checkpoints[-1]:
                scene.grad = self.estimate(scene, design, seed=seed, purpose=f"step {step}")
                optimizer.step()
        return saved


def single_draws(problem: Distillation, scene: Tensor, *, cameras: int, draws: int, purpose: str) -> tuple[Tensor, ...]:
    """Return timesteps (cameras, draws) and the gradient of every iid draw (cameras, draws, scene)."""
    uniform, shape = problem.proposals["uniform"], problem.teacher.latent_shape
    taken = sample_draws(uniform, shape, num_draws=draws, scheme="iid", purpose=purpose, ids=range(cameras))
    scene = scene.detach().requires_grad_()
    gradients = []
    for camera, azimuth in enumerate(draw_azimuths(0, purpose, cameras)):
        latents = encode(problem.teacher, render(scene, azimuth[None]))
        row = Draws(*(x[camera, None] for x in (taken.timesteps, taken.noise, taken.weights)), taken.band_sizes)
        each = latent_gradients(problem.teacher, latents.detach(), row, problem.label)[0]
        gradients += [torch.autograd.grad(latents, scene, one[None], retain_graph=True)[0].flatten() for one in each]
    return taken.timesteps, torch.stack(gradients).unflatten(0, (cameras, draws))


def pilot_proposal(timesteps: Tensor, gradients: Tensor) -> Proposal:
    """Return q ∝ root mean square gradient norm at t, in bins of as many draws, log-linear in between."""
    squares = gradients.flatten(0, 1).double().square().sum(1)
    profile = GradientProfile(*binned_rms(timesteps.flatten(), squares, PILOT_BINS))
    return importance_proposal(profile.at_every_timestep(1000))


def components_and_errors(gradients: Tensor, num_groups: int = 8) -> tuple[VarianceComponents, dict[str, float]]:
    """Return variance components and their standard errors: a jackknife over groups of cameras."""
    whole = variance_components(gradients[None])
    groups = torch.arange(len(gradients)).tensor_split(num_groups)
    left_out = [
        asdict(variance_components(gradients[None, torch.isin(torch.arange(len(gradients)), group, invert=True)]))
        for group in groups
    ]
    factor = (num_groups - 1) / num_groups**0.5
    return whole, {name: factor * float(np.std([x[name] for x in left_out])) for name in asdict(whole)}


def squared_deviations(replicates: Tensor) -> Tensor:
    """Return squared distances from the mean of replicates, scaled such that their mean is tr Cov without bias."""
    deviations = replicates.double() - replicates.double().mean(0)
    return deviations.square().sum(1) * len(replicates) / (len(replicates) - 1)


def bias_scores(replicates: Tensor, reference: Tensor, directions: Tensor) -> Tensor:
    """Return, along each direction, the difference of two means over replicates in its standard errors."""
    ours, theirs = (x.double() @ directions.double().T for x in (replicates, reference))
    error = (ours.var(0) / len(ours) + theirs.var(0) / len(theirs)).sqrt()
    return (ours.mean(0) - theirs.mean(0)) / error


def take_turns(functions: dict[str, Callable[[], object]], repetitions: int) -> dict[str, dict[str, float]]:
    """Return the median and the quartiles of the seconds of each call; the first turn is not counted."""
    times = np.zeros((repetitions + 1, len(functions)))
    for turn in times:
        for i, function in enumerate(functions.values()):
            start = time.perf_counter()
            function()
            turn[i] = time.perf_counter() - start
    quartiles = np.quantile(times[1:], [0.25, 0.5, 0.75], axis=0).T.tolist()
    return {
        name: dict(zip(["lower", "median", "upper"], row, strict=True))
        for name, row in zip(functions, quartiles, strict=True)
    }


def measure_seconds(problem: Distillation, scene: Tensor, repetitions: int) -> dict[str, dict[str, float]]:
    """Return seconds of a render and an encoding, there and back, of one and of 8 draws, and of whole estimates."""
    scene, front = scene.detach().requires_grad_(), torch.zeros(1)
    pixels = render(scene, front).detach().requires_grad_()
    latents = encode(problem.teacher, pixels).detach()
    uniform, shape = problem.proposals["uniform"], problem.teacher.latent_shape
    one, eight = (sample_draws(uniform, shape, num_draws=count, scheme="iid", ids=[0]) for count in (1, 8))
    parts: dict[str, Callable[[], object]] = {
        "render": lambda: torch.autograd.grad(render(scene, front).sum(), scene),
        "encode": lambda: torch.autograd.grad(encode(problem.teacher, pixels).sum(), pixels),
        "denoise 1": lambda: latent_gradients(problem.teacher, latents, one, problem.label),
        "denoise 8": lambda: latent_gradients(problem.teacher, latents, eight, problem.label),
    }
    wholes = {str(design): partial(problem.estimate, scene, design, seed=0, purpose="clock") for design in COUNTS}
    return take_turns(parts | wholes, repetitions)


def costs_of(seconds: dict[str, dict[str, float]]) -> Costs:
    """Return the cost of a render and an encoding, and an eighth of that of eight draws."""
    return Costs(
        upstream=seconds["render"]["median"] + seconds["encode"]["median"], draw=seconds["denoise 8"]["median"] / 8
    )


def seconds_of(design: Design, seconds: dict[str, dict[str, float]]) -> float:
    """Return the measured seconds of a whole estimate with as many cameras and draws."""
    return seconds[str(Design(design.num_upstream, design.num_draws))]["median"]


def measure_scene(name: str, problem: Distillation, scene: Tensor, seconds: dict, num: int) -> tuple[dict, Proposal]:
    """Return everything about the variance at a frozen scene, and the proposal of a pilot taken there.

    Streams are named after the scene, so that the scenes have nothing at random in common.
    """
    timesteps, pilot = single_draws(problem, scene, cameras=96, draws=4, purpose=f"{name} pilot")
    _, nested = single_draws(problem, scene, cameras=128, draws=4, purpose=f"{name} components")
    problem = replace(problem, proposals=problem.proposals | {"pilot": pilot_proposal(timesteps, pilot)})
    reference = problem.replicates(scene, REUSE, num=300, purpose=f"{name} reference")
    components, errors = components_and_errors(nested)
    rows = measure_designs(
        name, problem, scene, seconds, num, reference=reference, directions=pilot[:NUM_DIRECTIONS, 0]
    )
    one_camera = [design for design in COUNTS if design.num_upstream == 1]
    best = max(one_camera, key=lambda design: rows[str(design)]["ecm"]["measured"].value)
    summary = {
        "components": asdict(components),
        "component_errors": errors,
        "optimal_num_draws": components.optimal_num_draws(costs_of(seconds)),
        "best_measured_num_draws": best.num_draws,
        "predicted_variances": {str(d): components.variance(*d.counts) for d in COUNTS},
        "designs": rows,
    }
    return summary, problem.proposals["pilot"]


def measure_designs(
    name: str,
    problem: Distillation,
    scene: Tensor,
    seconds: dict,
    num: int,
    *,
    reference: Tensor,
    directions: Tensor,
) -> dict[str, dict]:
    """Return variance, bias and efficiency of every design over `num` replicates.

    The baseline is in every ratio, so it gets more of them: its squared deviations are averaged in groups, to be paired
    with the others.
    """
    rows: dict[str, dict] = {}
    for design in [*COUNTS, *SCHEMES]:
        repeats = BASELINE_REPEATS if design == BASELINE else 1
        replicates = problem.replicates(scene, design, num=repeats * num, purpose=f"{name} {design}")
        deviations = squared_deviations(replicates)
        if design == BASELINE:
            baseline = deviations.view(num, repeats).mean(1)
        efficiency = relative_efficiency(baseline, deviations.view(num, repeats).mean(1))
        scores = bias_scores(replicates, reference, directions)
        rows[str(design)] = {
            "variance": mean_and_error(deviations),
            "bias_rms": float(scores.square().mean().sqrt()),
            "bias_largest": float(scores.abs().max()),
            "relative_efficiency": efficiency,
            "ecm": multipliers(design, efficiency, seconds),
        }
    return rows


def multipliers(design: Design, efficiency: Measured, seconds: dict) -> dict[str, Measured]:
    """Return the ECM of a design over (1, 1) iid at measured costs, at ratios of upstream to draw, and by the clock."""
    models = {"measured": costs_of(seconds)} | {f"{ratio:g}": Costs(ratio, 1.0) for ratio in RATIOS}
    prices = {name: (model.of(*BASELINE.counts), model.of(*design.counts)) for name, model in models.items()}
    prices["clock"] = (seconds_of(BASELINE, seconds), seconds_of(design, seconds))
    return {name: effective_compute_multiplier(efficiency, *pair) for name, pair in prices.items()}


def least_noisy(scenes: dict[str, dict]) -> Design:
    """Return the scheme at (1, 8) with the least variance, in geometric mean over scenes."""
    return min(
        SCHEMES, key=lambda design: sum(math.log(x["designs"][str(design)]["variance"].value) for x in scenes.values())
    )


def coarse(pixels: Tensor) -> np.ndarray:
    """Return pictures at the 8 x 8 pixels of the original digits, flattened."""
    return F.avg_pool2d(pixels, IMAGE_SIZE // 8).flatten(1).numpy()


@dataclass(frozen=True)
class Judge:
    """Real digits and a classifier of half of them; `accuracy` is its accuracy on the other half."""

    digits: Tensor
    labels: Tensor
    classifier: LogisticRegression
    accuracy: float

    @torch.no_grad()
    def __call__(self, scene: Tensor, label: int) -> dict[str, float]:
        """Return means over fixed azimuths: of the class's probability and whether it is first, and of the distance.

        The distance is the root mean square difference in pixels, in [-1, 1], to the nearest real digit of the class.
        """
        views = render(scene, torch.from_numpy(np.radians(TEST_AZIMUTHS)).float())
        probabilities = self.classifier.predict_proba(coarse(views))
        distances = torch.cdist(views.flatten(1), self.digits[self.labels == label].flatten(1)) / IMAGE_SIZE
        return {
            "probability": float(probabilities[:, label].mean()),
            "log_probability": float(np.log(probabilities[:, label]).mean()),
            "accuracy": float((probabilities.argmax(1) == label).mean()),
            "distance": float(distances.min(1).values.mean()),
        }


def fit_judge(teacher: DiffusersTeacher) -> Judge:
    """Return a judge that knows the digits of scikit-learn, as the teacher sees them."""
    dataset = open_dataset("digits")
    examples = [dataset.load(row) for row in range(len(dataset))]
    digits = torch.stack([to_pixels(example.image, teacher.pixel_spec) for example in examples])
    features, labels = coarse(digits), torch.tensor([example.label for example in examples])
    classifier = LogisticRegression(max_iter=2000).fit(features[::2], labels[::2])
    return Judge(digits, labels, classifier, float(classifier.score(features[1::2], labels[1::2])))


@dataclass(frozen=True)
class Contest:
    """What all arms share: the problem (its class is the seed's last digit), costs, budget in seconds, and judge."""

    problem: Distillation
    costs: Costs
    budget: float
    judge: Judge

    def checkpoints(self, arm: Design) -> list[int]:
        """Return the numbers of steps that shares of the budget buy."""
        step = self.costs.of(*arm.counts)
        return [max(1, round(share * self.budget / step)) for share in BUDGET_SHARES]

    def run(self, arm: Design, learning_rate: float, seed: int) -> tuple[list[dict[str, float]], Tensor]:
        """Return what the judge says at each share of the budget, and the final scene."""
        problem = replace(self.problem, label=seed % 10)
        scenes = problem.optimise(arm, learning_rate=learning_rate, checkpoints=self.checkpoints(arm), seed=seed)
        return [self.judge(scene, problem.label) for scene in scenes], scenes[-1]

    def tune(self, arm: Design, seeds: Sequence[int]) -> dict[float, float]:
        """Return the mean log-probability over seeds at the end of the budget for each learning rate."""
        return {
            rate: float(np.mean([self.run(arm, rate, seed)[0][-1]["log_probability"] for seed in seeds]))
            for rate in LEARNING_RATES
        }


def compete(contest: Contest, arm: Design, *, tuning: Sequence[int], seeds: Sequence[int]) -> tuple[dict, dict]:
    """Return figures of an arm at its best learning rate, (shares of the budget, seeds), and its final scenes."""
    tuned = contest.tune(arm, tuning)
    rate = max(tuned, key=lambda rate: tuned[rate])
    runs = {seed: contest.run(arm, rate, seed) for seed in seeds}
    names = runs[seeds[0]][0][0]
    figures = {name: np.array([[x[name] for x in verdicts] for verdicts, _ in runs.values()]).T for name in names}
    settings = {"steps": contest.checkpoints(arm), "learning_rate": rate, "tuning": tuned}
    return settings | figures, {seed: scene for seed, (_, scene) in runs.items()}


def summarise(arms: dict[str, dict]) -> dict[str, dict]:
    """Return means over seeds with standard errors, and paired differences from the baseline."""
    result = {}
    for name, arm in arms.items():
        result[name] = {key: arm[key] for key in ("steps", "learning_rate", "tuning")}
        for figure in ("probability", "log_probability", "accuracy", "distance"):
            values, baseline = arm[figure], arms[str(BASELINE)][figure]
            result[name][figure] = [mean_and_error(row) for row in values]
            result[name][f"{figure}_over_baseline"] = [mean_and_error(row) for row in values - baseline]
    return result


def draw_picture(finals: dict[str, dict[int, Tensor]], seeds: Sequence[int], path: Path) -> None:
    """Draw views of the final scenes: a row for each arm, five azimuths for each of some seeds."""
    azimuths = torch.from_numpy(np.radians([-30, -15, 0, 15, 30])).float()
    figure = Figure(figsize=(9, 0.95 * len(finals)), layout="constrained")
    for axes, (name, scenes) in zip(figure.subplots(len(finals), 1, squeeze=False)[:, 0], finals.items(), strict=True):
        with torch.no_grad():
            views = torch.cat([render(scenes[seed], azimuths) for seed in seeds])
        axes.imshow(torch.cat(list(views[:, 0]), 1).numpy(), cmap="gray", vmin=-1, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(name.replace(") ", ")\n").replace(", uniform", ""), rotation=0, ha="right", va="center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def show(measured: Measured, digits: int = 2) -> str:
    """Return a figure with its standard error."""
    return f"{measured.value:.{digits}f} ± {measured.standard_error:.{digits}f}"


def variance_table(name: str, scene: dict) -> Table:
    """Return the table of one frozen scene."""
    models = [*next(iter(scene["designs"].values()))["ecm"]]
    title = f"{name}: K* = {scene['optimal_num_draws']:.1f}, best measured K = {scene['best_measured_num_draws']}"
    table = Table("design", "variance x 1000", "RE", *(f"ECM {model}" for model in models), "bias", title=title)
    for design, row in scene["designs"].items():
        variance = Measured(1000 * row["variance"].value, 1000 * row["variance"].standard_error)
        cells = [variance, row["relative_efficiency"], *row["ecm"].values()]
        table.add_row(design, *map(show, cells), f"{row['bias_rms']:.2f} {row['bias_largest']:.1f}")
    return table


def contest_table(arms: dict[str, dict]) -> Table:
    """Return the table of the optimised scenes."""
    shares = [f"p at {share:g}" for share in BUDGET_SHARES]
    names = [
        "arm",
        "steps",
        "rate",
        *shares,
        "log p",
        "accuracy",
        "distance",
        "p over baseline",
        "distance over baseline",
    ]
    table = Table(*names, title="optimised at equal cost")
    for name, arm in arms.items():
        last = ("log_probability", "accuracy", "distance", "probability_over_baseline", "distance_over_baseline")
        cells = [*arm["probability"], *(arm[name][-1] for name in last)]
        table.add_row(name, str(arm["steps"][-1]), f"{arm['learning_rate']:g}", *(show(cell, 3) for cell in cells))
    return table


@click.command()
@click.option("--num-replicates", default=96, show_default=True, help="Of every design at every frozen scene.")
@click.option("--num-timings", default=40, show_default=True)
@click.option("--num-seeds", default=10, show_default=True, help="Optimised scenes of each arm, one class each.")
@click.option("--num-tuning", default=2, show_default=True, help="Seeds for the choice of the learning rate.")
@click.option("--budget-steps", default=60, show_default=True, help="Budget of an optimisation in steps at (1, 8).")
@click.option("--output", type=click.Path(path_type=Path), default=Path("docs/benchmarks/sds.json"))
@click.option("--picture", type=click.Path(path_type=Path), default=Path("docs/images/sds.png"))
def main(
    num_replicates: int,
    num_timings: int,
    num_seeds: int,
    num_tuning: int,
    budget_steps: int,
    output: Path,
    picture: Path,
) -> None:
    """Measure costs and variances, optimise scenes at equal cost, print tables and draw the scenes."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    teacher, console = load_teacher("demo"), Console(width=200)
    problem = Distillation(teacher, LABEL, {"uniform": uniform_proposal(teacher.noise_schedule.num_timesteps)})
    seconds = measure_seconds(problem, new_scene(0), num_timings)
    costs = costs_of(seconds)
    moments = dict(zip(["start", "middle", "end"], (0, budget_steps // 4, budget_steps), strict=True))
    frozen = problem.optimise(REUSE, learning_rate=0.1, checkpoints=[*moments.values()], seed=1000)
    scenes, pilots = {}, {}
    for name, scene in zip(moments, frozen, strict=True):
        scenes[name], pilots[name] = measure_scene(name, problem, scene, seconds, num_replicates)
        console.print(variance_table(name, scenes[name]))
    problem = replace(problem, proposals=problem.proposals | {"pilot": pilots["middle"]})
    contest = Contest(problem, costs, budget_steps * costs.of(*REUSE.counts), fit_judge(teacher))
    seeds, tuning = range(num_seeds), [100 + 3 * i for i in range(num_tuning)]
    arms, finals = {}, {}
    for arm in [BASELINE, REUSE, least_noisy(scenes), Design(8, 1)]:
        arms[str(arm)], finals[str(arm)] = compete(contest, arm, tuning=tuning, seeds=seeds)
    summary = summarise(arms)
    console.print(contest_table(summary))
    draw_picture(finals, seeds[3:8:4], picture)
    result = {
        "command": "python scripts/bench_sds.py",
        "machine": describe_machine(),
        "seconds_in_all": time.perf_counter() - start,
        "label": LABEL,
        "num_replicates": num_replicates,
        "num_seeds": num_seeds,
        "seconds": seconds,
        "measured_ratio": costs.upstream / costs.draw,
        "frozen_at_step": moments,
        "scenes": scenes,
        "classifier_accuracy": contest.judge.accuracy,
        "budget_shares": BUDGET_SHARES,
        "budget_seconds": contest.budget,
        "arms": summary,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1, default=asdict) + "\n")


if __name__ == "__main__":
    main()
