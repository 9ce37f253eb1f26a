"""Diffusion in pixel space: a `UNet2DModel`, unconditional or with class labels."""

from __future__ import annotations

from pathlib import Path

import torch

from carv_attrib.data import PixelSpec
from carv_attrib.teachers._diffusers import (
    DiffusersTeacher,
    encoder_fingerprint,
    fingerprint,
    freeze,
    load_module,
    schedule_of,
)

PIPELINES = ("DDPMPipeline", "DDIMPipeline")


def load(folder: Path, source: str, device: torch.device, dtype: torch.dtype) -> DiffusersTeacher:
    """Return the teacher saved in `folder`."""
    from diffusers import DDPMPipeline, UNet2DModel

    unet = load_module(UNet2DModel, folder / "unet")
    pipeline = DDPMPipeline.from_pretrained(folder, unet=unet, low_cpu_mem_usage=False)
    freeze(unet, device=device, dtype=dtype)
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    pixels = PixelSpec(height, width, unet.config.in_channels)
    return DiffusersTeacher(
        source=source,
        fingerprint=fingerprint(folder, ["unet"]),
        encoder_fingerprint=encoder_fingerprint(folder, [], pixels),
        pixel_spec=pixels,
        latent_shape=(unet.config.in_channels, height, width),
        noise_schedule=schedule_of(pipeline.scheduler),
        condition_kind="label" if unet.config.num_class_embeds else "none",
        num_classes=unet.config.num_class_embeds or 0,
        denoiser=unet,
    )
