"""What all families of diffusers pipelines share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from carv_attrib.data import PixelSpec
from carv_attrib.errors import TeacherError
from carv_attrib.noise_schedule import NoiseSchedule
from carv_attrib.teacher import Condition, ConditionKind


@dataclass
class DiffusersTeacher:
    """A teacher made of a denoiser, an optional autoencoder and a conditioning function.

    Implements `carv_attrib.teacher.Teacher`; see there for the attributes.
    """

    source: str
    fingerprint: str
    pixel_spec: PixelSpec
    latent_shape: tuple[int, int, int]
    noise_schedule: NoiseSchedule
    condition_kind: ConditionKind
    num_classes: int
    denoiser: nn.Module
    autoencoder: Any = None
    text_encoder: TextEncoder | None = None
    encoder_fingerprint: str = ""

    def encode(
        self, pixels: Float[Tensor, "batch channels height width"], noise: Float[Tensor, "batch c h w"] | None = None
    ) -> Float[Tensor, "batch c h w"]:
        """Return the scaled posterior mode or, with noise, a sample; for a teacher in pixel space, the pixels."""
        first = next(self.denoiser.parameters())
        pixels = pixels.to(first.device, first.dtype)
        if self.autoencoder is None:
            return pixels
        config = self.autoencoder.config
        with torch.no_grad():
            posterior = self.autoencoder.encode(pixels).latent_dist
        encoded = posterior.mode() if noise is None else posterior.mean + posterior.std * noise.to(pixels)
        latents: Tensor = (encoded - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor
        return latents

    def condition(self, labels: Sequence[int] | None, prompts: Sequence[str] | None) -> Condition:
        """Return class labels or prompt embeddings, under the denoiser's own argument names."""
        if labels is not None:
            return {"class_labels": torch.tensor(labels, device=next(self.denoiser.parameters()).device)}
        if prompts is not None and self.text_encoder is not None:
            return {"encoder_hidden_states": self.text_encoder(prompts)}
        return {}

    def predict(
        self, noisy_latents: Float[Tensor, "batch c h w"], timesteps: Int[Tensor, " batch"], condition: Condition
    ) -> Float[Tensor, "batch c h w"]:
        """Return the model output; channels of a learned variance are dropped."""
        output: Tensor = self.denoiser(noisy_latents, timestep=timesteps, **condition).sample
        return output[:, : noisy_latents.shape[1]]


@dataclass
class TextEncoder:
    """A tokenizer and a frozen text model, as `StableDiffusionPipeline` uses them."""

    tokenizer: Any
    model: nn.Module

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Float[Tensor, "batch tokens channels"]:
        """Return the hidden states of prompts, cut and padded to the tokenizer's length."""
        device = next(self.model.parameters()).device
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        masked = getattr(self.model.config, "use_attention_mask", None)
        mask = tokens.attention_mask.to(device) if masked else None
        hidden: Tensor = self.model(tokens.input_ids.to(device), attention_mask=mask)[0]
        return hidden


def load_module(kind: Any, folder: Path) -> Any:
    """Return a diffusers or transformers model saved in `folder`.

    Raises:
        TeacherError: if weights are missing, which the libraries would draw at random with no more than a warning.
    """
    # what diffusers falls back to without accelerate, after many lines about it
    plain = {"low_cpu_mem_usage": False} if kind.__module__.startswith("diffusers.") else {}
    module, info = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **plain)
    if missing := sorted(info["missing_keys"]):
        raise TeacherError(f"{folder} lacks {len(missing)} weights of a {kind.__name__}, such as {missing[0]!r}.")
    return module


def freeze(*modules: nn.Module | None, device: torch.device, dtype: torch.dtype) -> None:
    """Move modules, put them in evaluation mode, and take no gradients of their weights."""
    for module in modules:
        if module is not None:
            nn.Module.to(module, device, dtype)  # diffusers' own `to` warns, at length, about nothing
            module.eval().requires_grad_(False)
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data = tensor.data.clone()  # files map to odd addresses, and alignment decides the last bits


def schedule_of(scheduler: Any) -> NoiseSchedule:
    """Return the training noise schedule of a diffusers scheduler.

    Raises:
        TeacherError: for a scheduler without `alphas_cumprod`, such as flow matching.
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        raise TeacherError(f"scheduler {type(scheduler).__name__} is not supported: it has no `alphas_cumprod`.")
    return NoiseSchedule(scheduler.alphas_cumprod, scheduler.config.prediction_type)


def latent_pixels(autoencoder: Any, sample_size: int) -> PixelSpec:
    """Return the pictures whose latents have `sample_size` rows and columns."""
    side = sample_size * 2 ** (len(autoencoder.config.block_out_channels) - 1)
    return PixelSpec(side, side, autoencoder.config.in_channels)


def fingerprint(folder: Path, components: Sequence[str]) -> str:
    """Return the hex SHA-256 of the scheduler's and the components' files: configs, safetensors and merges."""
    return _digest_files(folder, ["scheduler", *components])


def encoder_fingerprint(folder: Path, components: Sequence[str], pixel_spec: PixelSpec) -> str:
    """Return the hex SHA-256 of the pixels and of the files of the components that encode them and their prompts."""
    content = json.dumps([_digest_files(folder, components), asdict(pixel_spec)])
    return hashlib.sha256(content.encode()).hexdigest()


def _digest_files(folder: Path, components: Sequence[str]) -> str:
    digest = hashlib.sha256()
    files = [path for name in components for path in (folder / name).iterdir()]
    for path in sorted(path for path in files if path.suffix in (".json", ".safetensors", ".txt")):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
