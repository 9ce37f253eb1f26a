"""The `Teacher` protocol: all that the rest of the package knows about a diffusion model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from carv_attrib.data import PixelSpec
from carv_attrib.errors import ArgumentError
from carv_attrib.noise_schedule import NoiseSchedule

Condition: TypeAlias = Mapping[str, Tensor]
"""Keyword arguments of the denoiser, one row for each example; empty for an unconditional teacher."""

ConditionKind = Literal["none", "label", "prompt"]


@runtime_checkable
class Teacher(Protocol):
    """A frozen diffusion model, with its conventions converted to the ones of this package.

    Attributes:
        source: the path or hub id it was loaded from.
        fingerprint: hex SHA-256 of its weights and configs.
        encoder_fingerprint: hex SHA-256 of what `encode` and `condition` depend on, and of nothing else: the same
            for two checkpoints of a denoiser.
        pixel_spec: the pictures it takes.
        latent_shape: (channels, height, width) of one latent.
        noise_schedule: its forward process and prediction type.
        condition_kind: what a picture comes with: nothing, a class label or a prompt.
        num_classes: number of class labels; 0 unless `condition_kind` is `label`.
        denoiser: the network whose parameters are attributed, frozen and in evaluation mode.
    """

    source: str
    fingerprint: str
    encoder_fingerprint: str
    pixel_spec: PixelSpec
    latent_shape: tuple[int, int, int]
    noise_schedule: NoiseSchedule
    condition_kind: ConditionKind
    num_classes: int
    denoiser: nn.Module

    def encode(
        self, pixels: Float[Tensor, "batch channels height width"], noise: Float[Tensor, "batch c h w"] | None = None
    ) -> Float[Tensor, "batch c h w"]:
        """Return clean latents of pixels in [-1, 1], scaled as in training.

        They are the posterior mode or, with N(0, 1) `noise`, the sample `mean + std * noise` of the posterior; for a
        teacher in pixel space, where there is none, the pixels.
        """
        ...

    def condition(self, labels: Sequence[int] | None, prompts: Sequence[str] | None) -> Condition:
        """Return the denoiser's condition for a batch of checked labels or prompts."""
        ...

    def predict(
        self, noisy_latents: Float[Tensor, "batch c h w"], timesteps: Int[Tensor, " batch"], condition: Condition
    ) -> Float[Tensor, "batch c h w"]:
        """Return the model output in the teacher's own prediction type."""
        ...


def placement(teacher: Teacher) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype of the denoiser."""
    parameter = next(teacher.denoiser.parameters())
    return parameter.device, parameter.dtype


def loaded_placement(teacher: Teacher, settings: Mapping[str, object]) -> dict[str, str]:
    """Return the `device` and `dtype` settings of a teacher that is loaded already.

    Raises:
        ArgumentError: if `settings` ask for others.
    """
    device, dtype = placement(teacher)
    loaded = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    for name, value in loaded.items():
        if settings.get(name, value) not in (value, device.type, "auto"):
            raise ArgumentError(f"`{name}` is {value} for the loaded teacher, got {settings[name]!r}; leave it out.")
    return loaded


def build_condition(
    teacher: Teacher, labels: Sequence[int | None] | None, prompts: Sequence[str | None] | None
) -> Condition:
    """Return the condition of a batch after checking that the teacher takes what is given and has what it needs.

    Raises:
        ArgumentError: if a label or prompt is missing, out of range, or given to a teacher that takes none.
    """
    kind = teacher.condition_kind
    if prompts is not None and kind != "prompt":
        raise ArgumentError(f"`prompt` was given, but {_TAKES[kind]}; leave it out.")
    if labels is not None and kind != "label":
        raise ArgumentError(f"`label` was given, but {_TAKES[kind]}; leave it out.")
    if kind == "label":
        return teacher.condition(_checked_labels(labels, teacher.num_classes), None)
    if kind == "prompt":
        if prompts is None or any(prompt is None for prompt in prompts):
            raise ArgumentError(f"`prompt` is needed: {_TAKES[kind]}; give one, or an empty one for no text.")
        return teacher.condition(None, [str(prompt) for prompt in prompts])
    return teacher.condition(None, None)


_TAKES = {
    "none": "this teacher is unconditional",
    "label": "this teacher is class-conditional",
    "prompt": "this teacher is text-conditional",
}


def _checked_labels(labels: Sequence[int | None] | None, num_classes: int) -> list[int]:
    """Return `labels`, each checked to name a class."""
    checked = []
    for label in labels if labels is not None else [None]:
        if label is None:
            raise ArgumentError(f"`label` is needed: {_TAKES['label']}; give one from 0 to {num_classes - 1}.")
        if not hasattr(label, "__index__") or not 0 <= label < num_classes:
            raise ArgumentError(f"`label` must be a whole number from 0 to {num_classes - 1}, got {label!r}.")
        checked.append(int(label))
    return checked
