"""Teachers loaded from saved pipelines, against diffusers itself."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from carv_attrib.data import PixelSpec
from carv_attrib.errors import ArgumentError, TeacherError
from carv_attrib.noise_schedule import NoiseSchedule
from carv_attrib.teacher import Teacher, build_condition, placement
from carv_attrib.teachers import load_teacher, resolve_device
from tests.conftest import NUM_CLASSES, NUM_TIMESTEPS, TOKENS

FAMILIES = ("ddpm_folder", "dit_folder", "dit_sigma_folder", "sd_folder", "sd_v_folder")
LATENT_FAMILIES = ("dit_folder", "sd_folder")


def pixels_of(teacher: Teacher, batch: int = 2) -> torch.Tensor:
    """Return random pixels in [-1, 1]."""
    spec = teacher.pixel_spec
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, spec.channels, spec.height, spec.width, generator=generator) * 2 - 1


def condition_of(teacher: Teacher, batch: int = 2) -> Any:
    """Return a condition of the kind that a teacher takes."""
    labels = [1] * batch if teacher.condition_kind == "label" else None
    prompts = ["a red fox"] * batch if teacher.condition_kind == "prompt" else None
    return build_condition(teacher, labels, prompts)


@pytest.fixture
def copy(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Return a function that returns a copy of a saved pipeline, to be changed."""

    def copy_of(family: str) -> Path:
        return Path(shutil.copytree(request.getfixturevalue(family), tmp_path / family))

    return copy_of


def rewrite(path: Path, **changes: object) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("family", "pixel_spec", "latent_shape", "condition_kind", "num_classes"),
    [
        ("ddpm_folder", PixelSpec(8, 8, 1), (1, 8, 8), "none", 0),
        ("dit_folder", PixelSpec(8, 8, 3), (2, 4, 4), "label", NUM_CLASSES),
        ("dit_sigma_folder", PixelSpec(8, 8, 3), (2, 4, 4), "label", NUM_CLASSES),
        ("sd_folder", PixelSpec(8, 8, 3), (2, 4, 4), "prompt", 0),
        ("sd_v_folder", PixelSpec(8, 8, 3), (2, 4, 4), "prompt", 0),
    ],
)
def test_every_family_says_what_it_takes(
    request: pytest.FixtureRequest,
    family: str,
    pixel_spec: PixelSpec,
    latent_shape: tuple[int, int, int],
    condition_kind: str,
    num_classes: int,
) -> None:
    folder = request.getfixturevalue(family)
    teacher = load_teacher(folder)
    assert isinstance(teacher, Teacher)
    assert teacher.source == str(folder)
    assert (teacher.pixel_spec, teacher.latent_shape) == (pixel_spec, latent_shape)
    assert (teacher.condition_kind, teacher.num_classes) == (condition_kind, num_classes)
    assert teacher.noise_schedule.num_timesteps == NUM_TIMESTEPS
    assert teacher.encode(pixels_of(teacher)).shape == (2, *latent_shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_teachers_are_frozen_and_in_evaluation_mode(request: pytest.FixtureRequest, family: str) -> None:
    teacher: Any = load_teacher(request.getfixturevalue(family))
    text_model = teacher.text_encoder.model if teacher.text_encoder else None
    for module in (teacher.denoiser, teacher.autoencoder, text_model):
        if module is not None:
            assert not any(m.training for m in module.modules())
            assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_dtype_runs_in_itself(request: pytest.FixtureRequest, family: str, dtype: Any) -> None:
    teacher = load_teacher(request.getfixturevalue(family), dtype=dtype)
    assert placement(teacher) == (torch.device("cpu"), getattr(torch, dtype))
    latents = teacher.encode(pixels_of(teacher))
    with torch.no_grad():
        output = teacher.predict(latents, torch.tensor([3, 90]), condition_of(teacher))
    assert latents.dtype == output.dtype == getattr(torch, dtype)
    assert output.shape == latents.shape
    assert bool(torch.isfinite(output).all())


def test_a_teacher_in_pixel_space_encodes_nothing(ddpm_folder: Path) -> None:
    teacher = load_teacher(ddpm_folder)
    assert torch.equal(teacher.encode(pixels_of(teacher)), pixels_of(teacher))
    assert torch.equal(teacher.encode(pixels_of(teacher), torch.ones(2, *teacher.latent_shape)), pixels_of(teacher))


@pytest.mark.parametrize("family", LATENT_FAMILIES)
def test_encode_is_the_pipelines_scaled_posterior_mode(request: pytest.FixtureRequest, family: str) -> None:
    from diffusers import AutoencoderKL

    folder = request.getfixturevalue(family)
    teacher = load_teacher(folder)
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    with torch.no_grad():
        mode = vae.encode(pixels_of(teacher)).latent_dist.mode()
    torch.testing.assert_close(teacher.encode(pixels_of(teacher)), mode * 0.3)


@pytest.mark.parametrize("family", LATENT_FAMILIES)
def test_encode_with_noise_is_a_scaled_sample_of_the_posterior(request: pytest.FixtureRequest, family: str) -> None:
    from diffusers import AutoencoderKL

    folder = request.getfixturevalue(family)
    teacher = load_teacher(folder)
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    noise = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        posterior = vae.encode(pixels_of(teacher)).latent_dist
    torch.testing.assert_close(
        teacher.encode(pixels_of(teacher), noise), (posterior.mean + posterior.std * noise) * 0.3
    )


def test_encode_takes_the_shift_factor_off_first(copy: Callable[[str], Path]) -> None:
    folder = copy("dit_folder")
    plain = load_teacher(folder)
    rewrite(folder / "vae" / "config.json", shift_factor=0.5)
    shifted = load_teacher(folder)
    expected = plain.encode(pixels_of(plain)) - 0.5 * 0.3
    torch.testing.assert_close(shifted.encode(pixels_of(plain)), expected)
    noise = torch.ones(2, *plain.latent_shape)
    torch.testing.assert_close(shifted.encode(pixels_of(plain), noise), plain.encode(pixels_of(plain), noise) - 0.15)


@pytest.mark.parametrize("family", FAMILIES)
def test_predict_is_the_pipelines_denoiser(request: pytest.FixtureRequest, family: str) -> None:
    from diffusers import DiffusionPipeline

    folder = request.getfixturevalue(family)
    pipeline = DiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    teacher = load_teacher(folder)
    latents, timesteps = torch.randn(2, *teacher.latent_shape), torch.tensor([3, 90])
    arguments: dict[str, Any] = {}
    if teacher.condition_kind == "label":
        arguments["class_labels"] = torch.tensor([1, 1])
    if teacher.condition_kind == "prompt":
        arguments["encoder_hidden_states"] = pipeline.encode_prompt(["a red fox"] * 2, "cpu", 1, False)[0]
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    with torch.no_grad():
        expected = denoiser(latents, timestep=timesteps, **arguments).sample[:, : latents.shape[1]]
        torch.testing.assert_close(teacher.predict(latents, timesteps, condition_of(teacher)), expected)


def test_channels_of_a_learned_variance_are_dropped(dit_sigma_folder: Path) -> None:
    teacher = load_teacher(dit_sigma_folder)
    with torch.no_grad():
        output = teacher.predict(torch.zeros(1, 2, 4, 4), torch.tensor([5]), condition_of(teacher, 1))
        full: Any = teacher.denoiser(torch.zeros(1, 2, 4, 4), torch.tensor([5]), class_labels=torch.tensor([1]))
    assert full.sample.shape == (1, 4, 4, 4)
    assert torch.equal(output, full.sample[:, :2])


@pytest.mark.parametrize("family", ["sd_folder", "sd_v_folder"])
def test_noise_and_target_follow_the_scheduler(request: pytest.FixtureRequest, family: str) -> None:
    from diffusers import DDPMScheduler

    folder = request.getfixturevalue(family)
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    schedule = load_teacher(folder).noise_schedule
    latents, noise, timesteps = torch.randn(4, 2, 4, 4), torch.randn(4, 2, 4, 4), torch.tensor([0, 20, 70, 99])
    torch.testing.assert_close(
        schedule.add_noise(latents, noise, timesteps), scheduler.add_noise(latents, noise, timesteps)
    )
    is_v = scheduler.config.prediction_type == "v_prediction"
    expected = scheduler.get_velocity(latents, noise, timesteps) if is_v else noise
    assert is_v == (family == "sd_v_folder")
    torch.testing.assert_close(schedule.target(latents, noise, timesteps), expected)


def test_the_target_of_a_sample_prediction_is_the_latents() -> None:
    schedule = NoiseSchedule(torch.tensor([0.9, 0.1]), "sample")
    latents = torch.randn(2, 1, 2, 2)
    assert torch.equal(schedule.target(latents, torch.randn_like(latents), torch.tensor([0, 1])), latents)


def test_an_unknown_prediction_type_is_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("ddpm_folder")
    rewrite(folder / "scheduler" / "scheduler_config.json", prediction_type="flow_prediction")
    message = r"`prediction_type` must be one of epsilon, v_prediction, sample, got 'flow_prediction'; other"
    with pytest.raises(TeacherError, match=message):
        load_teacher(folder)


def test_a_scheduler_without_alphas_cumprod_is_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("ddpm_folder")
    index = json.loads((folder / "model_index.json").read_text())
    rewrite(folder / "model_index.json", scheduler=[index["scheduler"][0], "FlowMatchEulerDiscreteScheduler"])
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 100})
    )
    message = r"scheduler FlowMatchEulerDiscreteScheduler is not supported: it has no `alphas_cumprod`\."
    with pytest.raises(TeacherError, match=message):
        load_teacher(folder)


def test_prompts_are_padded_and_cut_to_the_tokenizers_length(sd_folder: Path) -> None:
    teacher = load_teacher(sd_folder)
    embeddings = build_condition(teacher, None, ["", "a", "a very long prompt about zebras"])["encoder_hidden_states"]
    assert embeddings.shape == (3, TOKENS, 8)
    assert not torch.allclose(embeddings[0], embeddings[1])


def test_a_prompt_has_the_same_embedding_in_any_company(sd_folder: Path) -> None:
    teacher = load_teacher(sd_folder, dtype="float64")
    together = build_condition(teacher, None, ["fox", "a red zebra"])["encoder_hidden_states"]
    alone = build_condition(teacher, None, ["fox"])["encoder_hidden_states"]
    torch.testing.assert_close(together[:1], alone)


def test_a_pixel_teacher_may_take_class_labels(save_ddpm: Callable[..., Path]) -> None:
    teacher = load_teacher(save_ddpm(num_class_embeds=4))
    assert (teacher.condition_kind, teacher.num_classes) == ("label", 4)
    outputs = [
        teacher.predict(torch.zeros(1, 1, 8, 8), torch.tensor([5]), build_condition(teacher, [label], None))
        for label in (0, 3)
    ]
    assert not torch.allclose(outputs[0], outputs[1])


def test_a_ddim_pipeline_is_loaded_as_well(copy: Callable[[str], Path]) -> None:
    folder = copy("ddpm_folder")
    expected = load_teacher(folder).noise_schedule.alphas_cumprod
    index = json.loads((folder / "model_index.json").read_text())
    rewrite(folder / "model_index.json", _class_name="DDIMPipeline", scheduler=[index["scheduler"][0], "DDIMScheduler"])
    rewrite(folder / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler")
    assert torch.equal(load_teacher(folder).noise_schedule.alphas_cumprod, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fingerprint_is_the_same_when_loaded_twice(request: pytest.FixtureRequest, family: str) -> None:
    folder = request.getfixturevalue(family)
    first, second = load_teacher(folder), load_teacher(folder, dtype="bfloat16")
    assert first.fingerprint == second.fingerprint
    assert len(first.fingerprint) == 64


@pytest.mark.parametrize(
    ("family", "weights"),
    [
        ("ddpm_folder", "unet/diffusion_pytorch_model.safetensors"),
        ("dit_folder", "transformer/diffusion_pytorch_model.safetensors"),
        ("dit_folder", "vae/diffusion_pytorch_model.safetensors"),
        ("sd_folder", "text_encoder/model.safetensors"),
    ],
)
def test_the_fingerprint_changes_with_one_weight(copy: Callable[[str], Path], family: str, weights: str) -> None:
    folder = copy(family)
    before = load_teacher(folder).fingerprint
    tensors = load_file(folder / weights)
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, folder / weights, metadata={"format": "pt"})
    assert load_teacher(folder).fingerprint != before


@pytest.mark.parametrize("name", ["scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"])
def test_the_fingerprint_changes_with_a_config(copy: Callable[[str], Path], name: str) -> None:
    folder = copy("sd_folder")
    before = load_teacher(folder).fingerprint
    rewrite(folder / name, beta_end=0.03, model_max_length=TOKENS - 1)
    assert load_teacher(folder).fingerprint != before


def test_an_unsupported_pipeline_is_refused_with_the_supported_ones(copy: Callable[[str], Path]) -> None:
    folder = copy("ddpm_folder")
    rewrite(folder / "model_index.json", _class_name="KandinskyPipeline")
    message = (
        r"is a KandinskyPipeline, which is not supported; "
        r"supported are DDIMPipeline, DDPMPipeline, DiTPipeline, StableDiffusionPipeline\.$"
    )
    with pytest.raises(TeacherError, match=message):
        load_teacher(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    message = r"`teacher` .*/none is not a folder; give the folder of a diffusers pipeline or a hub id\.$"
    with pytest.raises(TeacherError, match=message):
        load_teacher(tmp_path / "none")


def test_a_hub_id_that_cannot_be_reached_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        TeacherError, match=r"^`teacher` nobody/nothing is neither a folder nor a hub id that can be reac"
    ):
        load_teacher("nobody/nothing")


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_folder_without_a_readable_model_index_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(
        TeacherError, match=r"holds no diffusers pipeline: model_index\.json is missing or unreadable\.$"
    ):
        load_teacher(tmp_path)


@pytest.mark.parametrize(("component", "name"), [("unet", "diffusion_pytorch_model"), ("text_encoder", "model")])
def test_pickled_weights_are_never_read(copy: Callable[[str], Path], component: str, name: str) -> None:
    folder = copy("sd_folder")
    weights = folder / component / f"{name}.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    message = rf"{component} has no safetensors weights, only pickled ones, which are never read; convert it with"
    with pytest.raises(TeacherError, match=message):
        load_teacher(folder)


@pytest.mark.parametrize(("component", "name"), [("unet", "diffusion_pytorch_model"), ("text_encoder", "model")])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_weights_are_refused_in_one_line(
    copy: Callable[[str], Path], component: str, name: str, damage: str
) -> None:
    folder = copy("sd_folder")
    weights = folder / component / f"{name}.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    if damage == "truncated":
        weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(TeacherError, match=r"^[^\n]*sd_folder cannot be loaded as a StableDiffusionPipeline: [^\n]+$"):
        load_teacher(folder)


@pytest.mark.parametrize(
    ("weights", "kind"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "UNet2DConditionModel"),
        ("vae/diffusion_pytorch_model.safetensors", "AutoencoderKL"),
        ("text_encoder/model.safetensors", "CLIPTextModel"),
    ],
)
def test_a_missing_weight_is_not_drawn_at_random(copy: Callable[[str], Path], weights: str, kind: str) -> None:
    folder = copy("sd_folder")
    tensors = load_file(folder / weights)
    del tensors[min(tensors)]
    save_file(tensors, folder / weights, metadata={"format": "pt"})
    with pytest.raises(TeacherError, match=rf"/sd_folder/\w+ lacks 1 weights of a {kind}, such as '[\w.]+'\.$"):
        load_teacher(folder)


@pytest.mark.parametrize("device", ["cuda:99", "abacus", "xpu"])
def test_a_device_that_is_not_here_is_refused(ddpm_folder: Path, device: str) -> None:
    with pytest.raises(ArgumentError, match=rf"^`device` '{device}' cannot be used here; use auto or cpu\.$"):
        load_teacher(ddpm_folder, device=device)


def test_auto_is_the_best_device_here() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")


def test_a_dtype_that_does_not_exist_is_refused(ddpm_folder: Path) -> None:
    message = r"`dtype` must be one of float32, bfloat16, float16, float64, got 'int8'\."
    with pytest.raises(ArgumentError, match=message):
        inspect.unwrap(load_teacher)(ddpm_folder, dtype="int8")


@pytest.mark.parametrize(
    ("family", "labels", "prompts", "message"),
    [
        ("ddpm_folder", [1], None, r"`label` was given, but this teacher is unconditional; leave it out\."),
        ("ddpm_folder", None, ["a"], r"`prompt` was given, but this teacher is unconditional; leave it out\."),
        ("dit_folder", [0], ["a"], r"`prompt` was given, but this teacher is class-conditional; leave it out\."),
        ("dit_folder", None, None, r"`label` is needed: this teacher is class-conditional; give one from 0 to 2\."),
        (
            "dit_folder",
            [0, None],
            None,
            r"`label` is needed: this teacher is class-conditional; give one from 0 to 2\.",
        ),
        ("dit_folder", [0, 3], None, r"`label` must be a whole number from 0 to 2, got 3\."),
        ("dit_folder", [-1], None, r"`label` must be a whole number from 0 to 2, got -1\."),
        ("sd_folder", [0], None, r"`label` was given, but this teacher is text-conditional; leave it out\."),
        ("sd_folder", None, None, r"`prompt` is needed: this teacher is text-conditional; give one, or an empty one"),
        (
            "sd_folder",
            None,
            ["a", None],
            r"`prompt` is needed: this teacher is text-conditional; give one, or an empty",
        ),
    ],
)
def test_conditions_that_do_not_fit_are_refused(
    request: pytest.FixtureRequest,
    family: str,
    labels: list[int | None] | None,
    prompts: list[str | None] | None,
    message: str,
) -> None:
    teacher = load_teacher(request.getfixturevalue(family))
    with pytest.raises(ArgumentError, match=message):
        build_condition(teacher, labels, prompts)


def test_an_unconditional_teacher_has_an_empty_condition(ddpm_folder: Path) -> None:
    assert build_condition(load_teacher(ddpm_folder), None, None) == {}
