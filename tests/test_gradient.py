"""Projected gradients by hooks against one autograd call for each draw of each example."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from carv_attrib.config import ProjectionConfig
from carv_attrib.errors import ArgumentError, TeacherError
from carv_attrib.gradient import project_gradient, row_objective, select_layers
from carv_attrib.projection import DenseProjector, KroneckerProjector, Layer, Projector, build_projector
from carv_attrib.sampling import Draws, importance_proposal, sample_draws, uniform_proposal
from carv_attrib.teacher import Condition, Teacher, build_condition, placement
from carv_attrib.teachers import load_teacher
from tests import reference
from tests.conftest import NUM_TIMESTEPS, TinyTeacher

FAMILIES = ("ddpm_folder", "dit_folder", "dit_sigma_folder", "sd_folder", "sd_v_folder")
KINDS_OF_DENOISER = ("ddpm_folder", "dit_sigma_folder", "sd_folder")


@dataclass(frozen=True)
class Case:
    """A teacher with three examples in one encoding each, two importance-weighted draws, and the attributed layers."""

    teacher: Teacher
    latents: Tensor
    condition: Condition
    draws: Draws
    layers: list[Layer]
    weighting: Tensor

    def projector(self, kind: str = "kronecker", proj_dim: int = 40, block_dim: int = 20) -> Projector:
        """Return a projector for the case's layers."""
        device, dtype = placement(self.teacher)
        config = ProjectionConfig(kind, proj_dim, block_dim, rank=2)  # type: ignore[arg-type]
        return build_projector(config, self.layers, seed=0, device=device, dtype=dtype)

    def features(self, projector: Projector, *, micro_batch: int = 4, **changes: Any) -> Tensor:
        """Return the features by hooks."""
        return project_gradient(
            self.teacher,
            self.latents,
            self.condition,
            self.draws,
            projector,
            layers=self.layers,
            micro_batch=micro_batch,
            **changes,
        )

    def expected(self, projector: Projector, **changes: Any) -> Tensor:
        """Return the features by the naive algorithm."""

        def project(gradients: reference.Gradients) -> Tensor:
            if isinstance(projector, KroneckerProjector):
                return reference.kronecker(projector, self.layers, gradients)
            assert isinstance(projector, DenseProjector)
            return reference.dense(projector, self.layers, gradients)

        return reference.features(
            self.teacher, self.latents, self.condition, self.draws, self.layers, project, **changes
        )


def load_case(folder: Path, *, dtype: str = "float64", ids: list[int] | None = None) -> Case:
    """Return the case of a saved pipeline."""
    teacher = load_teacher(folder, dtype=dtype)  # type: ignore[arg-type]
    spec = teacher.pixel_spec
    pixels = torch.rand(3, spec.channels, spec.height, spec.width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    condition = build_condition(
        teacher,
        [0, 2, 1] if teacher.condition_kind == "label" else None,
        ["a red fox", "", "zebra"] if teacher.condition_kind == "prompt" else None,
    )
    proposal = importance_proposal(torch.linspace(3, 1, NUM_TIMESTEPS))
    draws = sample_draws(proposal, teacher.latent_shape, num_draws=2, ids=ids)
    weighting = torch.linspace(0.5, 2, NUM_TIMESTEPS, dtype=torch.float64)
    return Case(teacher, teacher.encode(pixels)[:, None], condition, draws, select_layers(teacher.denoiser), weighting)


@pytest.fixture(scope="module")
def cases(request: pytest.FixtureRequest) -> Callable[[str], Case]:
    """Return a function that returns the case of a family, loaded once."""
    loaded: dict[str, Case] = {}

    def get(family: str) -> Case:
        if family not in loaded:
            loaded[family] = load_case(request.getfixturevalue(family))
        return loaded[family]

    return get


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Check equality relative to the largest entry, which must not be zero."""
    assert actual.shape == expected.shape
    assert float(expected.abs().max()) > 0
    assert float((actual - expected).abs().max()) < tolerance * float(expected.abs().max())


@pytest.mark.parametrize(
    ("family", "objective"),
    [
        *((family, "loss") for family in FAMILIES),
        *itertools.product(("ddpm_folder", "dit_sigma_folder"), ("squared-norm", "mean")),
    ],
)
def test_kronecker_features_are_the_naive_ones(cases: Callable[[str], Case], family: str, objective: str) -> None:
    case = cases(family)
    projector = case.projector()
    actual = case.features(projector, objective=objective, weighting=case.weighting)
    assert_same(actual, case.expected(projector, objective=objective, weighting=case.weighting))


@pytest.mark.parametrize("family", KINDS_OF_DENOISER)
def test_every_layer_contributes_its_naive_block(cases: Callable[[str], Case], family: str) -> None:
    case = cases(family)
    projector = case.projector(proj_dim=10**6, block_dim=10**6)  # unfolded: each layer on its own scale
    actual, expected = case.features(projector), case.expected(projector)
    start = 0
    for layer in case.layers:
        p_in, p_out = projector.matrices(layer)  # type: ignore[attr-defined]
        stop = start + p_in.shape[-1] * p_out.shape[-1]
        if float(expected[..., start:stop].abs().max()) > 1e-9 * float(expected.abs().max()):
            assert_same(actual[..., start:stop], expected[..., start:stop])
        start = stop
    assert start == actual.shape[-1]


@pytest.mark.parametrize("family", KINDS_OF_DENOISER)
def test_dense_features_are_the_naive_ones(cases: Callable[[str], Case], family: str) -> None:
    projector = cases(family).projector("rademacher")
    assert_same(cases(family).features(projector), cases(family).expected(projector))


@pytest.mark.parametrize("family", KINDS_OF_DENOISER)
def test_independent_draws_belong_to_their_example(cases: Callable[[str], Case], family: str) -> None:
    case = cases(family)
    draws = sample_draws(uniform_proposal(NUM_TIMESTEPS), case.teacher.latent_shape, num_draws=2, ids=[5, 6, 7])
    case = replace(case, draws=draws)
    projector = case.projector()
    assert_same(case.features(projector), case.expected(projector))


@pytest.mark.parametrize("ids", [None, [5, 6, 7]])
def test_each_encoding_has_its_own_draws(cases: Callable[[str], Case], ids: list[int] | None) -> None:
    case = cases("dit_folder")
    draws = sample_draws(uniform_proposal(NUM_TIMESTEPS), case.teacher.latent_shape, num_draws=6, ids=ids)
    other = torch.randn(case.latents.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    case = replace(case, latents=torch.cat([case.latents, other, 2 * other], dim=1), draws=draws)
    projector = case.projector()
    assert_same(case.features(projector), case.expected(projector))


@pytest.mark.parametrize("family", ["dit_folder", "sd_v_folder"])
@pytest.mark.parametrize("objective", ["loss", "squared-norm", "mean"])
def test_masked_features_are_the_naive_ones(cases: Callable[[str], Case], family: str, objective: str) -> None:
    """Each example and each encoding has a mask of its own, with grey values and zeros."""
    case = cases(family)
    draws = sample_draws(uniform_proposal(NUM_TIMESTEPS), case.teacher.latent_shape, num_draws=4)
    other = torch.randn(case.latents.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    case = replace(case, latents=torch.cat([case.latents, other], dim=1), draws=draws)
    mask = torch.rand(3, 2, *case.teacher.latent_shape[1:], generator=torch.Generator().manual_seed(2))
    mask[:, :, 1:3] = 0
    projector = case.projector()
    actual = case.features(projector, objective=objective, mask=mask)
    assert_same(actual, case.expected(projector, objective=objective, mask=mask))


def test_a_white_mask_changes_no_bit_of_the_features(cases: Callable[[str], Case]) -> None:
    case = cases("ddpm_folder")
    projector, white = case.projector(), torch.ones(3, 1, *case.teacher.latent_shape[1:])
    assert torch.equal(case.features(projector, mask=white), case.features(projector))


def test_importance_weights_and_weighting_scale_each_draw(cases: Callable[[str], Case]) -> None:
    case = cases("ddpm_folder")
    projector = case.projector()
    unweighted = replace(case, draws=replace(case.draws, weights=torch.ones_like(case.draws.weights)))
    scale = case.draws.weights * case.weighting[case.draws.timesteps]
    expected = unweighted.features(projector) * scale[..., None]
    assert_same(case.features(projector, weighting=case.weighting), expected)


@pytest.mark.parametrize("family", KINDS_OF_DENOISER)
def test_micro_batches_of_any_size_agree(cases: Callable[[str], Case], family: str) -> None:
    case = cases(family)
    projector = case.projector()
    whole = case.features(projector, micro_batch=6)
    for micro_batch in (1, 3):
        assert_same(case.features(projector, micro_batch=micro_batch), whole, 1e-10)


def test_every_call_is_full_and_the_copies_change_nothing(
    cases: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases("ddpm_folder")
    projector = case.projector()
    rows = []
    handle = case.teacher.denoiser.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        padded = case.features(projector, micro_batch=4)
    finally:
        handle.remove()
    assert rows == [4, 4]
    assert padded.shape == (3, 2, 40)
    assert_same(padded, case.features(projector, micro_batch=1), 1e-10)


def test_an_example_has_the_same_features_alone(cases: Callable[[str], Case]) -> None:
    case = cases("dit_folder")
    projector = case.projector()
    together = case.features(projector)
    for i in range(3):
        condition = {name: values[i : i + 1] for name, values in case.condition.items()}
        alone = replace(case, latents=case.latents[i : i + 1], condition=condition)
        assert_same(alone.features(projector), together[i : i + 1], 1e-10)


def test_independent_draws_of_a_single_example_are_not_taken_for_shared(cases: Callable[[str], Case]) -> None:
    case = cases("ddpm_folder")
    draws = sample_draws(uniform_proposal(NUM_TIMESTEPS), case.teacher.latent_shape, num_draws=2, ids=[9])
    alone = replace(case, latents=case.latents[:1], draws=draws)
    projector = alone.projector()
    assert_same(alone.features(projector), alone.expected(projector))


@pytest.mark.parametrize("family", KINDS_OF_DENOISER)
def test_frozen_weights_gather_no_gradient(cases: Callable[[str], Case], family: str) -> None:
    case = cases(family)
    case.features(case.projector())
    assert all(p.grad is None and not p.requires_grad for p in case.teacher.denoiser.parameters())


def test_no_hook_is_left_behind(cases: Callable[[str], Case]) -> None:
    case = cases("ddpm_folder")
    case.features(case.projector())
    assert not any(layer.module._forward_hooks for layer in case.layers)


@pytest.mark.parametrize("family", KINDS_OF_DENOISER)
def test_gradient_checkpointing_changes_nothing(cases: Callable[[str], Case], family: str) -> None:
    case = cases(family)
    projector = case.projector()
    expected = case.features(projector)
    inner = next(x.module for x in case.layers if "resnets" in x.name or "blocks.1.attn1" in x.name)
    calls: list[int] = []
    handle = inner.register_forward_pre_hook(lambda module, args: calls.append(1))
    denoiser: Any = case.teacher.denoiser
    denoiser.enable_gradient_checkpointing()
    try:
        actual = case.features(projector, micro_batch=6)
    finally:
        denoiser.disable_gradient_checkpointing()
        handle.remove()
    assert len(calls) == 2  # the second time while gradients are computed
    assert_same(actual, expected, 1e-10)


def test_channels_last_changes_nothing(cases: Callable[[str], Case]) -> None:
    case = cases("ddpm_folder")
    projector = case.projector()
    expected = case.features(projector)
    case.teacher.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        assert_same(case.features(projector), expected, 1e-10)
    finally:
        case.teacher.denoiser.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


@pytest.mark.parametrize("family", KINDS_OF_DENOISER)
def test_bfloat16_features_point_the_same_way(
    cases: Callable[[str], Case], family: str, request: pytest.FixtureRequest
) -> None:
    exact = cases(family)
    low = load_case(request.getfixturevalue(family), dtype="bfloat16")
    features = low.features(low.projector())
    assert features.dtype == torch.float32
    expected = exact.features(exact.projector())
    cosines = torch.cosine_similarity(features.double().flatten(1), expected.flatten(1))
    assert float(cosines.min()) > 0.98


@pytest.mark.parametrize("family", KINDS_OF_DENOISER)
def test_autocast_features_point_the_same_way(
    cases: Callable[[str], Case], family: str, request: pytest.FixtureRequest
) -> None:
    exact = cases(family)
    single = load_case(request.getfixturevalue(family), dtype="float32")
    features = single.features(single.projector(), autocast=True)
    assert features.dtype == torch.float32
    expected = exact.features(exact.projector())
    error = (features.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert 1e-4 < float(error.min())  # float32 comes nearer
    assert float(error.max()) < 0.1


def test_layer_patterns_choose_by_name(cases: Callable[[str], Case]) -> None:
    denoiser = cases("ddpm_folder").teacher.denoiser
    names = [layer.name for layer in select_layers(denoiser, ["*to_q", "conv_in"])]
    assert "conv_in" in names
    assert len(names) > 1
    assert all(name == "conv_in" or name.endswith("to_q") for name in names)


def test_all_linear_and_conv_layers_are_attributed_by_default(cases: Callable[[str], Case]) -> None:
    denoiser = cases("sd_folder").teacher.denoiser
    expected = [name for name, module in denoiser.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]
    assert [layer.name for layer in select_layers(denoiser)] == expected


def test_a_chosen_layer_has_the_same_block_as_among_all(cases: Callable[[str], Case]) -> None:
    case = cases("ddpm_folder")
    some = replace(case, layers=select_layers(case.teacher.denoiser, ["conv_out", "up_blocks.0.attentions.0.to_k"]))
    projector = some.projector()
    assert_same(some.features(projector), some.expected(projector))


def test_a_pattern_that_matches_nothing_is_refused(cases: Callable[[str], Case]) -> None:
    message = (
        r"`layers` pattern '\*lora\*' matches no Linear or Conv2d of this teacher; names look like 'conv_in' and '"
    )
    with pytest.raises(ArgumentError, match=message):
        select_layers(cases("ddpm_folder").teacher.denoiser, ["conv_in", "*lora*"])


def test_a_denoiser_without_linear_or_conv_layers_is_refused() -> None:
    with pytest.raises(
        TeacherError, match=r"this teacher has no Linear or Conv2d layer, so nothing can be attributed\."
    ):
        select_layers(nn.Sequential(nn.SiLU()), ["x"])


class Twice(nn.Module):
    """Calls one Linear twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, noisy_latents: Tensor) -> Tensor:
        """Return the layer of a nonlinear function of the layer."""
        output: Tensor = self.linear(torch.tanh(self.linear(noisy_latents)))
        return output


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.usefixtures("as_users_run_it")  # the compiler cannot see through the type checks
def test_a_compiled_denoiser_gives_the_same_features(make_teacher: Callable[..., TinyTeacher]) -> None:
    case = tiny_case(make_teacher(Twice()))
    projector = case.projector()
    compiled: Any = torch.compile(case.teacher.denoiser, backend="aot_eager")
    teacher = TinyTeacher(compiled, case.teacher.noise_schedule)
    assert_same(replace(case, teacher=teacher).features(projector), case.features(projector), 1e-10)


class Shared(nn.Module):
    """Sees every row twice in one layer; has one layer that is never used and one that the output ignores."""

    def __init__(self) -> None:
        super().__init__()
        self.repeated = nn.Linear(2, 2)
        self.unused = nn.Linear(2, 2)
        self.ignored = nn.Linear(2, 2)

    def forward(self, noisy_latents: Tensor) -> Tensor:
        """Return the mean of two copies."""
        self.ignored(noisy_latents)
        output: Tensor = self.repeated(noisy_latents.repeat(2, 1, 1, 1)).unflatten(0, (2, -1)).mean(0)
        return output


def tiny_case(teacher: TinyTeacher, *patterns: str) -> Case:
    """Return three examples of a tiny teacher."""
    latents = torch.randn(3, 1, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    draws = sample_draws(uniform_proposal(10), teacher.latent_shape, num_draws=2)
    layers = select_layers(teacher.denoiser, patterns)
    return Case(teacher, latents, {}, draws, layers, torch.ones(10, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["kronecker", "normal"])
def test_a_module_called_twice_adds_up(make_teacher: Callable[..., TinyTeacher], kind: str) -> None:
    case = tiny_case(make_teacher(Twice()))
    projector = case.projector(kind)
    assert_same(case.features(projector), case.expected(projector))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_every_prediction_type_has_its_own_target(
    make_teacher: Callable[..., TinyTeacher], prediction_type: str
) -> None:
    case = tiny_case(make_teacher(Twice(), prediction_type))
    projector = case.projector()
    assert_same(case.features(projector), case.expected(projector))


def test_a_layer_that_sees_other_row_counts_is_refused(make_teacher: Callable[..., TinyTeacher]) -> None:
    case = tiny_case(make_teacher(Shared()), "repeated")
    message = r"layer repeated sees 8 rows for a batch of 4; leave it out of `layers`\."
    with pytest.raises(TeacherError, match=message):
        case.features(case.projector())
    assert not any(layer.module._forward_hooks for layer in case.layers)


@pytest.mark.parametrize("name", ["unused", "ignored"])
def test_layers_that_take_no_part_are_refused(make_teacher: Callable[..., TinyTeacher], name: str) -> None:
    case = tiny_case(make_teacher(Shared()), name)
    with pytest.raises(
        TeacherError, match="no attributed layer took part in the teacher's output; choose other `layers`"
    ):
        case.features(case.projector())


@pytest.mark.parametrize("scheme", ["iid", "stratified", "antithetic", "orthogonal"])
@pytest.mark.parametrize(("weighted", "num_bands"), [(False, 1), (True, 1), (True, 2)])
def test_the_mean_over_encodings_and_draws_is_the_closed_form(
    linear_teacher: TinyTeacher, scheme: Any, weighted: bool, num_bands: int
) -> None:
    num_examples = 400
    latents = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weighting = torch.linspace(3, 0.5, 10, dtype=torch.float64) if weighted else None
    proposal = importance_proposal(torch.linspace(0.1, 2, 10)) if weighted else uniform_proposal(10)
    settings: Any = {"num_draws": 12, "num_bands": num_bands, "scheme": scheme, "ids": range(num_examples)}
    each = [sample_draws(proposal, (1, 2, 2), purpose=f"encoding {r}", **settings) for r in range(2)]
    columns = {name: torch.cat([getattr(x, name) for x in each], 1) for name in ("timesteps", "noise", "weights")}
    layers = select_layers(linear_teacher.denoiser)
    projector = KroneckerProjector(layers, 100, 100, 100, 0, "cpu")  # full rank: the gradient itself
    features = project_gradient(
        linear_teacher,
        latents.expand(num_examples, -1, -1, -1, -1),
        {},
        replace(each[0], **columns),
        projector,
        layers=layers,
        micro_batch=500,
        weighting=weighting,
    ).mean(1)
    shares = torch.full((10,), 0.1, dtype=torch.float64) * (1 if weighting is None else weighting)
    expected = sum(reference.expected_linear_gradient(linear_teacher, z, shares).flatten() / 2 for z in latents)
    standard_errors = features.std(0) / num_examples**0.5
    assert float(((features.mean(0) - expected) / standard_errors).abs().max()) < 4
    assert float(standard_errors.norm()) < 0.05 * float(torch.as_tensor(expected).norm())


class Shapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the shape of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note its outputs."""
        result = func(*args, **(kwargs or {}))
        self.seen += [
            x.shape for x in (result if isinstance(result, tuple | list) else [result]) if isinstance(x, Tensor)
        ]
        return result


class Wide(nn.Module):
    """Two wide Linear layers on flattened latents, so that weights dwarf activations."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 70), nn.Linear(70, 4)

    def forward(self, noisy_latents: Tensor) -> Tensor:
        """Return the output in the shape of the input."""
        output: Tensor = self.down(torch.tanh(self.up(noisy_latents.flatten(1))))
        return output.view_as(noisy_latents)


@pytest.mark.parametrize(("kind", "written_out"), [("kronecker", False), ("rademacher", True)])
def test_kronecker_never_writes_out_a_weight_gradient(
    make_teacher: Callable[..., TinyTeacher], kind: str, written_out: bool
) -> None:
    case = tiny_case(make_teacher(Wide()))
    projector = case.projector(kind)
    with Shapes() as shapes:
        case.features(projector, micro_batch=6)
    num_weights = 4 * 70
    assert (max(shape.numel() for shape in shapes.seen) >= 6 * num_weights) == written_out


@pytest.mark.parametrize("family", KINDS_OF_DENOISER)
def test_kronecker_makes_no_tensor_of_a_weights_shape_for_each_row(cases: Callable[[str], Case], family: str) -> None:
    case = cases(family)
    projector = case.projector()
    with Shapes() as shapes:
        case.features(projector, micro_batch=6)
    rank = 2
    forbidden = {
        (6, layer.out_dim, layer.in_dim) for layer in case.layers if min(layer.out_dim, layer.in_dim) > 3 * rank
    }
    num_params = sum(layer.module.weight.numel() for layer in case.layers)
    assert forbidden
    assert not any(len(shape) == 2 and shape[0] == 6 and shape[1] >= num_params for shape in shapes.seen)
    assert not forbidden.intersection(tuple(shape) for shape in shapes.seen)


@pytest.mark.parametrize(("objective", "expected"), [("loss", 2.5), ("squared-norm", 5.0), ("mean", 2.0)])
def test_objectives_are_means_over_positions_in_float32(objective: Any, expected: float) -> None:
    output = torch.tensor([[[[1.0, 3.0]]]], dtype=torch.bfloat16)
    target = torch.tensor([[[[2.0, 1.0]]]], dtype=torch.bfloat16)
    value = row_objective(objective, output, target)
    assert value.dtype == torch.float32
    assert value.tolist() == [expected]


@pytest.mark.parametrize(("objective", "expected"), [("loss", 1.75), ("squared-norm", 3.0), ("mean", 1.5)])
def test_a_mask_weights_positions_and_not_channels(objective: Any, expected: float) -> None:
    output = torch.tensor([[[[1.0, 3.0]], [[1.0, 3.0]]]])
    target = torch.tensor([[[[2.0, 1.0]], [[2.0, 1.0]]]])
    assert row_objective(objective, output, target, torch.tensor([[[0.75, 0.25]]])).tolist() == [expected]


@pytest.mark.gpu
def test_cpu_and_gpu_agree(dit_folder: Path) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    features = []
    for device in ("cpu", "cuda"):
        teacher = load_teacher(dit_folder, device=device)
        layers = select_layers(teacher.denoiser)
        projector = build_projector(ProjectionConfig(), layers, seed=0, device=device, dtype=torch.float32)
        latents = torch.randn(3, 1, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
        draws = sample_draws(uniform_proposal(NUM_TIMESTEPS), teacher.latent_shape, num_draws=4)
        condition = teacher.condition([0, 1, 2], None)
        features.append(
            project_gradient(teacher, latents, condition, draws, projector, layers=layers, micro_batch=4).cpu()
        )
    assert (features[0] - features[1]).norm() / features[0].norm() < 1e-4
