"""Text-conditional latent diffusion with a UNet: `StableDiffusionPipeline`, version 1 and 2, epsilon and v."""

from __future__ import annotations

from pathlib import Path

import torch

from carv_attrib.teachers._diffusers import (
    DiffusersTeacher,
    TextEncoder,
    encoder_fingerprint,
    fingerprint,
    freeze,
    latent_pixels,
    load_module,
    schedule_of,
)

PIPELINES = ("StableDiffusionPipeline",)


def load(folder: Path, source: str, device: torch.device, dtype: torch.dtype) -> DiffusersTeacher:
    """Return the teacher saved in `folder`."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    unet = load_module(UNet2DConditionModel, folder / "unet")
    vae = load_module(AutoencoderKL, folder / "vae")
    text_model = load_module(CLIPTextModel, folder / "text_encoder")
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder,
        low_cpu_mem_usage=False,
        unet=unet,
        vae=vae,
        text_encoder=text_model,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    freeze(unet, vae, text_model, device=device, dtype=dtype)
    size = unet.config.sample_size
    pixels = latent_pixels(vae, size)
    return DiffusersTeacher(
        source=source,
        fingerprint=fingerprint(folder, ["unet", "vae", "text_encoder", "tokenizer"]),
        encoder_fingerprint=encoder_fingerprint(folder, ["vae", "text_encoder", "tokenizer"], pixels),
        pixel_spec=pixels,
        latent_shape=(unet.config.in_channels, size, size),
        noise_schedule=schedule_of(pipeline.scheduler),
        condition_kind="prompt",
        num_classes=0,
        denoiser=unet,
        autoencoder=vae,
        text_encoder=TextEncoder(pipeline.tokenizer, text_model),
    )
