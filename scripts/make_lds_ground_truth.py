"""Retrain two teachers on random halves of the digits, and keep the losses of every model: the ground truth of LDS.

Command:  python scripts/make_lds_ground_truth.py --task demo --processes 2     (then --task pixels)
Hardware: 3.5 minutes of one CPU core for a model of `demo`, 5 for one of `pixels`
Writes:   docs/benchmarks/lds/TASK/: `teacher/`, a pipeline, and, after every model, `ground-truth.npz`; a killed
          run goes on

Tasks: `demo`, the class-conditional DiT in the latents of the packaged autoencoder; `pixels`, the unconditional UNet
on 8 x 8 pixels. 100 digits, chosen by a hash, are held out from everything but the autoencoder. The teacher is trained
on the other 1,697 for 100 epochs; each further model on a random half of those (848), also for 100 epochs, from its own
initial weights, with its own order and noise. Same optimizer and schedule as the packaged teachers, in batches of 64
and with an average of decay 0.99, since these runs are shorter.

Queries: the 100 held-out digits, and 100 that the teacher generates (ten of each class for `demo`). The loss of a query
is the teacher's own, at 64 draws of (t, eps), the same for every model, in 16 strata of equal mass; kept are the means
over each stratum. These draws have a purpose of their own, so that they are independent of those of any feature.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
import torch
import train_demo_teacher
import train_pixel_teacher
from diffusers import DDPMPipeline, DiffusionPipeline, DiTPipeline
from PIL import Image
from torch import Tensor, nn

from carv_attrib import load_teacher
from carv_attrib.data import to_pixels
from carv_attrib.files import atomic_file
from carv_attrib.gradient import row_objective
from carv_attrib.sampling import sample_draws, uniform_proposal
from carv_attrib.seeding import choose_positions, stream_key
from carv_attrib.teacher import Teacher
from carv_attrib.teachers import PACKAGED

Key, Result = TypeVar("Key"), TypeVar("Result")

FOLDER = Path("docs/benchmarks/lds")
NUM_HELD_OUT = NUM_GENERATED = 100
EPOCHS, BATCH_SIZE, DECAY = 100, 64, 0.99
NUM_DRAWS, NUM_STRATA = 64, 16
SEED = 0


@dataclass(frozen=True)
class Task:
    """What is retrained.

    Attributes:
        packaged: the teacher whose encoder and schedule it has.
        new_denoiser: an untrained one.
        component: its name in the pipeline.
        generate: 100 pictures from a pipeline, and their labels.
    """

    packaged: str
    new_denoiser: Callable[[], nn.Module]
    component: str
    generate: Callable[[Any], tuple[list[Image.Image], list[int]]]


def generate_demo(pipeline: DiTPipeline) -> tuple[list[Image.Image], list[int]]:
    """Return ten digits of each class, without guidance."""
    labels = [i % 10 for i in range(NUM_GENERATED)]
    generator = torch.Generator().manual_seed(SEED)
    return pipeline(labels, guidance_scale=1.0, generator=generator, num_inference_steps=50).images, labels


def generate_pixels(pipeline: DDPMPipeline) -> tuple[list[Image.Image], list[int]]:
    """Return unconditional digits; a label of -1 is none."""
    generator = torch.Generator().manual_seed(SEED)
    return pipeline(batch_size=NUM_GENERATED, generator=generator).images, [-1] * NUM_GENERATED


TASKS = {
    "demo": Task("demo", train_demo_teacher.new_denoiser, "transformer", generate_demo),
    "pixels": Task("demo-pixels", train_pixel_teacher.new_denoiser, "unet", generate_pixels),
}


@dataclass(frozen=True)
class Digits:
    """All digits as a task's models see them.

    Attributes:
        teacher: whose encoder and schedule they have.
        images: pixels in [-1, 1].
        latents: of all digits.
        labels: of all digits.
        train_ids: row numbers of those that are trained on.
        held_out_ids: row numbers of the others.
    """

    teacher: Teacher
    images: Tensor
    latents: Tensor
    labels: Tensor
    train_ids: Tensor
    held_out_ids: Tensor

    def condition(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return what the denoiser is given besides latents and timesteps."""
        return (self.labels[rows],) if self.teacher.condition_kind == "label" else ()


@cache
def load_digits(name: str) -> Digits:
    """Return the digits of a task, encoded, and how they are split."""
    teacher = load_teacher(TASKS[name].packaged, device="cpu")
    images, labels = train_demo_teacher.digits(teacher.pixel_spec)
    with torch.no_grad():
        latents = torch.cat([teacher.encode(chunk) for chunk in images.split(256)])
    order = choose_positions(stream_key(SEED, "held-out"), torch.arange(len(images)), len(images))
    held_out, train = order[:NUM_HELD_OUT].sort().values, order[NUM_HELD_OUT:].sort().values
    return Digits(teacher, images, latents, labels, train, held_out)


def subset_mask(digits: Digits, subset: int) -> Tensor:
    """Return which of the training digits are in a random half."""
    num_train = len(digits.train_ids)
    mask = torch.zeros(num_train, dtype=torch.bool)
    mask[choose_positions(stream_key(SEED, "subset", subset), digits.train_ids, num_train // 2)] = True
    return mask


def train_on(name: str, rows: Tensor, *stream_name: str | int, epochs: float) -> nn.Module:
    """Return a denoiser trained on some digits, from weights, an order and a noise that the name decides."""
    digits = load_digits(name)
    torch.manual_seed(stream_key(SEED, "initial weights", *stream_name) % 2**63)
    generator = torch.Generator().manual_seed(stream_key(SEED, "training", *stream_name) % 2**63)
    denoiser = train_demo_teacher.train_denoiser(
        TASKS[name].new_denoiser(),
        digits.latents[rows],
        digits.condition(rows),
        max(1, round(epochs * len(rows) / BATCH_SIZE)),
        generator,
        batch_size=BATCH_SIZE,
        decay=DECAY,
    )
    return denoiser.eval().requires_grad_(False)


def query_pixels(teacher: Teacher, pictures: np.ndarray) -> Tensor:
    """Return the pictures of the queries as a teacher takes them."""
    return torch.stack([to_pixels(Image.fromarray(picture), teacher.pixel_spec) for picture in pictures])


@torch.no_grad()
def query_losses(name: str, denoiser: nn.Module, pictures: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the mean loss of each query in each stratum of timesteps, (queries, strata), in float32."""
    digits = load_digits(name)
    teacher = digits.teacher
    latents = teacher.encode(query_pixels(teacher, pictures))
    draws = sample_draws(
        uniform_proposal(teacher.noise_schedule.num_timesteps),
        teacher.latent_shape,
        num_draws=NUM_DRAWS,
        seed=SEED,
        purpose="ground truth",
        ids=range(len(pictures)),
    )
    condition = (torch.from_numpy(labels),) if teacher.condition_kind == "label" else ()
    columns = []
    for timesteps, noise in zip(draws.timesteps.T, draws.noise.transpose(0, 1), strict=True):
        noisy = teacher.noise_schedule.add_noise(latents, noise, timesteps)
        output = denoiser(noisy, timesteps, *condition).sample
        target = teacher.noise_schedule.target(latents, noise, timesteps)
        columns.append(row_objective("loss", output, target))
    return torch.stack(columns, dim=1).view(len(pictures), NUM_STRATA, -1).mean(2).numpy()


def make_teacher(name: str, folder: Path, epochs: float) -> None:
    """Train the teacher on all training digits, save it, and keep the queries, with no models yet."""
    digits, task = load_digits(name), TASKS[name]
    denoiser = train_on(name, digits.train_ids, name, "teacher", epochs=epochs)
    packaged = Path("carv_attrib/demo") / PACKAGED[task.packaged]
    pipeline = DiffusionPipeline.from_pretrained(packaged, use_safetensors=True)
    pipeline.register_modules(**{task.component: denoiser})
    pipeline.to(torch.float16).save_pretrained(folder / "teacher", safe_serialization=True)
    pipeline = DiffusionPipeline.from_pretrained(folder / "teacher", use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    generated, generated_labels = task.generate(pipeline)
    held_out = [train_demo_teacher.from_pixels(digits.images[row]) for row in digits.held_out_ids]
    labels = digits.labels[digits.held_out_ids] if digits.teacher.condition_kind == "label" else None
    held_out_labels = labels.tolist() if labels is not None else [-1] * NUM_HELD_OUT
    save(
        folder / "ground-truth.npz",
        {
            "masks": np.zeros((0, len(digits.train_ids)), bool),
            "losses": np.zeros((0, NUM_HELD_OUT + NUM_GENERATED, NUM_STRATA), np.float32),
            "subsets": np.zeros(0, np.int64),
            "seeds": np.zeros(0, np.int64),
            "epochs": np.float64(epochs),
            "train_ids": digits.train_ids.numpy(),
            "query_kinds": np.array(["held-out"] * NUM_HELD_OUT + ["generated"] * NUM_GENERATED),
            "query_labels": np.array(held_out_labels + generated_labels, np.int64),
            "query_images": np.stack([np.asarray(x.convert("L")) for x in held_out + generated]),
        },
    )


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays to an npz file, whole or not at all."""
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def train_subset_model(name: str, folder: Path, subset: int, seed: int, epochs: float) -> np.ndarray:
    """Return the losses of the queries under a model of a random half."""
    digits = load_digits(name)
    denoiser = train_on(name, digits.train_ids[subset_mask(digits, subset)], name, subset, seed, epochs=epochs)
    with np.load(folder / "ground-truth.npz") as file:
        return query_losses(name, denoiser, file["query_images"], file["query_labels"])


def add_model(path: Path, mask: np.ndarray, losses: np.ndarray, subset: int, seed: int) -> None:
    """Add a model to the ground truth, in the order of (subset, seed)."""
    with np.load(path) as file:
        arrays = dict(file)
    new = {"masks": mask, "losses": losses, "subsets": np.int64(subset), "seeds": np.int64(seed)}
    for key, value in new.items():
        arrays[key] = np.concatenate([arrays[key], value[None]])
    order = np.lexsort((arrays["seeds"], arrays["subsets"]))
    save(path, arrays | {key: arrays[key][order] for key in new})


def one_thread() -> None:
    """Let each process compute with one thread."""
    torch.set_num_threads(1)


def in_processes(
    work: Callable[..., Result], arguments: Mapping[Key, tuple[Any, ...]], processes: int
) -> Generator[tuple[Key, Result], None, None]:
    """Yield each key and what `work` returns for its arguments, as they are done in processes of one thread."""
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=one_thread)
    running = {pool.submit(work, *own): key for key, own in arguments.items()}
    try:
        for future in as_completed(running):
            yield running[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@click.command()
@click.option("--task", "name", type=click.Choice(list(TASKS)), required=True)
@click.option("--subsets", default=64, show_default=True)
@click.option("--seeds", default=2, show_default=True)
@click.option("--processes", default=os.cpu_count() or 1, show_default=True)
@click.option("--epochs", default=float(EPOCHS), show_default=True, help="Fewer for a trial, with another --folder.")
@click.option("--folder", type=click.Path(path_type=Path), default=FOLDER, show_default=True)
def main(name: str, subsets: int, seeds: int, processes: int, epochs: float, folder: Path) -> None:
    """Train the teacher, if it is not there, and every model that is missing."""
    folder = folder / name
    path = folder / "ground-truth.npz"
    one_thread()
    if not path.is_file():
        make_teacher(name, folder, epochs)
    with np.load(path) as file:
        done = set(zip(file["subsets"].tolist(), file["seeds"].tolist(), strict=True))
        if file["epochs"] != epochs:
            raise click.UsageError(f"{path} has models of {file['epochs']} epochs; use those, or another --folder.")
    missing = [(m, s) for m in range(subsets) for s in range(seeds) if (m, s) not in done]
    digits, started = load_digits(name), time.monotonic()
    arguments = {(m, s): (name, folder, m, s, epochs) for m, s in missing}
    with closing(in_processes(train_subset_model, arguments, processes)) as results:
        for number, ((subset, seed), losses) in enumerate(results, 1):
            add_model(path, subset_mask(digits, subset).numpy(), losses, subset, seed)
            left = (time.monotonic() - started) / number * (len(missing) - number)
            click.echo(
                f"{name}: {len(done) + number} models, subset {subset}, seed {seed}; {left / 60:.0f} minutes left"
            )


if __name__ == "__main__":
    main()
