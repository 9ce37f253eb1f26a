"""Tiny random teachers: one saved pipeline for each supported family, and one whose gradient has a closed form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from carv_attrib.data import PixelSpec
from carv_attrib.noise_schedule import NoiseSchedule
from carv_attrib.teacher import Condition, ConditionKind

torch.set_num_threads(1)

NUM_TIMESTEPS = 100
NUM_CLASSES = 3
TOKENS = 6


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Return `module` with every weight redrawn, so that no zero-initialised layer hides a gradient."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 16
        with torch.no_grad():
            noise = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
            parameter.copy_(noise + (1 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0))
    return module


def _scheduler(prediction_type: str = "epsilon") -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=NUM_TIMESTEPS, prediction_type=prediction_type, clip_sample=False, steps_offset=1
    )


def _autoencoder(seed: int) -> Any:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=2,
        sample_size=8,
        scaling_factor=0.3,
    )
    return randomise(vae, seed)


@pytest.fixture(scope="session")
def save_ddpm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that saves a `DDPMPipeline`: grey 8 x 8 pixels, convolutions and one attention level."""
    from diffusers import DDPMPipeline, UNet2DModel

    def save(**changes: Any) -> Path:
        config = {
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": (4, 8),
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        }
        folder = tmp_path_factory.mktemp("ddpm")
        unet = randomise(UNet2DModel(**{**config, **changes}), 1)
        DDPMPipeline(unet=unet, scheduler=_scheduler()).save_pretrained(folder, safe_serialization=True)
        return folder

    return save


@pytest.fixture(scope="session")
def ddpm_folder(save_ddpm: Callable[..., Path]) -> Path:
    """Return a saved unconditional `DDPMPipeline`."""
    return save_ddpm()


@pytest.fixture(scope="session")
def save_dit(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return a function that saves a `DiTPipeline` with so many output channels; its latents are 2 x 4 x 4."""
    from diffusers import DiTPipeline, DiTTransformer2DModel

    def save(out_channels: int) -> Path:
        transformer = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=2,
            out_channels=out_channels,
            num_layers=2,
            sample_size=4,
            patch_size=2,
            num_embeds_ada_norm=NUM_CLASSES,
            norm_num_groups=2,
        )
        folder = tmp_path_factory.mktemp("dit")
        DiTPipeline(randomise(transformer, 2), _autoencoder(3), _scheduler()).save_pretrained(
            folder, safe_serialization=True
        )
        return folder

    return save


@pytest.fixture(scope="session")
def dit_folder(save_dit: Callable[[int], Path]) -> Path:
    """Return a saved class-conditional `DiTPipeline`."""
    return save_dit(2)


@pytest.fixture(scope="session")
def dit_sigma_folder(save_dit: Callable[[int], Path]) -> Path:
    """Return a saved `DiTPipeline` that also outputs a learned variance."""
    return save_dit(4)


def _tokenizer(folder: Path) -> Any:
    """Return a CLIP tokenizer that knows single letters and one merge."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters), "re", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


@pytest.fixture(scope="session")
def save_sd(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that saves a `StableDiffusionPipeline` of a prediction type; its latents are 2 x 4 x 4."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    def save(prediction_type: str) -> Path:
        tokenizer = _tokenizer(tmp_path_factory.mktemp("tokenizer") / "files")
        text_config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        unet = UNet2DConditionModel(
            sample_size=4,
            in_channels=2,
            out_channels=2,
            block_out_channels=(4, 8),
            layers_per_block=1,
            norm_num_groups=2,
            cross_attention_dim=8,
            attention_head_dim=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
        folder = tmp_path_factory.mktemp("sd")
        StableDiffusionPipeline(
            vae=_autoencoder(4),
            text_encoder=randomise(CLIPTextModel(text_config), 5),
            tokenizer=tokenizer,
            unet=randomise(unet, 6),
            scheduler=_scheduler(prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder, safe_serialization=True)
        return folder

    return save


@pytest.fixture(scope="session")
def sd_folder(save_sd: Callable[[str], Path]) -> Path:
    """Return a saved text-conditional pipeline that predicts noise."""
    return save_sd("epsilon")


@pytest.fixture(scope="session")
def sd_v_folder(save_sd: Callable[[str], Path]) -> Path:
    """Return a saved text-conditional pipeline that predicts velocity."""
    return save_sd("v_prediction")


@dataclass
class TinyTeacher:
    """A `Teacher` made of any denoiser that maps noisy latents to an output of the same shape."""

    denoiser: nn.Module
    noise_schedule: NoiseSchedule
    latent_shape: tuple[int, int, int] = (1, 2, 2)
    pixel_spec: PixelSpec = field(default_factory=lambda: PixelSpec(2, 2, 1))
    source: str = "tiny"
    fingerprint: str = "0" * 64
    encoder_fingerprint: str = "1" * 64
    condition_kind: ConditionKind = "none"
    num_classes: int = 0

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the pixels."""
        return pixels.to(next(self.denoiser.parameters()))

    def condition(self, labels: Sequence[int] | None, prompts: Sequence[str] | None) -> Condition:
        """Return no condition."""
        return {}

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Return the denoiser's output."""
        output: Tensor = self.denoiser(noisy_latents)
        return output


class FlatLinear(nn.Module):
    """One Linear on flattened latents: the output is `W z_t + b`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, noisy_latents: Tensor) -> Tensor:
        """Return the layer's output in the shape of its input."""
        output: Tensor = self.linear(noisy_latents.flatten(1))
        return output.view_as(noisy_latents)


@pytest.fixture(scope="session")
def make_teacher() -> Callable[..., TinyTeacher]:
    """Return a function that wraps a denoiser as a frozen float64 teacher of 10 timesteps."""

    def make(denoiser: nn.Module, prediction_type: str = "epsilon") -> TinyTeacher:
        schedule = NoiseSchedule(torch.linspace(0.95, 0.05, 10), prediction_type)
        return TinyTeacher(randomise(denoiser, 7).double().eval().requires_grad_(False), schedule)

    return make


@pytest.fixture(scope="session")
def linear_teacher(make_teacher: Callable[..., TinyTeacher]) -> TinyTeacher:
    """Return a teacher whose expected gradient has a closed form: see `reference.expected_linear_gradient`."""
    return make_teacher(FlatLinear(4))


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 20 real digits, 8 x 8, in sub-folders that are their classes 0, 1 and 2."""
    from carv_attrib.data import open_dataset

    folder = tmp_path_factory.mktemp("digits")
    digits = open_dataset("digits")
    examples = [digits.load(row) for row in range(70)]
    for example in [example for example in examples if example.label is not None and example.label < 3][:20]:
        path = folder / str(example.label) / f"{example.id:03d}.png"
        path.parent.mkdir(exist_ok=True)
        example.image.save(path)
    return folder


SETTINGS = {
    "num_draws": 4,
    "num_bands": 2,
    "proj_dim": 48,
    "block_dim": 16,
    "rank": 3,
    "part_size": 8,
    "micro_batch": 16,
    "device": "cpu",
}
"""Settings for tiny indexes: 3 parts of at most 8 examples."""


FEW_REPLICATES = {
    "REPLICATES": 3,
    "UPSTREAM_REPLICATES": 2,
    "UPSTREAM_ENCODINGS": 2,
    "MANY_DRAWS": 8,
    "SHARE_DRAWS": 8,
    "TIMED_READS": 4,
}
"""For pilots that take seconds."""


def shorten_pilots(patch: pytest.MonkeyPatch) -> None:
    """Let pilots take seconds."""
    for name, count in FEW_REPLICATES.items():
        patch.setattr(f"carv_attrib.planning.pilot.{name}", count)


@pytest.fixture
def few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pilots of one test take seconds."""
    shorten_pilots(monkeypatch)


@pytest.fixture(scope="session")
def tiny_index(tmp_path_factory: pytest.TempPathFactory, dit_folder: Path, digits_folder: Path) -> Path:
    """Return a complete index of the digits folder by the tiny DiT; tests must not change it."""
    from carv_attrib import featurize

    path = tmp_path_factory.mktemp("index") / "index"
    featurize(dit_folder, digits_folder, path, **SETTINGS)
    return path


@pytest.fixture(scope="session")
def unrounded_index(tmp_path_factory: pytest.TempPathFactory, dit_folder: Path, digits_folder: Path) -> Path:
    """Return the same with features that are stored as they were computed."""
    from carv_attrib import featurize

    path = tmp_path_factory.mktemp("index") / "index"
    featurize(dit_folder, digits_folder, path, **SETTINGS, feature_dtype="float32")
    return path


@pytest.fixture
def copied_index(tmp_path: Path, tiny_index: Path) -> Path:
    """Return a copy of `tiny_index` that may be changed."""
    return Path(shutil.copytree(tiny_index, tmp_path / "copy"))


@pytest.fixture
def as_users_run_it() -> Iterator[None]:
    """Turn off the shape and type checks that only tests have, so that a wrong type reaches the program's own check."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
