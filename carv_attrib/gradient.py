"""Projected teacher gradients of each (example, draw), by module hooks around one ordinary batched backward.

The teacher's weights are frozen, so that the backward pass computes gradients with respect to activations only; a
hook on every attributed layer hands its inputs and output gradients to the projector (`docs/method.md`, eq. (7)).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from carv_attrib.config import Objective
from carv_attrib.errors import ArgumentError, TeacherError
from carv_attrib.projection import Layer, Projector
from carv_attrib.sampling import Draws
from carv_attrib.teacher import Condition, Teacher, placement

FLOAT16_LOSS_SCALE = 1024.0
"""A mean over all positions has gradients that float16 would flush to zero; a power of two changes no other bit."""
_HOOKING = threading.Lock()
"""Held by one network call of the process at a time: hooks see every call of a module, whichever thread makes it."""


def select_layers(denoiser: nn.Module, patterns: Sequence[str] = ()) -> list[Layer]:
    """Return the Linear and Conv2d layers whose names match any pattern; all of them without patterns.

    Raises:
        ArgumentError: for a pattern that matches nothing.
        TeacherError: for a denoiser without any such layer.
    """
    layers = [Layer(name, m) for name, m in denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if not layers:
        raise TeacherError("this teacher has no Linear or Conv2d layer, so nothing can be attributed.")
    for pattern in patterns:
        if not any(fnmatchcase(layer.name, pattern) for layer in layers):
            raise ArgumentError(
                f"`layers` pattern {pattern!r} matches no Linear or Conv2d of this teacher; "
                f"names look like {layers[0].name!r} and {layers[-1].name!r}."
            )
    return [x for x in layers if not patterns or any(fnmatchcase(x.name, pattern) for pattern in patterns)]


def project_gradient(
    teacher: Teacher,
    latents: Float[Tensor, "batch encodings c h w"],
    condition: Condition,
    draws: Draws,
    projector: Projector,
    *,
    layers: Sequence[Layer],
    micro_batch: int,
    objective: Objective = "loss",
    weighting: Float[Tensor, " timesteps"] | None = None,
    autocast: bool = False,
    mask: Float[Tensor, "batch encodings h w"] | None = None,
) -> Float[Tensor, "batch draws proj_dim"]:
    """Return `P^T [p/q * omega * grad l]` for every draw of every example: its mean over draws is eq. (2).

    Network calls always have `micro_batch` rows, the last call filled up with copies, so that a row's result does not
    depend on how many others are asked for.

    Args:
        teacher: the frozen model.
        latents: clean latents; the draws of an example are for its encodings in turn, as many for each.
        condition: one row for each example.
        draws: for each example, or one row of shared ones.
        projector: for these `layers`.
        layers: the attributed layers.
        micro_batch: rows of a network call.
        objective: l.
        weighting: omega(t) for each timestep; None is one.
        autocast: whether the denoiser's matrix products are in bfloat16.
        mask: weights of the positions in l (eq. (12)), for each encoding its own; None is all alike.
    """
    batch, num_draws = len(latents), draws.timesteps.shape[1]
    draws = draws if len(draws.timesteps) == batch else draws.expand(batch)
    weights = draws.weights if weighting is None else draws.weights * weighting[draws.timesteps]
    features = []
    for rows in full_calls(batch * num_draws, micro_batch):
        example, draw = rows // num_draws, rows % num_draws
        encoding = draw * latents.shape[1] // num_draws
        row_condition = {name: values[example.to(values.device)] for name, values in condition.items()}
        features.append(
            _project_rows(
                teacher,
                latents[example.to(latents.device), encoding.to(latents.device)],
                row_condition,
                draws.timesteps[example, draw],
                draws.noise[example, draw],
                weights[example, draw],
                projector,
                layers,
                objective,
                autocast,
                None if mask is None else mask[example.to(mask.device), encoding.to(mask.device)],
            )
        )
    return torch.cat(features)[: batch * num_draws].view(batch, num_draws, -1)


def full_calls(num_rows: int, micro_batch: int) -> Iterator[Int[Tensor, " micro_batch"]]:
    """Yield row numbers, `micro_batch` at a time; the last row again where there are no more."""
    for start in range(0, num_rows, micro_batch):
        yield torch.arange(start, start + micro_batch).clamp(max=num_rows - 1)


def _project_rows(
    teacher: Teacher,
    latents: Float[Tensor, "rows c h w"],
    condition: Condition,
    timesteps: Int[Tensor, " rows"],
    noise: Float[Tensor, "rows c h w"],
    weights: Float[Tensor, " rows"],
    projector: Projector,
    layers: Sequence[Layer],
    objective: Objective,
    autocast: bool,
    mask: Float[Tensor, "rows h w"] | None,
) -> Float[Tensor, "rows proj_dim"]:
    """Return the weighted, projected gradient of each row of one network call.

    Raises:
        TeacherError: if the output depends on no attributed layer.
    """
    device, dtype = placement(teacher)
    latents, timesteps, noise = latents.to(device, dtype), timesteps.to(device), noise.to(device, dtype)
    noisy_latents = teacher.noise_schedule.add_noise(latents, noise, timesteps)
    loss_scale = FLOAT16_LOSS_SCALE if dtype == torch.float16 else 1.0
    blocks: dict[str, Tensor] = {}
    with _HOOKING, torch.enable_grad(), _gradient_hooks(layers, projector, blocks, len(latents)):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            model_output = teacher.predict(noisy_latents, timesteps, condition)
        target = teacher.noise_schedule.target(latents, noise, timesteps)
        losses = row_objective(objective, model_output, target, mask)
        if losses.requires_grad:
            (losses * weights.to(losses) * loss_scale).sum().backward()  # type: ignore[no-untyped-call]
    if not blocks:
        raise TeacherError("no attributed layer took part in the teacher's output; choose other `layers`.")
    return projector.combine(blocks) / loss_scale


def row_objective(
    objective: Objective,
    model_output: Float[Tensor, "rows c h w"],
    target: Float[Tensor, "rows c h w"],
    mask: Float[Tensor, "rows h w"] | None = None,
) -> Float[Tensor, " rows"]:
    """Return l for each row, a mean over channels and positions, in float32 at least (eq. (1)).

    With a mask, which must not be zero everywhere, the mean over positions is weighted by it (eq. (12)).
    """
    dtype = torch.promote_types(model_output.dtype, torch.float32)
    output, target = model_output.to(dtype), target.to(dtype)
    if objective == "loss":
        values = (output - target).square()
    else:
        values = output.square() if objective == "squared-norm" else output
    if mask is not None:
        weights = mask.to(values)
        values = values * (weights / weights.mean((1, 2), keepdim=True)).unsqueeze(1)  # ones change no bit
    return values.flatten(1).mean(1)


@contextmanager
def _gradient_hooks(
    layers: Sequence[Layer], projector: Projector, blocks: dict[str, Tensor], rows: int
) -> Iterator[None]:
    """Add every layer's projected contribution to `blocks` as the backward pass reaches it."""

    def add_hook(layer: Layer) -> torch.utils.hooks.RemovableHandle:
        def on_forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not torch.is_grad_enabled():
                return
            inputs = args[0].detach()
            if len(inputs) != rows:
                raise TeacherError(
                    f"layer {layer.name} sees {len(inputs)} rows for a batch of {rows}; leave it out of `layers`."
                )
            with torch.no_grad():
                kept = projector.keep(layer, inputs)

            def on_backward(output_gradients: Tensor) -> None:
                block = projector.block(layer, kept, output_gradients)
                blocks[layer.name] = blocks[layer.name] + block if layer.name in blocks else block

            if not output.requires_grad:  # nothing attributed lies upstream: the graph starts here
                output.requires_grad_()
            output.register_hook(on_backward)  # type: ignore[no-untyped-call]

        return layer.module.register_forward_hook(on_forward)

    handles = [add_hook(layer) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
