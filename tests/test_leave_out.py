"""Errors from the projection against scores with coordinates left out, and against the spread over projections."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from carv_attrib.kernel import kernel_of
from carv_attrib.leave_out import LeaveOut
from carv_attrib.projection import DenseProjector, KroneckerProjector, Layer, Projector
from carv_attrib.projection.layer import NUM_GROUPS, independent_groups
from carv_attrib.scores import score_bands

DAMPING, NUM_LAYERS, SIZE, NUM_TRAIN, NUM_QUERIES, BANDS = 1.0, 7, 40, 40, 2, 2


def scores_and_variance(features: Tensor, families: Tensor, num_blocks: int = 1) -> tuple[Tensor, Tensor]:
    """Return the scores of the first examples, as queries, for the others, and their variance over projections."""
    features = features.double().view(-1, BANDS, features.shape[-1])
    query, train = features[:NUM_QUERIES], features[NUM_QUERIES:]
    kernel = kernel_of(train[:, :, None], features.shape[-1] // num_blocks)
    inverse = kernel.inverse("preconditioned", DAMPING)
    leave_out = LeaveOut(kernel, inverse, families, alike(train[:, :, None]))
    query, train = (kernel.banded(side[:, :, None])[:, :, 0] for side in (query, train))
    moved = torch.einsum("qbgd,nbd->gqn", leave_out.of(query), train) / BANDS
    return torch.einsum("qbd,nbd->qn", query * inverse, train) / BANDS, moved.square().sum(0)


def alike(features: Tensor) -> Tensor:
    """Return replicates that are the same: all that a projection does to them lasts."""
    return features.mean(2, keepdim=True).expand(-1, -1, 2, -1)


@pytest.mark.parametrize(
    ("block", "family"),
    [(12, torch.arange(12) % 4), (4, torch.arange(12) % 4), (6, torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 3]))],
)
def test_a_group_is_left_out_of_query_examples_and_kernel_at_the_same_lambda(block: int, family: Tensor) -> None:
    """In blocks too, of which each may have other shares of a group, or nothing of it."""
    generator = torch.Generator().manual_seed(0)
    train, query = (torch.randn(n, 12, generator=generator).double() for n in (30, 2))
    kernel = kernel_of(train[:, None, None], block)
    inverse = kernel.inverse("preconditioned", DAMPING)
    leave_out = LeaveOut(kernel, inverse, family[None], alike(train[:, None, None]))
    found = leave_out.of(kernel.banded(query[:, None, None])[:, :, 0])[:, 0]
    means = kernel.eigenvalues.mean(2)[0]

    def scores(kept: Tensor) -> Tensor:
        total = torch.zeros(2, 30).double()
        for number, mean in enumerate(means):
            of_block = kept & (torch.arange(12) // block == number)
            own, lam = train[:, of_block], DAMPING * mean * torch.eye(int(of_block.sum()))
            total += query[:, of_block] @ torch.linalg.solve(own.T @ own / 30 + lam, own.T)
        return total

    changes = torch.stack([scores(family >= 0) - scores(family != number) for number in range(4)])
    sizes = family.bincount().double()
    expected = (changes - changes.sum(0) * (sizes / 12)[:, None, None]) * 0.75**0.5
    deviations = torch.einsum("qgd,nd->gqn", found, kernel.banded(train[:, None, None])[:, 0, 0])
    torch.testing.assert_close(deviations[:4], expected)
    assert (deviations[4:] == 0).all()  # groups that are not there


def gradients(tokens: int) -> tuple[list[Layer], Tensor, Tensor]:
    """Return layers, and activations and output gradients, (layers, rows, tokens, SIZE), that are alike in part."""
    generator = torch.Generator().manual_seed(1)
    rows = (NUM_TRAIN + NUM_QUERIES) * BANDS
    sides = torch.randn(2, NUM_LAYERS, rows, tokens, SIZE, generator=generator)
    common = torch.randn(2, NUM_LAYERS, 1, tokens, SIZE, generator=generator)
    layers = [Layer(f"layer{i}", nn.Linear(SIZE, SIZE, bias=False)) for i in range(NUM_LAYERS)]
    return layers, *(sides + common)


def project(projector: Projector, layers: list[Layer], activations: Tensor, outputs: Tensor) -> Tensor:
    """Return the features of all rows."""
    blocks = {
        layer.name: projector.block(layer, projector.keep(layer, a), d)
        for layer, a, d in zip(layers, activations, outputs, strict=True)
    }
    return projector.combine(blocks)


@pytest.mark.parametrize(
    ("kind", "blocks"), [("normal", 1), ("rademacher", 1), ("rademacher", 2), ("kronecker", 1), ("kronecker", 2)]
)
def test_squares_sum_to_the_variance_over_projections(kind: str, blocks: int) -> None:
    """Kronecker blocks of one token have rank one: coordinates share so much that any groups would see too little."""
    layers, activations, outputs = gradients(tokens=1)
    runs: list[tuple[Tensor, ...]] = []
    for seed in range(150):
        projector: Projector = DenseProjector(kind, 128, seed)
        if kind == "kronecker":
            projector = KroneckerProjector(layers, 8, 128, 128 // blocks, seed, "cpu")
        features = project(projector, layers, activations, outputs)
        scores, variance = scores_and_variance(features, projector.families, blocks)
        runs.append((scores, variance, scores_and_variance(features, independent_groups(128), blocks)[1]))
    scores, variance, independent = (torch.stack(values) for values in zip(*runs, strict=True))
    true = scores.var(0).mean()
    assert 0.85 < variance.mean() / true < 1.2
    if kind == "kronecker":
        assert independent.mean() / true < 0.85


def both_sides(noise: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return queries and examples under draws and a projection of a seed, the preconditioner, and what is left out.

    The latter with and without what other draws would not have.
    """
    fixed, generator = torch.Generator().manual_seed(1), torch.Generator().manual_seed(seed)
    means = torch.randn(NUM_QUERIES + NUM_TRAIN, 1, 1, 200, generator=fixed) + torch.randn(200, generator=fixed)
    common, own = (torch.randn(size, 4, 2, 200, generator=generator) for size in (1, len(means)))
    gradients = means + noise * (common + own)
    features = (gradients @ torch.randn(200, 64, generator=generator) / 8).double()
    kernel = kernel_of(features[NUM_QUERIES:], 64)
    inverse, rotated = kernel.inverse("preconditioned", DAMPING), kernel.banded(features)
    query, train, families = rotated[:NUM_QUERIES], rotated[NUM_QUERIES:], independent_groups(64)
    examples = (features[NUM_QUERIES:], alike(features[NUM_QUERIES:]))
    both = [LeaveOut(kernel, inverse, families, own).of(query.mean(2)) for own in examples]
    return query, train, inverse, *both


@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
def test_draws_and_projection_together_make_the_spread(noise: float) -> None:
    """What a projection does to the noise of draws is in the errors of draws, and must not be counted again."""
    scores, errors, of_projection = [], [], []
    for seed in range(300):
        query, train, inverse, lasting, whole = both_sides(noise, seed)
        found = score_bands(query, train, inverse, lasting)
        scores.append(found.scores)
        errors.append(found.standard_errors.square().mean())
        of_projection.append(lasting.square().sum() / whole.square().sum())
    assert 0.85 < torch.stack(errors).mean() / torch.stack(scores).var(0).mean() < 1.6
    if noise == 0:
        torch.testing.assert_close(torch.stack(of_projection), torch.ones(300).double())
    assert torch.stack(of_projection).mean() < {0.0: 1.01, 0.5: 0.95, 2.0: 0.5}[noise]


def test_what_is_not_random_has_no_error() -> None:
    """Of a layer with 4 + 1 inputs and 3 outputs; a fold is random in any case."""
    layers = [Layer("small", nn.Linear(4, 3))]

    def random_families(rank: int, proj_dim: int) -> list[bool]:
        families = KroneckerProjector(layers, rank, proj_dim, proj_dim, 0, "cpu").families
        assert families.shape == (2, proj_dim)
        return (families >= 0).any(1).tolist()

    assert random_families(8, 15) == [False, False]
    assert random_families(3, 9) == [False, True]
    assert random_families(2, 4) == [True, True]
    assert random_families(8, 7) == [True, True]
    features = torch.randn((NUM_TRAIN + NUM_QUERIES) * BANDS, 15, generator=torch.Generator().manual_seed(0))
    _, variance = scores_and_variance(features, torch.full((2, 15), -1))
    assert (variance == 0).all()


@pytest.mark.parametrize(
    ("num_layers", "rank", "proj_dim"), [(1, 1, 9), (1, 2, 9), (1, 3, 9), (3, 8, 1), (3, 8, 2), (7, 8, 100)]
)
def test_few_and_uneven_groups_have_an_error_too(num_layers: int, rank: int, proj_dim: int) -> None:
    layers, activations, outputs = gradients(tokens=1)
    chosen = layers[:num_layers]
    projector = KroneckerProjector(chosen, rank, proj_dim, proj_dim, 0, "cpu")
    features = project(projector, chosen, activations[:num_layers], outputs[:num_layers])
    _, variance = scores_and_variance(features, projector.families)
    assert variance.isfinite().all()
    assert bool(variance.sum() > 0) == (projector.proj_dim > 1)  # of one coordinate nothing can be left out


def test_groups_follow_the_blocks_behind_a_layer_of_another_size() -> None:
    """The first block has 260 entries, so that all others begin four coordinates later."""
    layers = [Layer("first", nn.Conv2d(1, 64, 3)), *(Layer(str(i), nn.Linear(64, 64)) for i in range(20))]
    columns_of_out, columns_of_in = KroneckerProjector(layers, 16, 2048, 2048, 0, "cpu").families
    blocks = (torch.arange(2048) - 4) % 256
    assert (columns_of_out == blocks // 16).all()
    assert (columns_of_in == blocks % 16).all()
    assert len(columns_of_in.unique()) == NUM_GROUPS
