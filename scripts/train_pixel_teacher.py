"""Train the packaged pixel-space teacher: an unconditional diffusion model of the digits, saved as a `DDPMPipeline`.

Command:  python scripts/train_pixel_teacher.py
Hardware: 43 minutes of one CPU core
Expect:   denoising loss 0.064, 1.4 MB of safetensors

The 1,797 digits of scikit-learn at their own 8 x 8 pixels; a small UNet is trained to predict the noise, without an
autoencoder and without labels: what the latent teacher is not. Weights are stored in float16.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from train_demo_teacher import digits, train_denoiser

from carv_attrib.data import PixelSpec

PIXELS = PixelSpec(height=8, width=8, channels=1)


def new_denoiser() -> UNet2DModel:
    """Return an untrained UNet of 0.7M parameters."""
    return UNet2DModel(
        sample_size=PIXELS.height,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


def draw_samples(pipeline: DDPMPipeline, picture: Path) -> None:
    """Draw 100 generated digits."""
    images = pipeline(batch_size=100, generator=torch.Generator().manual_seed(0)).images
    sheet = Image.new("L", (100, 100), 128)
    for i, image in enumerate(images):
        sheet.paste(image.convert("L"), (10 * (i % 10) + 1, 10 * (i // 10) + 1))
    picture.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((400, 400), Image.Resampling.NEAREST).save(picture, optimize=True)


@click.command()
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("carv_attrib/demo/pixel_teacher"), show_default=True
)
@click.option("--steps", default=8000, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--picture", type=click.Path(path_type=Path), default=Path("docs/images/pixel-teacher.png"), show_default=True
)
def main(output: Path, steps: int, seed: int, picture: Path) -> None:
    """Train the denoiser, save the pipeline, and draw what it generates."""
    torch.manual_seed(seed)
    images, _ = digits(PIXELS)
    denoiser = train_denoiser(new_denoiser(), images, (), steps, torch.Generator().manual_seed(seed))
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=True)
    pipeline = DDPMPipeline(unet=denoiser, scheduler=scheduler)
    pipeline.to(torch.float16).save_pretrained(output, safe_serialization=True)
    size = sum(path.stat().st_size for path in output.rglob("*.safetensors"))
    click.echo(f"{output}: {size / 1e6:.2f} MB of safetensors")
    draw_samples(DDPMPipeline.from_pretrained(output, use_safetensors=True), picture)


if __name__ == "__main__":
    main()
