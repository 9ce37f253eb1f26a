"""What features cost, against plain training steps with as many network evaluations.

Command:  python scripts/bench_featurize.py
Hardware: 2 CPU cores, about 10 minutes
Writes:   docs/benchmarks/featurize.json and the table that it prints

Training step: forward and backward with gradients of all weights, no optimizer. Floor: forward, and backward with
respect to activations only, no hooks. Ours: the features of encoded examples, Kronecker projection at its defaults. The
three take turns in every repetition, so that ratios hold while the machine's speed drifts; median and quartiles over
repetitions. Whole run: everything that `featurize` does with the 1,797 digits, that is reading, encoding, the pilot,
the features, writing, the kernel and the index, over the time of as many training steps as there are draws.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from machine import describe_machine
from rich.console import Console
from rich.table import Table

from carv_attrib import featurize, load_teacher
from carv_attrib.config import FeaturizeConfig
from carv_attrib.data import PixelSpec
from carv_attrib.estimator import Encoded, Estimator, build_estimator
from carv_attrib.gradient import row_objective
from carv_attrib.manifest import choose_micro_batch
from carv_attrib.teacher import Teacher
from carv_attrib.teachers._diffusers import DiffusersTeacher, freeze, schedule_of

QUARTILES = (0.25, 0.5, 0.75)


def unet_teacher() -> Teacher:
    """Return an untrained UNet of about 4M parameters for 16 x 16 latents with 4 channels."""
    unet = UNet2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=32,
    )
    freeze(unet, device=torch.device("cpu"), dtype=torch.float32)
    return DiffusersTeacher(
        source="random UNet",
        fingerprint="",
        pixel_spec=PixelSpec(16, 16, 3),
        latent_shape=(4, 16, 16),
        noise_schedule=schedule_of(DDPMScheduler()),
        condition_kind="none",
        num_classes=0,
        denoiser=unet,
    )


def random_examples(teacher: Teacher, num_examples: int) -> Encoded:
    """Return latents of unit variance and a class for each: the time of a network does not depend on what it sees."""
    latents = torch.randn(num_examples, 1, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    labels = [i % teacher.num_classes for i in range(num_examples)] if teacher.num_classes else None
    return Encoded(latents, teacher.condition(labels, None))


def plain_steps(estimator: Estimator, encoded: Encoded, *, train_weights: bool) -> None:
    """Run forward and backward for every draw of every example, in the calls that the features use."""
    teacher, num_draws = estimator.teacher, estimator.config.num_draws
    draws = estimator.draws([0])
    teacher.denoiser.requires_grad_(train_weights)
    for rows in torch.arange(len(encoded.latents) * num_draws).split(estimator.micro_batch):
        example, draw = rows // num_draws, rows % num_draws
        latents, noise, timesteps = encoded.latents[example, 0], draws.noise[0, draw], draws.timesteps[0, draw]
        noisy = teacher.noise_schedule.add_noise(latents, noise, timesteps).requires_grad_(not train_weights)
        output = teacher.predict(
            noisy, timesteps, {name: values[example] for name, values in encoded.condition.items()}
        )
        row_objective("loss", output, teacher.noise_schedule.target(latents, noise, timesteps)).sum().backward()
    teacher.denoiser.requires_grad_(False)
    teacher.denoiser.zero_grad(set_to_none=True)


def seconds(work: Callable[[], object]) -> float:
    """Return the wall-clock seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(teacher: Teacher, num_draws: int, num_examples: int, repetitions: int) -> dict[str, np.ndarray]:
    """Return the seconds of each method in each repetition, after one that is not counted."""
    config = FeaturizeConfig.from_flat({"num_draws": num_draws, "num_bands": min(4, num_draws)})
    estimator = build_estimator(teacher, config, choose_micro_batch(teacher, config), profile=None)
    encoded = random_examples(teacher, num_examples)
    ids = list(range(num_examples))
    methods: dict[str, Callable[[], object]] = {
        "training step": lambda: plain_steps(estimator, encoded, train_weights=True),
        "floor": lambda: plain_steps(estimator, encoded, train_weights=False),
        "ours": lambda: estimator.features(encoded, estimator.draws(ids)),
    }
    times = [{name: seconds(work) for name, work in methods.items()} for _ in range(repetitions + 1)]
    return {name: np.array([row[name] for row in times[1:]]) for name in methods}


def whole_run_ratio(teacher: Teacher, num_draws: int, repetitions: int) -> np.ndarray:
    """Return the time of `featurize` on all digits over that of as many training steps, in each repetition."""
    ratios = []
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory() as folder:
            run = seconds(lambda: featurize(teacher, "digits", folder, num_draws=num_draws))
        steps = measure(teacher, num_draws, 512 // num_draws, 3)["training step"].mean() / 512
        ratios.append(run / (1797 * num_draws * steps))
    return np.array(ratios)


@click.command()
@click.option("--repetitions", default=15, show_default=True)
@click.option("--num-threads", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("docs/benchmarks/featurize.json"))
def main(repetitions: int, num_threads: tuple[int, ...], output: Path) -> None:
    """Measure both teachers and print one table."""
    rows = []
    for name, teacher, num_evaluations in (("demo DiT", load_teacher("demo"), 512), ("UNet", unet_teacher(), 128)):
        millions = sum(p.numel() for p in teacher.denoiser.parameters()) / 1e6
        for threads in num_threads:
            torch.set_num_threads(threads)
            for num_draws in (4, 16):
                times = measure(teacher, num_draws, num_evaluations // num_draws, repetitions)
                row = {"teacher": f"{name}, {millions:.1f}M", "threads": threads, "num_draws": num_draws}
                row["training_ms_per_evaluation"] = 1e3 * float(np.median(times["training step"])) / num_evaluations
                for method in ("floor", "ours"):
                    row[f"{method}_ratio"] = np.quantile(times[method] / times["training step"], QUARTILES).tolist()
                row["whole_run_ratio"] = None
                if name == "demo DiT":
                    whole = whole_run_ratio(teacher, num_draws, 3)
                    row["whole_run_ratio"] = np.quantile(whole, QUARTILES).tolist()
                rows.append(row)
    result = {"command": "python scripts/bench_featurize.py", "machine": describe_machine(), "rows": rows}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    ratios = ("floor", "ours", "whole_run")
    table = Table("teacher", "threads", "draws", "training step", *ratios, title="ratios: median [quartiles]")
    for row in rows:
        cells = [row[f"{ratio}_ratio"] for ratio in ratios]
        shown = ["{1:.2f} [{0:.2f}, {2:.2f}]".format(*cell) if cell else "" for cell in cells]
        step = f"{row['training_ms_per_evaluation']:.2f} ms/evaluation"
        table.add_row(row["teacher"], str(row["threads"]), str(row["num_draws"]), step, *shown)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
