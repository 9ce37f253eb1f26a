"""Class-conditional latent diffusion with a transformer: `DiTPipeline`."""

from __future__ import annotations

from pathlib import Path

import torch

from carv_attrib.teachers._diffusers import (
    DiffusersTeacher,
    encoder_fingerprint,
    fingerprint,
    freeze,
    latent_pixels,
    load_module,
    schedule_of,
)

PIPELINES = ("DiTPipeline",)


def load(folder: Path, source: str, device: torch.device, dtype: torch.dtype) -> DiffusersTeacher:
    """Return the teacher saved in `folder`."""
    from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel

    transformer = load_module(DiTTransformer2DModel, folder / "transformer")
    vae = load_module(AutoencoderKL, folder / "vae")
    pipeline = DiTPipeline.from_pretrained(folder, transformer=transformer, vae=vae, low_cpu_mem_usage=False)
    freeze(transformer, vae, device=device, dtype=dtype)
    size = transformer.config.sample_size
    pixels = latent_pixels(vae, size)
    return DiffusersTeacher(
        source=source,
        fingerprint=fingerprint(folder, ["transformer", "vae"]),
        encoder_fingerprint=encoder_fingerprint(folder, ["vae"], pixels),
        pixel_spec=pixels,
        latent_shape=(transformer.config.in_channels, size, size),
        noise_schedule=schedule_of(pipeline.scheduler),
        condition_kind="label",
        num_classes=transformer.config.num_embeds_ada_norm,
        denoiser=transformer,
        autoencoder=vae,
    )
