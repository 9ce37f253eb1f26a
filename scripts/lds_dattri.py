"""TRAK through the code of `dattri`: its gradients, its projector and its scores.

`TRAKAttributor` as its authors ship it, on the loss of each example averaged over its draws. It asks for the
probability that an example is classified correctly, which a diffusion model has not: 0, so that no example is weighted.
Its `regularization` is added to Phi^T Phi; here it is the damping times the mean eigenvalue of that, which the first
examples estimate. Each damping is a run of its own, as for anybody who uses it: it keeps no features.

Needs:  pip install dattri
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from lds_inputs import DAMPINGS, Inputs, kept
from lds_peers import MeanOverDraws, peer_draws, trainable, trak_recipe
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from carv_attrib.teacher import Teacher

CHUNK = 128
"""Examples whose gradients exist at once."""


@dataclass(frozen=True)
class Dattri:
    """TRAK's recipe through `dattri`.

    Attributes:
        num_draws: K, network evaluations for each example.
        proj_dim: dimensions of a feature.
    """

    num_draws: int
    proj_dim: int

    def scores(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """Return the scores of all queries at every damping."""
        folder = inputs.folder({"library": "dattri", **asdict(self)})
        found: dict[str, np.ndarray] = {}
        with trainable(inputs.teacher.denoiser):
            for damping in DAMPINGS:
                found |= kept(folder / f"{damping}.npz", lambda own=damping: {str(own): self.score(inputs, own)})
        return found

    def score(self, inputs: Inputs, damping: float) -> np.ndarray:
        """Return the scores of all queries, (queries, train)."""
        from dattri.algorithm.trak import TRAKAttributor
        from dattri.func.projection import random_project
        from dattri.task import AttributionTask

        loss = MeanLoss(inputs.teacher, list(inputs.encoded.condition))
        rows = self.rows(inputs)
        projector = {"proj_dim": self.proj_dim, "proj_max_batch_size": 32, "proj_seed": 0, "device": "cpu"}

        def mean_loss(parameters: dict[str, Tensor], row: tuple[Tensor, ...]) -> Tensor:
            return torch.func.functional_call(loss, parameters, row)

        def attributor(regularization: float) -> Any:
            task = AttributionTask(mean_loss, loss, loss.state_dict())
            return TRAKAttributor(task, no_probability, projector, regularization=regularization)

        first = attributor(0.0)
        gradients = first.grad_loss_func(first.task.get_param(0)[0], tuple(values[:CHUNK] for values in rows))
        features = random_project(gradients / first.norm_scaler, CHUNK, **projector)(gradients / first.norm_scaler, 0)
        eigenvalue = float(features.square().sum()) * inputs.num_train / CHUNK / self.proj_dim
        train, query = (
            DataLoader(TensorDataset(*(values[part] for values in rows)), CHUNK)
            for part in (slice(inputs.num_train), slice(inputs.num_train, None))
        )
        damped = attributor(damping * eigenvalue)
        damped.cache(train)
        return damped.attribute(query).T.numpy()

    def rows(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return latents, timesteps, noise and condition of training examples, then of queries."""
        draws = peer_draws(trak_recipe(self.num_draws), inputs.teacher, inputs.ids)
        return (inputs.encoded.latents[:, 0], draws.timesteps, draws.noise, *inputs.encoded.condition.values())


class MeanLoss(nn.Module):
    """The loss of one example, averaged over its draws."""

    def __init__(self, teacher: Teacher, condition_names: list[str]) -> None:
        super().__init__()
        self.denoiser = teacher.denoiser
        self._output = MeanOverDraws(teacher, "loss", condition_names)

    def forward(self, *row: Tensor) -> Tensor:
        """Return the loss, of no dimensions."""
        return self._output.get_output(self.denoiser, None, None, *(values[None] for values in row))[0]


def no_probability(parameters: dict[str, Tensor], row: tuple[Tensor, ...]) -> Tensor:
    """Return 0."""
    return torch.zeros(())
