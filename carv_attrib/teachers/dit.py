"""Class-conditional latent diffusion with a transformer: `DiTPipeline`."""

from __future__ import annotations

from pathlib import Path

import torch

from carv_attrib.teachers._diffusers import DiffusersTeacher, fingerprint, freeze, latent_pixels, schedule_of

PIPELINES = ("DiTPipeline",)


def load(folder: Path, source: str, device: torch.device, dtype: torch.dtype) -> DiffusersTeacher:
    """Return the teacher saved in `folder`."""
    from diffusers import DiTPipeline

    pipeline = DiTPipeline.from_pretrained(folder, use_safetensors=True, dtype=dtype)
    transformer, vae = pipeline.transformer, pipeline.vae
    freeze(transformer, vae, device=device, dtype=dtype)
    size = transformer.config.sample_size
    return DiffusersTeacher(
        source=source,
        fingerprint=fingerprint(folder, {"transformer": transformer, "vae": vae}),
        pixel_spec=latent_pixels(vae, size),
        latent_shape=(transformer.config.in_channels, size, size),
        noise_schedule=schedule_of(pipeline.scheduler),
        condition_kind="label",
        num_classes=transformer.config.num_embeds_ada_norm,
        denoiser=transformer,
        autoencoder=vae,
    )
