"""The naive algorithms that the package is held against, with the numbers of `docs/method.md`.

One draw at a time, weights that require gradients, explicit matrices, nothing clever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from carv_attrib.noise_schedule import NoiseSchedule
from carv_attrib.projection import DenseProjector, KroneckerProjector, Layer
from carv_attrib.sampling import Draws
from carv_attrib.teacher import Teacher

Gradients = Mapping[str, Tensor]
"""Layer name to weight gradient, (groups, out, in), the bias as a last column."""


def noisy_latents(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
    """Return z_t of one example."""
    level = float(schedule.alphas_cumprod[timestep])
    return math.sqrt(level) * latents + math.sqrt(1 - level) * noise


def prediction_target(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
    """Return what the teacher was trained to output for one example."""
    level = float(schedule.alphas_cumprod[timestep])
    velocity = math.sqrt(level) * noise - math.sqrt(1 - level) * latents
    return {"epsilon": noise, "sample": latents, "v_prediction": velocity}[schedule.prediction_type]


def objective_value(objective: str, model_output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return l of eq. (1) for one example, or of eq. (12), one position after the other."""
    if mask is not None:
        places = [(i, j) for i in range(mask.shape[0]) for j in range(mask.shape[1])]
        parts = [float(mask[p]) * objective_value(objective, model_output[:, *p], target[:, *p]) for p in places]
        return torch.stack(parts).sum() / float(mask.double().sum())
    if objective == "loss":
        return F.mse_loss(model_output, target)
    return {"squared-norm": (model_output**2).mean(), "mean": model_output.mean()}[objective]


@contextmanager
def weights_that_require_grad(module: nn.Module) -> Iterator[None]:
    """Take gradients of all parameters inside the block, of none after it."""
    module.requires_grad_(True)
    try:
        yield
    finally:
        module.requires_grad_(False)


def matrix_of(layer: Layer, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a gradient of weight and bias as (groups, out, in), the bias as a last column."""
    groups = layer.module.groups if isinstance(layer.module, nn.Conv2d) else 1
    out = len(weight) // groups
    matrix = weight.reshape(groups, out, -1)
    return matrix if bias is None else torch.cat([matrix, bias.view(groups, out, 1)], dim=2)


def autograd_gradients(scalar: Tensor, layers: Sequence[Layer]) -> Gradients:
    """Return the gradient of a scalar for each layer; zero for one that it does not depend on."""
    gradients = {}
    for layer in layers:
        parameters = [p for p in (layer.module.weight, layer.module.bias) if p is not None]
        found = torch.autograd.grad(scalar, parameters, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        gradients[layer.name] = matrix_of(layer, filled[0], filled[1] if len(filled) == 2 else None)
    return gradients


def features(
    teacher: Teacher,
    latents: Tensor,
    condition: Mapping[str, Tensor],
    draws: Draws,
    layers: Sequence[Layer],
    project: Callable[[Gradients], Tensor],
    *,
    objective: str = "loss",
    weighting: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return P^T of every term of eq. (2): one example, one encoding, one draw, one backward pass at a time."""
    rows = []
    draws_per_encoding = draws.timesteps.shape[1] // latents.shape[1]
    with weights_that_require_grad(teacher.denoiser):
        for i in range(len(latents)):
            row = i if len(draws.timesteps) > 1 else 0
            columns = zip(draws.timesteps[row], draws.noise[row], draws.weights[row], strict=True)
            for place, (timestep, noise, weight) in enumerate(columns):
                r = place // draws_per_encoding
                t, z, eps = int(timestep), latents[i, r], noise.to(latents)
                omega = 1.0 if weighting is None else float(weighting[t])
                output = teacher.predict(
                    noisy_latents(teacher.noise_schedule, z, eps, t)[None],
                    torch.tensor([t]),
                    {name: values[i : i + 1] for name, values in condition.items()},
                )[0]
                target = prediction_target(teacher.noise_schedule, z, eps, t)
                value = objective_value(objective, output, target, None if mask is None else mask[i, r])
                rows.append(project(autograd_gradients(float(weight) * omega * value, layers)))
    return torch.stack(rows).view(len(latents), draws.timesteps.shape[1], -1)


def band_means(values: Tensor, counts: Tensor, num_bands: int) -> Tensor:
    """Return E_p[values | band] for bands of equal mass under p ∝ counts: every timestep is cut into equal crumbs."""
    return values.repeat_interleave(counts * num_bands).view(num_bands, -1).mean(1)


def band_masses(density: Tensor, counts: Tensor, num_bands: int) -> Tensor:
    """Return the mass of each band under another density, from the same crumbs."""
    return band_means(density / counts, counts, num_bands) * counts.sum() / num_bands


def kronecker_block(projector: KroneckerProjector, layer: Layer, gradient: Tensor) -> Tensor:
    """Return P_out^T G P_in, summed over groups, flat: eq. (7) with the gradient written out."""
    p_in, p_out = (p.to(gradient) for p in projector.matrices(layer))
    return sum(p_out[g].T @ gradient[g] @ p_in[g] for g in range(len(gradient))).flatten()  # type: ignore[union-attr]


def fold(projector: KroneckerProjector, row: Tensor) -> Tensor:
    """Return the sign sketch of eq. (7), entry by entry."""
    if len(row) == projector.proj_dim:
        return row
    num_blocks, _, size = projector._fold
    folded = row.new_zeros(num_blocks, size)
    for place, entry in enumerate(row):
        block, within = divmod(place, math.ceil(len(row) / num_blocks))
        folded[block, within % size] += projector._signs[block, within] * entry
    return folded.flatten()


def kronecker(projector: KroneckerProjector, layers: Sequence[Layer], gradients: Gradients) -> Tensor:
    """Return the feature of one row by eq. (7)."""
    num_blocks = projector._fold[0]
    dealt = [layer for first in range(num_blocks) for layer in layers[first::num_blocks]]
    return fold(projector, torch.cat([kronecker_block(projector, x, gradients[x.name]) for x in dealt]))


def dense(projector: DenseProjector, layers: Sequence[Layer], gradients: Gradients) -> Tensor:
    """Return the feature of one row by eq. (8), with the whole matrix at once."""
    flat = [gradients[layer.name].flatten() for layer in layers]
    matrices = [projector.matrix(layer, 0, len(g), "cpu") for layer, g in zip(layers, flat, strict=True)]
    return torch.cat(flat) @ torch.cat(matrices).to(flat[0])


def expected_linear_gradient(teacher: Teacher, latents: Tensor, timestep_weights: Tensor) -> Tensor:
    """Return E[omega grad l] of eq. (1), in closed form, for `conftest.FlatLinear`: (out, in), the bias last.

    With z_t = alpha z + sigma eps, `E[grad_W] = 2/D [W (alpha^2 z z^T + sigma^2 I) + alpha b z^T - sigma I]` and
    `E[grad_b] = 2/D [alpha W z + b]`; `timestep_weights` are p(t) omega(t).
    """
    layer: nn.Linear = teacher.denoiser.linear  # type: ignore[assignment]
    weight, bias, z = layer.weight, layer.bias, latents.flatten()
    eye = torch.eye(len(z), dtype=z.dtype)
    total = torch.zeros(len(z), len(z) + 1, dtype=z.dtype)
    for share, level in zip(timestep_weights, teacher.noise_schedule.alphas_cumprod.double(), strict=True):
        alpha, sigma = level.sqrt(), (1 - level).sqrt()
        gradient = weight @ (alpha**2 * torch.outer(z, z) + sigma**2 * eye) + alpha * torch.outer(bias, z) - sigma * eye
        total += share * 2 / len(z) * torch.cat([gradient, (alpha * weight @ z + bias)[:, None]], dim=1)
    return total
