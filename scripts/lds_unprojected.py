"""Ours without a projection: what the projection costs in LDS, and what more dimensions can give.

With V the gradients of all training examples at all shared draws, m rows, and G their parameters, `H = V^T V / m` has
G^2 entries, but

    g^T (H + lambda I)^{-1} V^T = m (V g)^T (V V^T + m lambda I)^{-1}

holds exactly and needs inner products alone: those of all training gradients, and of queries' with them. They are
summed over groups of layers, the gradients of one group at a time, and kept after each.

The damping is relative to the mean of the m eigenvalues of H that are not zero; H is a mean over all training examples,
where an index takes 1,000.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from lds_inputs import DAMPINGS, Inputs, index, kept, take
from torch import Tensor

from carv_attrib.estimator import Encoded, Estimator, check_finite, root_weighted
from carv_attrib.files import atomic_file
from carv_attrib.manifest import restore_estimator
from carv_attrib.projection import Layer, weight_gradient

GRADIENT_BYTES = 5 * 2**30
"""Of the gradients of one group of layers."""
PANEL = 1024
"""Rows of the products that are computed at once."""
CHUNK = 64
"""Examples that are differentiated at once."""


@dataclass(frozen=True)
class WithoutProjection:
    """Our method, with as many bands as draws.

    Attributes:
        num_draws: K, network evaluations for each example; the gradients need them once for each group of layers.
    """

    num_draws: int

    def scores(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """Return the scores of all queries at every damping."""
        settings = {"num_draws": self.num_draws, "num_bands": self.num_draws}
        folder = inputs.folder({"unprojected": settings})
        # for its pilot: the same weights of timesteps, and the same draws
        estimator = restore_estimator(inputs.teacher, index(inputs, settings).manifest)

        def compute() -> dict[str, np.ndarray]:
            gram = inner_products(estimator, inputs.encoded, inputs.ids, inputs.num_train, folder / "gram.npz")
            return {str(damping): score(gram, self.num_draws, damping).float().numpy() for damping in DAMPINGS}

        return kept(folder / "scores.npz", compute)


class Unprojected:
    """A projector that leaves gradients as they are."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self.proj_dim = self.block_dim = sum(layer.num_weights for layer in layers)

    @property
    def families(self) -> Tensor:
        """Nothing is random."""
        return torch.full((1, self.proj_dim), -1)

    def keep(self, layer: Layer, inputs: Tensor) -> Tensor:
        """Return a copy of the inputs."""
        return inputs.clone()

    def block(self, layer: Layer, kept: Tensor, output_gradients: Tensor) -> Tensor:
        """Return the layer's gradient for each row."""
        return weight_gradient(layer, kept, output_gradients)

    def combine(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Return the gradients of all layers side by side."""
        return torch.cat([blocks[layer.name] for layer in self._layers], dim=1)


def layer_groups(layers: Sequence[Layer], max_weights: int) -> list[list[Layer]]:
    """Return neighbouring layers together, as many as have so many weights; a larger layer is alone."""
    groups: list[list[Layer]] = []
    for layer in layers:
        if groups and sum(other.num_weights for other in groups[-1]) + layer.num_weights <= max_weights:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups


def draw_gradients(estimator: Estimator, encoded: Encoded, ids: Sequence[int]) -> Tensor:
    """Return the weighted gradient, as the projector leaves it, at every draw, (examples * draws, weights)."""
    num_draws = estimator.config.num_draws
    gradients = torch.empty(len(ids) * num_draws, estimator.projector.proj_dim)
    for start in range(0, len(ids), CHUNK):
        rows = slice(start, min(start + CHUNK, len(ids)))
        draws = estimator.draws(ids[rows])
        values = estimator.features(take(encoded, rows), draws)
        check_finite(values, [str(id_) for id_ in ids[rows]])
        gradients[start * num_draws : rows.stop * num_draws] = root_weighted(values, draws).flatten(0, 1)
    return gradients


def inner_products(estimator: Estimator, encoded: Encoded, ids: Sequence[int], num_train: int, file: Path) -> Tensor:
    """Return the inner products of all gradients with those of training examples, which come first, in float64.

    Those of a group of layers are in float32.
    """
    num_rows, num_columns = (n * estimator.config.num_draws for n in (len(ids), num_train))
    gram, done = torch.zeros(num_rows, num_columns, dtype=torch.float64), 0
    if file.is_file():
        with np.load(file) as content:
            gram, done = torch.from_numpy(content["gram"]), int(content["layers_done"])
    file.parent.mkdir(parents=True, exist_ok=True)
    for layers in layer_groups(estimator.layers[done:], GRADIENT_BYTES // (4 * num_rows)):
        begun = time.perf_counter()
        gradients = draw_gradients(replace(estimator, layers=layers, projector=Unprojected(layers)), encoded, ids)
        for start in range(0, num_rows, PANEL):  # nothing above the diagonal
            rows, columns = slice(start, start + PANEL), slice(min(start + PANEL, num_columns))
            gram[rows, columns] += (gradients[rows] @ gradients[columns].T).double()
        done += len(layers)
        print(f"  {done} of {len(estimator.layers)} layers: {time.perf_counter() - begun:.0f} s", flush=True)
        with atomic_file(file) as temporary, temporary.open("wb") as opened:
            np.savez(opened, gram=gram.numpy(), layers_done=np.int64(done))
    lower = gram[:num_columns].tril()
    gram[:num_columns] = lower + lower.tril(-1).T
    return gram


def score(gram: Tensor, num_draws: int, damping: float) -> Tensor:
    """Return `1/K sum_k g_qk^T (H + lambda I)^{-1} g_ik`, (queries, train), from inner products."""
    num_vectors = gram.shape[1]
    train, query = gram[:num_vectors], gram[num_vectors:]
    shift = damping * train.diagonal().mean()  # m lambda, where the mean of the eigenvalues of H is trace(V V^T) / m^2
    factor = torch.linalg.cholesky(train + shift * torch.eye(num_vectors, dtype=train.dtype))
    products = num_vectors * torch.cholesky_solve(query.T, factor).T
    return torch.einsum("qknk->qn", products.reshape(len(query) // num_draws, num_draws, -1, num_draws)) / num_draws
