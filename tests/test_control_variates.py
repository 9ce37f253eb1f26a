from __future__ import annotations

import pytest
import torch
from torch import Tensor

from carv_attrib.control_variates import replace_common_part, smoother_factor
from carv_attrib.errors import ArgumentError

NUM_EXAMPLES, DIMS, REPLICATES = 60, 5, 2000


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def latents() -> Tensor:
    return torch.randn(NUM_EXAMPLES, 2, 2, 2, generator=generator())


def smoother(labels: Tensor | None = None, ridge: float = 0.5, **options: int) -> Tensor:
    factor = smoother_factor(latents(), labels, ridge=ridge, **options)
    return factor @ factor.T


def model_of_errors(labels: Tensor | None) -> Tensor:
    flat = latents().flatten(1).double()
    squares = (flat[:, None] - flat[None]).square().sum(-1)
    same = torch.ones_like(squares) if labels is None else torch.where(labels[:, None] == labels[None], 1.0, 0.5)
    return torch.exp(-squares / squares.median()) * same


@pytest.mark.parametrize("labels", [None, torch.tensor([3, 70, 5] * 20)])
def test_the_smoother_is_kernel_ridge_regression(labels: Tensor | None) -> None:
    alike = model_of_errors(labels)
    expected = alike @ torch.linalg.inv(alike + 0.5 * torch.eye(NUM_EXAMPLES))
    torch.testing.assert_close(smoother(labels), expected, rtol=1e-6, atol=1e-8)


def test_fewer_landmarks_smooth_with_fewer_functions() -> None:
    assert smoother_factor(latents(), ridge=0.5, num_landmarks=10).shape == (NUM_EXAMPLES, 10)
    few, all_ = (smoother(ridge=1e-9, num_landmarks=count) for count in (10, NUM_EXAMPLES))
    assert float(few.trace()) == pytest.approx(10, abs=1e-3)
    assert float(all_.trace()) == pytest.approx(NUM_EXAMPLES, abs=1e-3)


def test_it_is_unbiased_and_the_ridge_that_the_docstring_names_is_best() -> None:
    truth = torch.randn(NUM_EXAMPLES, DIMS, generator=generator(), dtype=torch.float64)
    root = torch.linalg.cholesky(model_of_errors(None) + 1e-9 * torch.eye(NUM_EXAMPLES))
    random = generator()
    shape = (REPLICATES, NUM_EXAMPLES, DIMS)
    shared = truth + (root @ torch.randn(shape, generator=random).double()) / 2  # variance 1/4, as of 4 draws
    independent = truth + torch.randn(shape, generator=random).double() / 2**0.5  # as of 2
    variances = {}
    for ridge in (0.25, 2.0, 16.0):
        factor = smoother_factor(latents(), ridge=ridge)
        flat = [x.transpose(0, 1).flatten(1) for x in (shared, independent)]
        estimates = replace_common_part(*flat, factor).view(NUM_EXAMPLES, REPLICATES, DIMS)
        error = estimates.std(1) / REPLICATES**0.5
        assert float(((estimates.mean(1) - truth) / error).abs().max()) < 4.5
        variances[ridge] = float(estimates.var(1).mean())
    assert variances[2.0] < 0.97 * min(variances[0.25], variances[16.0])
    assert variances[2.0] < 0.8 * float(shared.var(0).mean())


def test_a_ridge_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ArgumentError, match="`ridge` must be positive, got 0.0; use shared over independent draws"):
        smoother_factor(latents(), ridge=0.0)
