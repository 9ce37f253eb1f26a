"""TRAK's dense projections, from entries that are hashed when needed (`docs/method.md`, eq. (8))."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from carv_attrib.projection.layer import Layer, independent_groups, weight_gradient
from carv_attrib.seeding import random_bools, random_normals, stream_key

ENTRIES_PER_BLOCK = 2**20
"""Entries of a dense projection matrix that exist at any one time: few enough for a processor's cache."""


class DenseProjector:
    """TRAK's projection: every entry an independent sign or normal, over sqrt(proj_dim) (eq. (8)).

    Entries are hashed from (seed, layer, parameter, column) block by block and never stored, so that no two blocks,
    layers or parameters share any, and every device has the same signs. A block serves all rows of a batch.
    """

    def __init__(self, kind: str, proj_dim: int, seed: int) -> None:
        self.proj_dim = self.block_dim = proj_dim
        self._kind = kind
        self._seed = seed

    @property
    def families(self) -> Int64[Tensor, "1 proj_dim"]:
        """Coordinates share nothing: any groups will do."""
        return independent_groups(self.proj_dim)

    def _entries(self, layer: Layer, start: int, stop: int, device: torch.device | str) -> Tensor:
        """Return normals, or zeros and ones in place of signs, for parameters `start` to `stop` of a layer."""
        draw = random_bools if self._kind == "rademacher" else random_normals
        key = stream_key(self._seed, self._kind, layer.name)
        return draw(key, start * self.proj_dim, (stop - start) * self.proj_dim, device).view(-1, self.proj_dim)

    def matrix(
        self, layer: Layer, start: int, stop: int, device: torch.device | str
    ) -> Float64[Tensor, "params proj_dim"]:
        """Return the rows of P that belong to parameters `start` to `stop` of a layer, ordered (group, out, in)."""
        entries = self._entries(layer, start, stop, device).double()
        return (2 * entries - 1 if self._kind == "rademacher" else entries) / math.sqrt(self.proj_dim)

    def keep(self, layer: Layer, inputs: Tensor) -> Tensor:
        """Return a copy of the inputs: the network may change its own in place."""
        return inputs.clone()

    def block(self, layer: Layer, kept: Tensor, output_gradients: Tensor) -> Float[Tensor, "rows proj_dim"]:
        """Return P^T g of one layer."""
        return self.project(layer, weight_gradient(layer, kept, output_gradients))

    def project(self, layer: Layer, gradient: Float[Tensor, "rows params"]) -> Float[Tensor, "rows proj_dim"]:
        """Return P^T g of gradients that are written out; signs are `2 b - 1`, and sum b g is what is computed."""
        step = max(1, ENTRIES_PER_BLOCK // self.proj_dim)
        entries = gradient.new_empty(step, self.proj_dim)
        projected = gradient.new_zeros(len(gradient), self.proj_dim)
        for start in range(0, gradient.shape[1], step):
            piece = gradient[:, start : start + step]
            block = entries[: piece.shape[1]]
            block.copy_(self._entries(layer, start, start + piece.shape[1], gradient.device))
            projected.addmm_(piece, block)
        if self._kind == "rademacher":
            projected = 2 * projected - gradient.sum(1, keepdim=True)
        return projected / math.sqrt(self.proj_dim)

    def combine(self, blocks: Mapping[str, Tensor]) -> Float[Tensor, "rows proj_dim"]:
        """Return the sum over layers."""
        return torch.stack(list(blocks.values())).sum(0)
