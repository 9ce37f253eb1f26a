"""Projectors against explicit matrices, and the inner products that they preserve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from carv_attrib.config import ProjectionConfig
from carv_attrib.errors import ArgumentError
from carv_attrib.projection import (
    DenseProjector,
    KroneckerProjector,
    Layer,
    Projector,
    TrakProjector,
    build_projector,
    dense,
    weight_gradient,
)
from carv_attrib.projection.kronecker import random_matrix, ranks
from tests import reference

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

KINDS = ("kronecker", "rademacher", "normal", "trak-basic")

MODULES: dict[str, tuple[Callable[[bool], nn.Linear | nn.Conv2d], tuple[int, ...]]] = {
    "linear-2d": (lambda bias: nn.Linear(6, 5, bias=bias), (6,)),
    "linear-3d": (lambda bias: nn.Linear(6, 5, bias=bias), (7, 6)),
    "linear-4d": (lambda bias: nn.Linear(6, 5, bias=bias), (3, 2, 6)),
    "conv-1x1": (lambda bias: nn.Conv2d(4, 5, 1, bias=bias), (4, 5, 6)),
    "conv-3x3": (lambda bias: nn.Conv2d(4, 5, 3, padding=1, bias=bias), (4, 5, 6)),
    "conv-3x3-of-many": (lambda bias: nn.Conv2d(9, 5, 3, stride=2, padding=(1, 2), bias=bias), (9, 5, 6)),
    "conv-groups-of-many": (lambda bias: nn.Conv2d(14, 4, (2, 3), groups=2, bias=bias), (14, 5, 6)),
    "conv-1x1-groups": (lambda bias: nn.Conv2d(6, 4, 1, groups=2, bias=bias), (6, 5, 6)),
    "conv-1x1-stride": (lambda bias: nn.Conv2d(6, 4, 1, stride=2, bias=bias), (6, 5, 6)),
    "conv-1x1-padding": (lambda bias: nn.Conv2d(6, 4, 1, padding=1, bias=bias), (6, 5, 6)),
    "conv-oblong": (lambda bias: nn.Conv2d(2, 3, (3, 2), (1, 2), (0, 1), bias=bias), (2, 7, 6)),
    "conv-stride": (lambda bias: nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=bias), (3, 8, 7)),
    "conv-dilation": (lambda bias: nn.Conv2d(3, 4, 3, dilation=2, bias=bias), (3, 7, 8)),
    "conv-groups": (lambda bias: nn.Conv2d(6, 8, 3, padding=1, groups=2, bias=bias), (6, 5, 5)),
    "conv-depthwise": (lambda bias: nn.Conv2d(3, 9, 3, groups=3, bias=bias), (3, 5, 6)),
    "conv-depthwise-1": (lambda bias: nn.Conv2d(3, 3, 3, groups=3, bias=bias), (3, 5, 6)),
    "conv-same": (lambda bias: nn.Conv2d(3, 4, 4, padding="same", bias=bias), (3, 6, 5)),
    "conv-valid": (lambda bias: nn.Conv2d(3, 4, 2, padding="valid", bias=bias), (3, 6, 5)),
    "conv-reflect": (lambda bias: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect", bias=bias), (3, 6, 5)),
    "conv-circular": (lambda bias: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="circular", bias=bias), (3, 6, 5)),
    "conv-replicate": (lambda bias: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="replicate", bias=bias), (3, 6, 5)),
    "conv-same-reflect": (
        lambda bias: nn.Conv2d(4, 4, 4, padding="same", padding_mode="reflect", groups=2, bias=bias),
        (4, 6, 5),
    ),
}


@dataclass(frozen=True)
class Case:
    """A layer, what it saw, and the weight gradients that autograd finds for each row."""

    layer: Layer
    inputs: Tensor
    output_gradients: Tensor
    gradients: list[Tensor]


def make_case(module: nn.Linear | nn.Conv2d, shape: tuple[int, ...], name: str = "layer", rows: int = 3) -> Case:
    """Return random inputs and output gradients of a layer, with each row's gradient by autograd."""
    layer = Layer(name, module.double())
    inputs = torch.randn(rows, *shape, dtype=torch.float64)
    outputs = module(inputs)
    output_gradients = torch.randn_like(outputs)
    gradients = [
        reference.autograd_gradients((module(x[None])[0] * d).sum(), [layer])[name]
        for x, d in zip(inputs, output_gradients, strict=True)
    ]
    module.requires_grad_(False)
    return Case(layer, inputs, output_gradients, gradients)


@pytest.fixture(params=[(name, bias) for name in MODULES for bias in (True, False)], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request: pytest.FixtureRequest) -> Case:
    """Return one case for each layer kind, with and without bias."""
    name, bias = request.param
    torch.manual_seed(0)
    build, shape = MODULES[name]
    return make_case(build(bias), shape)


def build(
    kind: str, layers: list[Layer], *, seed: int = 0, proj_dim: int = 16, rank: int = 2, block_dim: int = 512
) -> Projector:
    """Return a float64 projector on the CPU."""
    config = ProjectionConfig(projection=kind, proj_dim=proj_dim, rank=rank, block_dim=block_dim)  # type: ignore[arg-type]
    return build_projector(config, layers, seed=seed, device="cpu", dtype=torch.float64)


def block(projector: Projector, case: Case) -> Tensor:
    """Return what the hooks would add for a layer."""
    return projector.block(case.layer, projector.keep(case.layer, case.inputs), case.output_gradients)


def project(projector: Projector, cases: list[Case]) -> Tensor:
    """Return the features of each row."""
    return projector.combine({case.layer.name: block(projector, case) for case in cases})


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Check equality to 1e-9 of the largest entry, which must not be zero."""
    assert actual.shape == expected.shape
    assert float(expected.abs().max()) > 0
    assert float((actual - expected).abs().max()) < 1e-9 * float(expected.abs().max())


def test_weight_gradient_is_autograds(case: Case) -> None:
    expected = torch.stack([gradient.flatten() for gradient in case.gradients])
    assert_same(weight_gradient(case.layer, case.inputs, case.output_gradients), expected)


def test_kronecker_block_is_the_product_of_explicit_matrices(case: Case) -> None:
    projector = build("kronecker", [case.layer])
    assert isinstance(projector, KroneckerProjector)
    expected = [reference.kronecker_block(projector, case.layer, gradient) for gradient in case.gradients]
    assert_same(block(projector, case), torch.stack(expected))


def test_kronecker_block_in_float32_is_that_in_float64(case: Case) -> None:
    """In float32 on a CPU tokens are projected by a convolution, in float64 by a matrix product."""
    projector = build("kronecker", [case.layer])
    expected = block(projector, case)
    narrow = projector.block(case.layer, projector.keep(case.layer, case.inputs.float()), case.output_gradients.float())
    assert narrow.dtype == torch.float32
    assert (narrow - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_dense_block_is_the_product_with_the_explicit_matrix(
    case: Case, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "ENTRIES_PER_BLOCK", 5 * 16)  # five parameters at a time
    projector = build(kind, [case.layer])
    assert isinstance(projector, DenseProjector)
    expected = [reference.dense(projector, [case.layer], {"layer": gradient}) for gradient in case.gradients]
    assert_same(block(projector, case), torch.stack(expected))


def test_trak_block_is_the_product_with_the_explicit_matrix(case: Case) -> None:
    projector = build("trak-basic", [case.layer], proj_dim=130)  # more than one block of columns
    assert isinstance(projector, TrakProjector)
    num_params = case.gradients[0].numel()
    matrix = projector._projectors["layer"].project(torch.eye(num_params, dtype=torch.float64), model_id=0)
    assert set(matrix.flatten().tolist()) == {-1.0, 1.0}
    expected = torch.stack([gradient.flatten() for gradient in case.gradients]) @ matrix / 130**0.5
    assert_same(block(projector, case), expected)


def test_channels_last_changes_nothing(case: Case) -> None:
    if case.inputs.dim() != 4 or isinstance(case.layer.module, nn.Linear):
        return
    expected = block(build("kronecker", [case.layer]), case)
    last = Case(
        case.layer,
        case.inputs.to(memory_format=torch.channels_last),
        case.output_gradients.to(memory_format=torch.channels_last),
        case.gradients,
    )
    assert_same(block(build("kronecker", [case.layer]), last), expected)


def three_cases() -> list[Case]:
    """Return a Linear and two convolutions of the same shape, all values positive so that no sum hides an error."""
    torch.manual_seed(1)
    cases = [
        make_case(nn.Linear(4, 3), (2, 4), "first", rows=2),
        make_case(nn.Conv2d(2, 4, 2, groups=2), (2, 3, 3), "second", rows=2),
        make_case(nn.Conv2d(2, 4, 2, groups=2), (2, 3, 3), "third", rows=2),
    ]
    return [Case(c.layer, c.inputs.abs(), c.output_gradients.abs(), c.gradients) for c in cases]


def flat_gradients(cases: list[Case]) -> Tensor:
    """Return each row's gradient of all layers."""
    return torch.cat([weight_gradient(c.layer, c.inputs, c.output_gradients) for c in cases], dim=1)


@pytest.mark.parametrize(
    ("proj_dim", "block_dim"),
    [(5, 5), (6, 6), (11, 512), (12, 12), (13, 20), (100, 100), (6, 3), (8, 2), (5, 1), (40, 4)],
)
def test_kronecker_folds_all_layers_as_the_signs_say(proj_dim: int, block_dim: int) -> None:
    cases = three_cases()
    layers = [c.layer for c in cases]
    projector = build("kronecker", layers, proj_dim=proj_dim, block_dim=block_dim)
    assert isinstance(projector, KroneckerProjector)
    assert projector.proj_dim == min(proj_dim, 12)
    gradients = [
        {c.layer.name: reference.matrix_of(c.layer, *_split(c, row)) for c in cases}
        for row in range(len(cases[0].inputs))
    ]
    expected = torch.stack([reference.kronecker(projector, layers, row) for row in gradients])
    assert_same(project(projector, cases), expected)


def _split(case: Case, row: int) -> tuple[Tensor, Tensor]:
    """Return the weight and bias gradient of one row by autograd."""
    module = case.layer.module.requires_grad_(True)
    scalar = (module(case.inputs[row : row + 1])[0] * case.output_gradients[row]).sum()
    weight, bias = torch.autograd.grad(scalar, list(module.parameters()))
    module.requires_grad_(False)
    return weight, bias


def test_the_signs_of_the_fold_are_fair() -> None:
    layers = [Layer(str(i), nn.Linear(50, 50)) for i in range(40)]
    projector = KroneckerProjector(layers, 4, 100, 100, 0, "cpu")
    assert set(projector._signs.flatten().tolist()) == {-1.0, 1.0}
    assert abs(float(projector._signs.mean())) < 4 / projector._signs.numel() ** 0.5


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(100, 100), (8, 8)),
        (nn.Linear(100, 4), (16, 4)),
        (nn.Linear(3, 100), (4, 16)),
        (nn.Linear(2, 4), (3, 4)),
        (nn.Conv2d(64, 1, 3), (64, 1)),
        (nn.Conv2d(64, 64, 3, groups=64), (10, 1)),
    ],
)
def test_a_block_has_as_many_entries_where_one_side_is_short(module: nn.Linear | nn.Conv2d, expected: Any) -> None:
    layer = Layer("layer", module)
    assert ranks(layer, 8) == expected
    p_in, p_out = KroneckerProjector([layer], 8, 64, 64, 0, "cpu").matrices(layer)
    assert (p_in.shape[1:], p_out.shape[1:]) == ((layer.in_dim, expected[0]), (layer.out_dim, expected[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_dimensions_are_what_was_asked_for(kind: str) -> None:
    cases = three_cases()
    projector = build(kind, [c.layer for c in cases], proj_dim=7)
    features = project(projector, cases)
    assert features.shape == (2, projector.proj_dim) == (2, 7)
    assert bool((features.abs().sum(1) > 0).all())


def test_kronecker_has_no_more_dimensions_than_its_blocks() -> None:
    cases = three_cases()
    projector = build("kronecker", [c.layer for c in cases], proj_dim=1000, block_dim=1000)
    assert projector.proj_dim == 3 * 2 * 2
    assert torch.equal(project(projector, cases), torch.cat([block(projector, c) for c in cases], dim=1))


def test_kronecker_of_full_rank_is_the_gradient_itself() -> None:
    (case, *_) = three_cases()
    projector = build("kronecker", [case.layer], proj_dim=1000, rank=100, block_dim=1000)
    assert_same(project(projector, [case]), flat_gradients([case]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_did_not_run_counts_as_zero(kind: str) -> None:
    cases = three_cases()
    projector = build(kind, [c.layer for c in cases], proj_dim=7)
    silent = Case(cases[1].layer, cases[1].inputs, torch.zeros_like(cases[1].output_gradients), [])
    assert torch.equal(project(projector, [cases[0], cases[2]]), project(projector, [cases[0], silent, cases[2]]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_in_which_layers_finish_does_not_matter(kind: str) -> None:
    cases = three_cases()
    projector = build(kind, [c.layer for c in cases], proj_dim=7)
    assert_same(project(projector, cases[::-1]), project(projector, cases))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_the_same_shape_have_their_own_matrices(kind: str) -> None:
    _, second, third = three_cases()
    projector = build(kind, [second.layer, third.layer], proj_dim=64)
    as_third = Case(third.layer, second.inputs, second.output_gradients, [])
    assert not torch.allclose(block(projector, second).abs(), block(projector, as_third).abs())


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_names_the_projection(kind: str) -> None:
    cases = three_cases()
    first, again, other = (project(build(kind, [c.layer for c in cases], seed=s), cases) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_no_two_kronecker_factors_share_their_entries() -> None:
    layers = [Layer(name, nn.Conv2d(32, 32, 2, groups=2)) for name in ("a", "b")]
    projector = KroneckerProjector(layers, 8, 64, 64, 0, "cpu")
    factors = [m[g, :16].flatten().sign() for x in layers for m in projector.matrices(x) for g in range(2)]
    agreement = torch.corrcoef(torch.stack(factors)) - torch.eye(len(factors))
    assert float(agreement.abs().max()) < 4.5 / factors[0].numel() ** 0.5


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_no_two_dense_blocks_share_their_entries(kind: str) -> None:
    projector = DenseProjector(kind, 64, 0)
    blocks = [
        projector.matrix(Layer(name, nn.Linear(4, 4)), start, start + 50, "cpu").flatten()
        for name in ("a", "b")
        for start in (0, 50, 100)
    ]
    agreement = torch.corrcoef(torch.stack(blocks)) - torch.eye(len(blocks))
    assert float(agreement.abs().max()) < 4.5 / blocks[0].numel() ** 0.5


def test_random_matrix_has_columns_of_signs_over_the_root_of_their_number() -> None:
    matrix = random_matrix(3, 50, 4)
    assert set(matrix.flatten().tolist()) == {-0.5, 0.5}


def test_random_matrix_is_the_identity_where_it_would_not_be_smaller() -> None:
    assert torch.equal(random_matrix(3, 4, 4), torch.eye(4))


def inner_products(kind: str, cases: list[Case], proj_dim: int, seeds: int) -> Tensor:
    """Return the inner product of the two rows' features for each seed."""
    layers = [c.layer for c in cases]
    features = [project(build(kind, layers, seed=seed, proj_dim=proj_dim), cases) for seed in range(seeds)]
    return torch.stack([f[0] @ f[1] for f in features]).double()


@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_are_preserved_in_the_mean(kind: str) -> None:
    cases = three_cases()
    x, y = flat_gradients(cases)
    found = inner_products(kind, cases, 5, 400)
    standard_error = float(found.std()) / len(found) ** 0.5
    assert abs(float(found.mean() - x @ y)) < 4 * standard_error
    assert standard_error < 0.1 * float(x @ y)


def test_a_fold_alone_preserves_inner_products_in_the_mean() -> None:
    (case, *_) = three_cases()
    x, y = flat_gradients([case])
    found = torch.stack(
        [
            f[0] @ f[1]
            for f in (project(build("kronecker", [case.layer], seed=s, proj_dim=4, rank=9), [case]) for s in range(400))
        ]
    )
    assert abs(float(found.mean() - x @ y)) < 4 * float(found.std()) / len(found) ** 0.5


@pytest.mark.parametrize("kind", ["rademacher", "normal", "trak-basic"])
def test_dense_inner_products_have_the_predicted_variance(kind: str) -> None:
    cases = three_cases()
    x, y = flat_gradients(cases)
    found = inner_products(kind, cases, 5, 600)
    fourth_cumulant = 0 if kind == "normal" else 2 * (x**2 * y**2).sum()  # a sign has E s^4 = 1, a normal 3
    predicted = float((x @ x) * (y @ y) + (x @ y) ** 2 - fourth_cumulant) / 5
    squares = (found - x @ y) ** 2
    assert abs(float(squares.mean()) - predicted) < 4 * float(squares.std()) / len(found) ** 0.5
    assert float(squares.std()) / len(found) ** 0.5 < 0.15 * predicted


def test_trak_cuda_without_cuda_says_what_to_use() -> None:
    message = r"^`projection` trak-cuda needs a CUDA device and the `fast_jl` package \([^\n]*\); use kronecker\.$"
    with pytest.raises(ArgumentError, match=message):
        build("trak-cuda", [three_cases()[0].layer])


def test_trak_cuda_without_fast_jl_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import trak.projectors

    def refuse(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("You should install it.\n      See the FAQ.")

    monkeypatch.setattr(trak.projectors, "CudaProjector", refuse)
    with pytest.raises(ArgumentError, match=r"package \(You should install it\. See the FAQ\.\); use kronecker\.$"):
        build("trak-cuda", [three_cases()[0].layer])


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_activations_are_summed_in_float32(kind: str) -> None:
    torch.manual_seed(0)
    layer = Layer("layer", nn.Linear(8, 8).bfloat16())
    config = ProjectionConfig(projection=kind, proj_dim=16, rank=4)  # type: ignore[arg-type]
    projector = build_projector(config, [layer], seed=0, device="cpu", dtype=torch.bfloat16)
    inputs, gradients = torch.randn(2, 50, 8).bfloat16(), torch.randn(2, 50, 8).bfloat16()
    low = projector.combine({"layer": projector.block(layer, projector.keep(layer, inputs), gradients)})
    wide = Layer("layer", nn.Linear(8, 8))
    exact = build_projector(config, [wide], seed=0, device="cpu", dtype=torch.float32)
    high = exact.combine({"layer": exact.block(wide, exact.keep(wide, inputs.float()), gradients.float())})
    assert low.dtype == torch.float32
    assert float((low - high).norm()) < 0.03 * float(high.norm())
