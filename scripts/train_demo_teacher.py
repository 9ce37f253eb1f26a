"""Train the packaged teacher: a latent diffusion model of the digits, saved as a `DiTPipeline`.

Command:  python scripts/train_demo_teacher.py
Hardware: 2 CPU cores, half an hour
Expect:   reconstruction RMSE 0.014 (pixels in [-1, 1]), denoising loss 0.044, 3.4 MB of safetensors

The 1,797 digits of scikit-learn (8 x 8) are resized to 32 x 32 by `carv_attrib.data`, exactly as `featurize`
does. An `AutoencoderKL` with factor 4 gives 8 x 8 latents with 4 channels; a class-conditional DiT with patch
size 2 is trained on them to predict the noise. Weights are stored in float16.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import click
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from carv_attrib.data import PixelSpec, from_pixels, open_dataset, to_pixels

PIXELS = PixelSpec(height=32, width=32, channels=1)
LATENT_CHANNELS, LATENT_SIZE, NUM_CLASSES = 4, 8, 10


def digits(spec: PixelSpec = PIXELS) -> tuple[Tensor, Tensor]:
    """Return all digits as pixels in [-1, 1], (1797, channels, height, width), and their labels."""
    dataset = open_dataset("digits")
    examples = [dataset.load(row) for row in range(len(dataset))]
    return torch.stack([to_pixels(x.image, spec) for x in examples]), torch.tensor([x.label for x in examples])


def new_vae() -> AutoencoderKL:
    """Return an untrained autoencoder of factor 4."""
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=PIXELS.height,
    )


def new_denoiser() -> DiTTransformer2DModel:
    """Return an untrained class-conditional transformer of 1.4M parameters."""
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        sample_size=LATENT_SIZE,
        patch_size=2,
        num_embeds_ada_norm=NUM_CLASSES,
    )


def new_scheduler() -> DDIMScheduler:
    """Return the scheduler: linear betas, 1,000 timesteps, noise prediction."""
    return DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    """Return the learning rate: 100 steps of linear warm-up, then a cosine to zero."""
    return peak * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def minibatches(num_examples: int, batch_size: int, num_steps: int, generator: torch.Generator):
    """Yield `num_steps` index tensors that walk through fresh permutations."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(num_steps):
        if len(order) < batch_size:
            order = torch.cat([order, torch.randperm(num_examples, generator=generator)])
        batch, order = order[:batch_size], order[batch_size:]
        yield batch


def train_vae(images: Tensor, num_steps: int, generator: torch.Generator) -> AutoencoderKL:
    """Fit the autoencoder: squared error plus a small KL term."""
    vae = new_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    for step, batch in enumerate(minibatches(len(images), 64, num_steps, generator)):
        optimizer.param_groups[0]["lr"] = learning_rate(step, num_steps, 2e-3)
        pixels = images[batch]
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample
        loss = F.mse_loss(reconstruction, pixels) + 1e-5 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 200 == 0:
            click.echo(f"vae step {step + 1}/{num_steps}  loss {loss.item():.5f}")
    vae.eval()
    with torch.no_grad():
        mean = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in images.split(256)])
        restored = torch.cat([vae.decode(chunk).sample for chunk in mean.split(256)])
    vae.register_to_config(scaling_factor=round(1 / mean.std().item(), 5))
    click.echo(f"reconstruction RMSE {F.mse_loss(restored, images).sqrt().item():.4f}")
    return vae


def denoising_loss(model, latents: Tensor, condition: tuple, alphas_cumprod: Tensor, generator: torch.Generator):
    """Return the mean squared error of the predicted noise at uniform timesteps."""
    timesteps = torch.randint(0, len(alphas_cumprod), (len(latents),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    signal = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
    return F.mse_loss(model(noisy, timesteps, *condition).sample, noise)


def train_denoiser(
    model,
    latents: Tensor,
    condition: tuple,
    num_steps: int,
    generator: torch.Generator,
    *,
    batch_size: int = 128,
    decay: float = 0.999,
):
    """Fit a denoiser with AdamW and return the exponential moving average of its weights.

    `condition` holds further arguments of the model, one row for each example: labels, or nothing.
    """
    model, alphas_cumprod = model.train(), new_scheduler().alphas_cumprod
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, betas=(0.9, 0.99))
    running = 0.0
    for step, batch in enumerate(minibatches(len(latents), batch_size, num_steps, generator)):
        optimizer.param_groups[0]["lr"] = learning_rate(step, num_steps, 1e-3)
        loss = denoising_loss(model, latents[batch], tuple(c[batch] for c in condition), alphas_cumprod, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(
                list(average.parameters()), list(model.parameters()), 1 - min(decay, step / (step + 10))
            )
        running += loss.item()
        if (step + 1) % 500 == 0:
            click.echo(f"denoiser step {step + 1}/{num_steps}  loss {running / 500:.4f}")
            running = 0.0
    return average


def draw_samples(folder: Path, picture: Path) -> None:
    """Draw ten generated digits of each class, and beside them ten pairs of a training digit and its reconstruction."""
    pipeline = DiTPipeline.from_pretrained(folder, use_safetensors=True)
    labels = [label for label in range(NUM_CLASSES) for _ in range(10)]
    generated = pipeline(labels, guidance_scale=1.0, generator=torch.Generator().manual_seed(0)).images
    originals = digits()[0][:50]
    with torch.no_grad():
        restored = pipeline.vae.decode(pipeline.vae.encode(originals).latent_dist.mode()).sample
    sheet = Image.new("L", (34 * 20, 34 * 10), 128)
    for i, image in enumerate(generated):
        sheet.paste(image, (34 * (i % 10), 34 * (i // 10)))
    for i in range(50):
        sheet.paste(from_pixels(originals[i]), (34 * (10 + 2 * (i % 5)), 34 * (i // 5)))
        sheet.paste(from_pixels(restored[i]), (34 * (11 + 2 * (i % 5)), 34 * (i // 5)))
    picture.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(picture, optimize=True)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("carv_attrib/demo/teacher"), show_default=True)
@click.option("--vae-steps", default=1500, show_default=True)
@click.option("--denoiser-steps", default=8000, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    default=Path("docs/images/demo-teacher.png"),
    show_default=True,
)
@click.option("--only-picture", is_flag=True, help="Draw samples of the teacher that is there; train nothing.")
def main(output: Path, vae_steps: int, denoiser_steps: int, seed: int, picture: Path, only_picture: bool) -> None:
    """Train the autoencoder, then the denoiser, save the pipeline, and draw what it generates."""
    if only_picture:
        draw_samples(output, picture)
        return
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = digits()
    vae = train_vae(images, vae_steps, generator)
    with torch.no_grad():
        latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in images.split(256)])
    latents = latents * vae.config.scaling_factor
    denoiser = train_denoiser(new_denoiser(), latents, (labels,), denoiser_steps, generator)
    pipeline = DiTPipeline(
        transformer=denoiser, vae=vae, scheduler=new_scheduler(), id2label={i: str(i) for i in range(NUM_CLASSES)}
    )
    pipeline.to(torch.float16).save_pretrained(output, safe_serialization=True)
    size = sum(path.stat().st_size for path in output.rglob("*.safetensors"))
    click.echo(f"{output}: {size / 1e6:.2f} MB of safetensors")
    draw_samples(output, picture)


if __name__ == "__main__":
    main()
