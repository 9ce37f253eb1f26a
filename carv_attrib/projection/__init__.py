"""Random projections of per-example weight gradients, layer by layer (`docs/method.md`, eq. (7) and (8)).

A projector sees a layer's inputs `a` in the forward pass, its output gradients `d` in the backward pass, and never
more than one layer at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from carv_attrib.config import ProjectionConfig
from carv_attrib.projection.dense import DenseProjector
from carv_attrib.projection.kronecker import KroneckerProjector
from carv_attrib.projection.layer import Layer, weight_gradient
from carv_attrib.projection.trak import TrakProjector

__all__ = [
    "DenseProjector",
    "KroneckerProjector",
    "Layer",
    "Projector",
    "TrakProjector",
    "build_projector",
    "weight_gradient",
]


@runtime_checkable
class Projector(Protocol):
    """A linear map from per-example gradients to `proj_dim` numbers that preserves inner products in expectation."""

    proj_dim: int
    block_dim: int
    """Coordinates of each kernel block (eq. (9)); all of them where blocks would be of the same layers."""

    @property
    def families(self) -> Int64[Tensor, "families proj_dim"]:
        """Numbers of groups of coordinates: those that share random numbers are together in one of the families.

        From 0 to `NUM_GROUPS` - 1; -1 for coordinates in which nothing is random.
        """
        ...

    def keep(self, layer: Layer, inputs: Tensor) -> Tensor:
        """Return what the backward pass will need of a layer's inputs."""
        ...

    def block(self, layer: Layer, kept: Tensor, output_gradients: Tensor) -> Float[Tensor, "rows block"]:
        """Return the layer's contribution for each row."""
        ...

    def combine(self, blocks: Mapping[str, Tensor]) -> Float[Tensor, "rows proj_dim"]:
        """Return the features of each row from the contributions of all layers that ran."""
        ...


def build_projector(
    config: ProjectionConfig, layers: Sequence[Layer], *, seed: int, device: torch.device | str, dtype: torch.dtype
) -> Projector:
    """Return the projector that `config` names, for these layers; `dtype` is that of the activations."""
    if config.projection == "kronecker":
        return KroneckerProjector(layers, config.rank, config.proj_dim, config.block_dim, seed, device)
    if config.projection in ("rademacher", "normal"):
        return DenseProjector(config.projection, config.proj_dim, seed)
    return TrakProjector(config.projection, config.proj_dim, seed, layers, device, dtype)
