"""Are the gradients of `dattri` those that the LDS benchmark takes from `trak`, and what do they cost?

Command:  python scripts/check_dattri.py     (pip install dattri)
Hardware: one CPU core, about 10 minutes
Writes:   docs/benchmarks/dattri.json and the table that it prints

`TRAKAttributor` of dattri projects the gradients of one number an example, by `vmap`, and solves with their Gram matrix
and its `regularization`: TRAK as `trak` has it, with other random numbers in the projection. So what could differ is
the gradient. It is compared for the loss averaged over 4 draws of each example's own, both teachers of the LDS
benchmark; attention is by PyTorch's plain kernel, since `vmap` has no rule for the others. In each round dattri, `trak`
and `featurize`'s own code are timed one after the other on the same new examples: gradients of dattri and trak, and of
ours the projected features, with the default dimensions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from benchmark import describe_machine, quartiles
from dattri.task import AttributionTask
from lds_inputs import Inputs, take
from lds_peers import MeanOverDraws, mean_gradients, peer_draws, trainable, trak_recipe
from make_lds_ground_truth import FOLDER, TASKS, one_thread
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from carv_attrib import load_teacher
from carv_attrib.config import FeaturizeConfig
from carv_attrib.estimator import build_estimator
from carv_attrib.evaluation import GroundTruth
from carv_attrib.files import atomic_file
from carv_attrib.teacher import Teacher

OUTPUT = Path("docs/benchmarks/dattri.json")
NUM_DRAWS, PER_ROUND, ROUNDS = 4, 16, 5


class MeanLoss(nn.Module):
    """The loss of one example, averaged over its draws."""

    def __init__(self, teacher: Teacher, condition_names: list[str]) -> None:
        super().__init__()
        self.denoiser = teacher.denoiser
        self._output = MeanOverDraws(teacher, "loss", condition_names)

    def forward(self, *row: Tensor) -> Tensor:
        """Return the loss, of no dimensions."""
        return self._output.get_output(self.denoiser, None, None, *(values[None] for values in row))[0]


def dattri_gradients(inputs: Inputs) -> Callable[[slice], Tensor]:
    """Return what computes the gradients of some examples by `dattri`."""
    loss = MeanLoss(inputs.teacher, list(inputs.encoded.condition))
    draws = peer_draws(trak_recipe(NUM_DRAWS), inputs.teacher, inputs.ids)
    columns = (inputs.encoded.latents[:, 0], draws.timesteps, draws.noise, *inputs.encoded.condition.values())

    def mean_loss(parameters: dict[str, Tensor], row: tuple[Tensor, ...]) -> Tensor:
        return torch.func.functional_call(loss, parameters, row)

    with trainable(loss.denoiser):
        task = AttributionTask(mean_loss, loss, loss.state_dict())
        gradients, parameters = task.get_grad_loss_func(in_dims=(None, 0)), task.get_param(0)[0]

    def compute(rows: slice) -> Tensor:
        with trainable(loss.denoiser), sdpa_kernel(SDPBackend.MATH):
            return gradients(parameters, tuple(values[rows] for values in columns)).detach()

    return compute


def compare(name: str) -> dict[str, Any]:
    """Return the relative difference of the gradients, and seconds an example over ours, quartiles over rounds."""
    folder = FOLDER / name
    truth = GroundTruth.load(folder / "ground-truth.npz")
    inputs = Inputs(name, load_teacher(folder / "teacher", device="cpu"), truth)
    config = FeaturizeConfig.from_flat({"num_draws": NUM_DRAWS, "weighting": "uniform"})
    estimator = build_estimator(inputs.teacher, config, PER_ROUND * NUM_DRAWS, None)
    by_dattri = dattri_gradients(inputs)

    def by_trak(rows: slice) -> Tensor:
        return mean_gradients(trak_recipe(NUM_DRAWS), inputs.teacher, take(inputs.encoded, rows), inputs.ids[rows])

    def by_us(rows: slice) -> Tensor:
        return estimator.features(take(inputs.encoded, rows), estimator.draws(inputs.ids[rows]))

    seconds: dict[str, list[float]] = {"dattri": [], "trak": [], "ours": []}
    differences = []
    for number in range(ROUNDS + 1):  # the first to warm up
        rows, found = slice(number * PER_ROUND, (number + 1) * PER_ROUND), {}
        for method, compute in (("dattri", by_dattri), ("trak", by_trak), ("ours", by_us)):
            started = time.perf_counter()
            found[method] = compute(rows)
            seconds[method].append((time.perf_counter() - started) / PER_ROUND)
        own, reference = found["dattri"], found["trak"]
        differences.append(float(((own - reference).norm(dim=1) / reference.norm(dim=1)).max()))
    ours = np.array(seconds["ours"][1:])
    return {
        "largest_relative_difference": max(differences),
        "seconds_an_example": {method: quartiles(own[1:]) for method, own in seconds.items()},
        "times_ours": {method: quartiles(np.array(seconds[method][1:]) / ours) for method in ("dattri", "trak")},
    }


@click.command()
def main() -> None:
    """Compare for both tasks, and write."""
    one_thread()
    result = {"command": "python scripts/check_dattri.py", "machine": describe_machine()}
    result |= {name: compare(name) for name in TASKS}
    with atomic_file(OUTPUT) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    for name in TASKS:
        click.echo(
            f"{name}: largest relative difference of a gradient {result[name]['largest_relative_difference']:.1e}"
        )
        for method, (low, middle, high) in result[name]["times_ours"].items():
            click.echo(f"  {method}: {middle:.1f} [{low:.1f}, {high:.1f}] times as long as our projected features")


if __name__ == "__main__":
    main()
