"""Random projections of per-example weight gradients, layer by layer (`docs/method.md`, eq. (7) and (8)).

The weight gradient of one row of a batch is `G = sum over tokens of d a^T`, with layer inputs `a` (a one appended for
the bias) and output gradients `d`; a convolution's tokens are its output positions. A projector sees `a` in the
forward pass, `d` in the backward pass, and never more than one layer at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from carv_attrib.config import ProjectionConfig
from carv_attrib.errors import ArgumentError
from carv_attrib.seeding import choose_positions, random_normals, random_signs, stream_key

ENTRIES_PER_BLOCK = 2**22
"""Entries of a dense projection matrix that exist at any one time."""


@dataclass(frozen=True)
class Layer:
    """A Linear or Conv2d module whose weight and bias are attributed."""

    name: str
    module: nn.Linear | nn.Conv2d

    @property
    def groups(self) -> int:
        """Independent groups of channels; 1 for Linear."""
        return self.module.groups if isinstance(self.module, nn.Conv2d) else 1

    @property
    def out_dim(self) -> int:
        """Outputs of one group."""
        return self.module.weight.shape[0] // self.groups

    @property
    def in_dim(self) -> int:
        """Weights of one output, the bias included."""
        return self.module.weight[0].numel() + (self.module.bias is not None)

    def tokens_in(self, inputs: Tensor) -> Float[Tensor, "rows tokens groups in_dim"]:
        """Return `a` for each token: patches of a convolution, written out, with a one for the bias."""
        rows = len(inputs)
        if isinstance(self.module, nn.Conv2d):
            conv = self.module
            inputs, padding = _padded(conv, inputs)
            patches = F.unfold(inputs, conv.kernel_size, conv.dilation, padding, conv.stride)
            tokens = patches.view(rows, self.groups, -1, patches.shape[-1]).permute(0, 3, 1, 2)
        else:
            tokens = inputs.reshape(rows, -1, 1, inputs.shape[-1])
        return F.pad(tokens, (0, 1), value=1.0) if self.module.bias is not None else tokens

    def tokens_out(self, output_gradients: Tensor) -> Float[Tensor, "rows tokens groups out_dim"]:
        """Return `d` for each token."""
        rows = len(output_gradients)
        if isinstance(self.module, nn.Conv2d):
            return output_gradients.reshape(rows, self.groups, self.out_dim, -1).permute(0, 3, 1, 2)
        return output_gradients.reshape(rows, -1, 1, self.out_dim)


def _padded(conv: nn.Conv2d, inputs: Float[Tensor, "rows channels h w"]) -> tuple[Tensor, tuple[int, int]]:
    """Return inputs with any padding but plain zeros written out, and the (vertical, horizontal) zeros still to add."""
    if conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
        vertical, horizontal = conv.padding
        return inputs, (vertical, horizontal)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(inputs, conv._reversed_padding_repeated_twice, mode=mode), (0, 0)


@runtime_checkable
class Projector(Protocol):
    """A linear map from per-example gradients to `proj_dim` numbers that preserves inner products in expectation."""

    proj_dim: int

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
        return KroneckerProjector(layers, config.rank, config.proj_dim, seed, device, dtype)
    if config.projection in ("rademacher", "normal"):
        return DenseProjector(config.projection, config.proj_dim, seed)
    return TrakProjector(config.projection, config.proj_dim, seed, layers, device, dtype)


def random_matrix(key: int, rows: int, columns: int) -> Float[Tensor, "rows columns"]:
    """Return independent signs over sqrt(columns), or the identity where columns would not be fewer than rows."""
    if columns >= rows:
        return torch.eye(rows)
    return random_signs(key, 0, rows * columns).view(rows, columns) / math.sqrt(columns)


class KroneckerProjector:
    """Projects both sides of every weight gradient, then folds all layers together (eq. (7)).

    A layer's block is `sum over tokens of (P_out^T d)(P_in^T a)^T`, of shape (r_out, r_in); the groups of a
    convolution have matrices of their own and are summed. The blocks of all layers, in one row, are permuted, given
    random signs and added up `proj_dim` at a time: a sparse sign sketch whose buckets are equally full. Unbiased:
    `E[P P^T] = I` for each factor, and signs make the cross terms of a fold vanish in the mean.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        rank: int,
        proj_dim: int,
        seed: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self._in: dict[str, Tensor] = {}
        self._out: dict[str, Tensor] = {}
        self._in_weights: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._dims: dict[str, int] = {}
        for layer in layers:
            p_in, p_out = (
                torch.stack(
                    [
                        random_matrix(stream_key(seed, "kronecker", layer.name, side, g), dim, rank)
                        for g in range(layer.groups)
                    ]
                )
                for side, dim in (("in", layer.in_dim), ("out", layer.out_dim))
            )
            self._in[layer.name] = p_in.to(device, dtype)  # groups in_dim rank
            self._out[layer.name] = p_out.to(device, dtype)  # groups out_dim rank
            self._in_weights[layer.name] = self._as_weights(layer)
            self._dims[layer.name] = p_in.shape[-1] * p_out.shape[-1]
        self._block_dim = sum(self._dims.values())
        self.proj_dim = min(proj_dim, self._block_dim)
        self._depth = math.ceil(self._block_dim / self.proj_dim)
        padded_dim = self._depth * self.proj_dim
        places = choose_positions(stream_key(seed, "kronecker", "fold places"), torch.arange(padded_dim), padded_dim)
        self._permutation = places.to(device)
        self._signs = random_signs(stream_key(seed, "kronecker", "fold signs"), 0, padded_dim, device)

    def matrices(
        self, layer: Layer
    ) -> tuple[Float[Tensor, "groups in_dim in_rank"], Float[Tensor, "groups out_dim out_rank"]]:
        """Return P_in and P_out of each group of a layer."""
        return self._in[layer.name], self._out[layer.name]

    def _as_weights(self, layer: Layer) -> tuple[Tensor, Tensor | None]:
        """Return P_in as the weight and the bias of a layer of the same kind, with `rank` outputs for each group."""
        p_in, has_bias = self._in[layer.name], layer.module.bias is not None
        weight = p_in[:, : layer.in_dim - has_bias].transpose(1, 2).reshape(-1, *layer.module.weight.shape[1:])
        return weight, p_in[:, -1].flatten() if has_bias else None

    def keep(self, layer: Layer, inputs: Tensor) -> Float[Tensor, "rows tokens in_rank"]:
        """Return P_in^T a; for a convolution, by convolving with the projected kernel: no patches are written out."""
        weight, bias = self._in_weights[layer.name]
        if isinstance(layer.module, nn.Conv2d):
            conv = layer.module
            inputs, padding = _padded(conv, inputs)
            projected = F.conv2d(inputs, weight, bias, conv.stride, padding, conv.dilation, conv.groups)
            return _channels_last(projected, conv.groups)
        return F.linear(inputs.reshape(len(inputs), -1, inputs.shape[-1]), weight, bias)

    def block(self, layer: Layer, kept: Tensor, output_gradients: Tensor) -> Float[Tensor, "rows block"]:
        """Return `sum over tokens and groups of (P_out^T d)(P_in^T a)^T`, flat, in float32 at least."""
        p_out = self._out[layer.name]
        if isinstance(layer.module, nn.Conv2d):
            kernel = p_out.transpose(1, 2).reshape(-1, layer.out_dim, 1, 1)
            projected = _channels_last(F.conv2d(output_gradients, kernel, groups=layer.groups), layer.groups)
        else:
            projected = output_gradients.reshape(len(kept), -1, layer.out_dim) @ p_out[0]
        dtype = torch.promote_types(kept.dtype, torch.float32)
        return (projected.to(dtype).transpose(1, 2) @ kept.to(dtype)).flatten(1)

    def combine(self, blocks: Mapping[str, Tensor]) -> Float[Tensor, "rows proj_dim"]:
        """Return the fold of all blocks; a layer that did not run counts as zero."""
        first = next(iter(blocks.values()))
        flat = torch.cat(
            [blocks.get(name, first.new_zeros(len(first), dim)) for name, dim in self._dims.items()]
            + [first.new_zeros(len(first), len(self._permutation) - self._block_dim)],
            dim=1,
        )
        if self._depth == 1:
            return flat[:, : self.proj_dim]
        return (flat[:, self._permutation] * self._signs).view(len(first), self._depth, self.proj_dim).sum(1)


def _channels_last(
    projected: Float[Tensor, "rows channels height width"], groups: int
) -> Float[Tensor, "rows tokens rank"]:
    """Return the tokens of all groups of a projected picture."""
    rows, channels, height, width = projected.shape
    grouped = projected.reshape(rows, groups, channels // groups, height * width)  # rows groups rank positions
    return grouped.transpose(2, 3).flatten(1, 2)


class DenseProjector:
    """TRAK's projection: every entry an independent sign or normal, over sqrt(proj_dim) (eq. (8)).

    Entries are hashed from (seed, layer, parameter, column) block by block and never stored, so that no two blocks,
    layers or parameters share any, and every device has the same signs.
    """

    def __init__(self, kind: str, proj_dim: int, seed: int) -> None:
        self.proj_dim = proj_dim
        self._entries = random_signs if kind == "rademacher" else random_normals
        self._kind = kind
        self._seed = seed

    def matrix(
        self, layer: Layer, start: int, stop: int, device: torch.device | str
    ) -> Float[Tensor, "params proj_dim"]:
        """Return the rows of P that belong to parameters `start` to `stop` of a layer, ordered (group, out, in)."""
        key = stream_key(self._seed, self._kind, layer.name)
        entries = self._entries(key, start * self.proj_dim, (stop - start) * self.proj_dim, device)
        return entries.view(stop - start, self.proj_dim) / math.sqrt(self.proj_dim)

    def keep(self, layer: Layer, inputs: Tensor) -> Tensor:
        """Return a copy of the inputs: the network may change its own in place."""
        return inputs.clone()

    def block(self, layer: Layer, kept: Tensor, output_gradients: Tensor) -> Float[Tensor, "rows proj_dim"]:
        """Return P^T g of one layer."""
        gradient = weight_gradient(layer, kept, output_gradients)
        step = max(1, ENTRIES_PER_BLOCK // self.proj_dim)
        projected = gradient.new_zeros(len(gradient), self.proj_dim)
        for start in range(0, gradient.shape[1], step):
            piece = gradient[:, start : start + step]
            projected += piece @ self.matrix(layer, start, start + piece.shape[1], gradient.device).to(piece.dtype)
        return projected

    def combine(self, blocks: Mapping[str, Tensor]) -> Float[Tensor, "rows proj_dim"]:
        """Return the sum over layers."""
        return torch.stack(list(blocks.values())).sum(0)


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

        self.proj_dim = proj_dim
        self._projectors = {}
        for layer in layers:
            grad_dim = layer.groups * layer.out_dim * layer.in_dim
            layer_seed = stream_key(seed, "trak", layer.name) % 2**31
            arguments = (grad_dim, proj_dim, layer_seed, ProjectionType.rademacher, torch.device(device))
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


def weight_gradient(layer: Layer, inputs: Tensor, output_gradients: Tensor) -> Float[Tensor, "rows params"]:
    """Return each row's gradient of a layer's weight and bias, flat in the order (group, out, in, bias last)."""
    tokens_in, tokens_out = layer.tokens_in(inputs), layer.tokens_out(output_gradients)
    dtype = torch.promote_types(tokens_in.dtype, torch.float32)
    return torch.einsum("ntgo,ntgi->ngoi", tokens_out.to(dtype), tokens_in.to(dtype)).flatten(1)
