"""TRAK and D-TRAK through the code of `trak`: its gradients, its projector and its scores.

An example's gradient is that of one number, the objective averaged over its draws: one backward of as many rows as it
has draws, by `IterativeGradientComputer`, and all parameters, as both papers have it. `BasicProjector` (Rademacher)
makes its matrix anew in every call, so that gradients are gathered and projected as many at a time as memory allows.
`BasicScoreComputer` adds `lambda_reg` to Phi^T Phi, a sum over training examples of products of features that are not
scaled: here `lambda_reg` is the damping times the mean eigenvalue of Phi^T Phi, so that dampings mean what they mean
elsewhere. (It solves in float32, and divides by the mean entry of the inverse, which no rank correlation sees.) The
gradient of the loss with respect to the output that is attributed is 1, as in D-TRAK.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from lds_inputs import DAMPINGS, Inputs, kept, take
from torch import Tensor, nn
from trak.gradient_computers import IterativeGradientComputer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import BasicProjector, ProjectionType
from trak.score_computers import BasicScoreComputer
from trak.utils import get_num_params

from carv_attrib.config import NoiseSharing, Objective
from carv_attrib.estimator import Encoded
from carv_attrib.gradient import row_objective
from carv_attrib.sampling import Draws, Scheme, sample_draws, uniform_proposal
from carv_attrib.teacher import Teacher

CPU = torch.device("cpu")
GRADIENT_BYTES = 6 * 2**30
"""Of the gradients that wait for the projector."""
MATRIX_COLUMNS = 128
"""Of the part of the projector's matrix that exists at once."""


@dataclass(frozen=True)
class Peer:
    """A recipe of TRAK or D-TRAK.

    Attributes:
        num_draws: K, network evaluations for each example.
        scheme: how timesteps are chosen.
        noise: the same for all examples, or their own for each.
        objective: what is differentiated.
        proj_dim: dimensions of a feature; the default of `trak`.
    """

    num_draws: int
    scheme: Scheme
    noise: NoiseSharing
    objective: Objective
    proj_dim: int = 2048

    def scores(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """Return the scores of all queries at every damping."""
        folder = inputs.folder({"library": "trak", **asdict(self)})
        features = project(inputs, self, folder)
        return kept(folder / "scores.npz", lambda: score(features, inputs.num_train, DAMPINGS))


def trak_recipe(num_draws: int) -> Peer:
    """Return TRAK's recipe: the loss, at timesteps and noise of each example's own."""
    return Peer(num_draws, "iid", "independent", "loss")


def dtrak_recipe(num_draws: int) -> Peer:
    """Return D-TRAK's recipe: the squared norm of the output, on a fixed grid of timesteps."""
    return Peer(num_draws, "grid", "shared", "squared-norm")


class MeanOverDraws(AbstractModelOutput):
    """What `trak` differentiates: an objective of the teacher, averaged over the draws of each example."""

    def __init__(self, teacher: Teacher, objective: Objective, condition_names: Sequence[str]) -> None:
        self._teacher, self._objective, self._names = teacher, objective, condition_names

    def get_output(
        self,
        model: nn.Module,
        weights: None,
        buffers: None,
        latents: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        *condition: Tensor,
    ) -> Tensor:
        """Return a number for each example, whose draws are in the second axis of timesteps and noise."""
        num_draws, schedule = timesteps.shape[1], self._teacher.noise_schedule
        latents, *condition = (values.repeat_interleave(num_draws, dim=0) for values in (latents, *condition))
        timesteps, noise = timesteps.flatten(), noise.flatten(0, 1).to(latents)
        noisy = schedule.add_noise(latents, noise, timesteps)
        output = self._teacher.predict(noisy, timesteps, dict(zip(self._names, condition, strict=True)))
        values = row_objective(self._objective, output, schedule.target(latents, noise, timesteps))
        return values.view(-1, num_draws).mean(1)

    def get_out_to_loss_grad(self, model: nn.Module, weights: None, buffers: None, batch: Sequence[Tensor]) -> Tensor:
        """Return ones."""
        return torch.ones(len(batch[0]), 1)


@contextmanager
def trainable(denoiser: nn.Module) -> Iterator[None]:
    """Let gradients of all weights be taken."""
    denoiser.requires_grad_(True)
    try:
        yield
    finally:
        denoiser.requires_grad_(False)


def peer_draws(peer: Peer, teacher: Teacher, ids: Sequence[int]) -> Draws:
    """Return the draws of the examples with these ids, the same that `featurize` has with the same settings."""
    draws = sample_draws(
        uniform_proposal(teacher.noise_schedule.num_timesteps),
        teacher.latent_shape,
        num_draws=peer.num_draws,
        scheme=peer.scheme,
        ids=ids if peer.noise == "independent" else None,
    )
    return draws.expand(len(ids))


def mean_gradients(peer: Peer, teacher: Teacher, encoded: Encoded, ids: Sequence[int]) -> Tensor:
    """Return the gradient of every example with respect to all parameters, (examples, parameters)."""
    denoiser, names = teacher.denoiser, list(encoded.condition)
    output = MeanOverDraws(teacher, peer.objective, names)
    num_params = get_num_params(denoiser)
    gradients = torch.empty(len(ids), num_params)
    with trainable(denoiser):
        computer = IterativeGradientComputer(denoiser, output, num_params, torch.float32, CPU)
        for row, own in enumerate(ids):
            draws, one = peer_draws(peer, teacher, [own]), take(encoded, slice(row, row + 1))
            batch = (one.latents[:, 0], draws.timesteps, draws.noise, *(one.condition[name] for name in names))
            gradients[row] = computer.compute_per_sample_grad(batch)[0]
    return gradients


def project(inputs: Inputs, peer: Peer, folder: Path) -> Tensor:
    """Return the features of training examples and queries; those of each chunk are kept, and made where missing."""
    num_params = get_num_params(inputs.teacher.denoiser)
    step, features = max(1, GRADIENT_BYTES // (4 * num_params)), []
    for start in range(0, len(inputs.ids), step):
        rows = slice(start, min(start + step, len(inputs.ids)))

        def compute(rows: slice = rows) -> dict[str, np.ndarray]:
            begun = time.perf_counter()
            gradients = mean_gradients(peer, inputs.teacher, take(inputs.encoded, rows), inputs.ids[rows])
            middle = time.perf_counter()
            values = projector(num_params, peer.proj_dim).project(gradients, model_id=0)
            seconds = np.array([middle - begun, time.perf_counter() - middle])
            print("  rows {}-{}: {:.0f} s gradients, {:.0f} s projection".format(rows.start, rows.stop, *seconds))
            return {"features": values.numpy(), "seconds": seconds}

        arrays = kept(folder / f"features-{rows.start}-{rows.stop}.npz", compute)
        features.append(torch.from_numpy(arrays["features"]))
    return torch.cat(features)


def projector(num_params: int, proj_dim: int) -> BasicProjector:
    """Return the projector of `trak`, with signs, the same in every call."""
    kind = ProjectionType.rademacher
    return BasicProjector(num_params, proj_dim, 0, kind, CPU, block_size=MATRIX_COLUMNS, dtype=torch.float32)


def score(features: Tensor, num_train: int, dampings: Sequence[float]) -> dict[str, np.ndarray]:
    """Return the scores of the queries, the rows after the training examples, at every damping: (queries, train)."""
    train, query = features[:num_train], features[num_train:]
    xtx = BasicScoreComputer(torch.float32, CPU).get_xtx(train)
    found = {}
    for damping in dampings:
        computer = BasicScoreComputer(torch.float32, CPU, lambda_reg=damping * float(xtx.diagonal().mean()))
        scores = torch.zeros(num_train, len(query))
        computer.get_scores(computer.get_x_xtx_inv(train, xtx), query, accumulator=scores)
        found[str(damping)] = scores.T.numpy()
    return found
