"""The projectors of the `trak` library, behind the protocol of this package."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from carv_attrib.errors import ArgumentError
from carv_attrib.projection.layer import Layer, independent_groups, weight_gradient
from carv_attrib.seeding import stream_key


class TrakProjector:
    """The projectors of the `trak` library, one for each layer with a seed of its own; `traker` on PyPI.

    Raises:
        ArgumentError: if `trak-cuda` is asked for where its CUDA kernel, `fast_jl`, does not import.
    """

    def __init__(
        self,
        kind: str,
        proj_dim: int,
        seed: int,
        layers: Sequence[Layer],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        from trak.projectors import BasicProjector, CudaProjector, ProjectionType

        self.proj_dim = self.block_dim = proj_dim
        self._projectors = {}
        for layer in layers:
            layer_seed = stream_key(seed, "trak", layer.name) % 2**31
            arguments = (layer.num_weights, proj_dim, layer_seed, ProjectionType.rademacher, torch.device(device))
            if kind == "trak-basic":
                self._projectors[layer.name] = BasicProjector(
                    *arguments, dtype=torch.promote_types(dtype, torch.float32)
                )
                continue
            try:
                self._projectors[layer.name] = CudaProjector(*arguments, max_batch_size=32)
            except (ImportError, ModuleNotFoundError, ValueError) as err:
                reason = " ".join(str(err).split())
                raise ArgumentError(
                    f"`projection` trak-cuda needs a CUDA device and the `fast_jl` package ({reason}); use kronecker."
                ) from err

    @property
    def families(self) -> Int64[Tensor, "1 proj_dim"]:
        """Coordinates share nothing: any groups will do."""
        return independent_groups(self.proj_dim)

    def keep(self, layer: Layer, inputs: Tensor) -> Tensor:
        """Return a copy of the inputs: the network may change its own in place."""
        return inputs.clone()

    def block(self, layer: Layer, kept: Tensor, output_gradients: Tensor) -> Float[Tensor, "rows proj_dim"]:
        """Return P^T g of one layer, over sqrt(proj_dim): trak leaves its entries unscaled."""
        gradient = weight_gradient(layer, kept, output_gradients)
        projected: Tensor = self._projectors[layer.name].project(gradient, model_id=0)
        return projected / math.sqrt(self.proj_dim)

    def combine(self, blocks: Mapping[str, Tensor]) -> Float[Tensor, "rows proj_dim"]:
        """Return the sum over layers."""
        return torch.stack(list(blocks.values())).sum(0)
