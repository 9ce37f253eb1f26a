"""The default projection: both sides of each weight gradient, then a fold of all layers (`docs/method.md`, eq. (7))."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from carv_attrib.projection.layer import NUM_GROUPS, Layer, padded
from carv_attrib.seeding import random_signs, stream_key


def random_matrix(key: int, rows: int, columns: int) -> Float[Tensor, "rows columns"]:
    """Return independent signs over sqrt(columns), or the identity where columns would not be fewer than rows."""
    if columns >= rows:
        return torch.eye(rows)
    return random_signs(key, 0, rows * columns).view(rows, columns) / math.sqrt(columns)


def ranks(layer: Layer, rank: int) -> tuple[int, int]:
    """Return (r_in, r_out): `rank` on both sides; where one side is shorter, the other makes up for it.

    A block has rank^2 entries all the same, unless the layer has fewer weights. Layers with few inputs or outputs are
    the ends of the network, which can hold most of the gradient.

    >>> ranks(Layer("out", nn.Linear(100, 4)), 8)
    (16, 4)
    """
    r_out = min(layer.out_dim, rank)
    r_in = min(layer.in_dim, math.ceil(rank**2 / r_out))
    return r_in, min(layer.out_dim, math.ceil(rank**2 / r_in))


@dataclass(frozen=True)
class Factors:
    """The two sides of a layer's projection, in the forms in which they are applied.

    Attributes:
        channels: mixes the input channels of each group; None: they stay as they are.
        inner: weight of the layer that follows, of the same kind, with `r_in` outputs for each group.
        bias: what the input that stands for the bias adds; None for a layer without.
        out: P_out^T of each group.
    """

    channels: Float[Tensor, "groups mixed channels"] | None
    inner: Float[Tensor, "groups_rank mixed *kernel"]
    bias: Float[Tensor, " groups_rank"] | None
    out: Float[Tensor, "groups out_rank out_dim"]

    def to(self, device: torch.device, dtype: torch.dtype) -> Factors:
        """Return the factors on a device, in a dtype."""
        channels, bias = (None if x is None else x.to(device, dtype) for x in (self.channels, self.bias))
        return Factors(channels, self.inner.to(device, dtype), bias, self.out.to(device, dtype))


def draw_factors(layer: Layer, rank: int, seed: int) -> Factors:
    """Return the random matrices of a layer, in float32 on the CPU.

    `P_in` of a convolution is a product: signs that mix its channels to `r_in`, then signs over patches of the
    mixture. Most of the work is then one narrow matrix product, and the accuracy is that of independent entries
    (`scripts/bench_projection.py`).
    """

    def matrices(side: str, rows: int, columns: int) -> Float[Tensor, "groups columns rows"]:
        keys = [stream_key(seed, "kronecker", layer.name, side, g) for g in range(layer.groups)]
        return torch.stack([random_matrix(key, rows, columns) for key in keys]).mT  # in memory as the products like it

    r_in, r_out = ranks(layer, rank)
    in_channels, *kernel_size = layer.module.weight.shape[1:]
    positions = math.prod(kernel_size)
    mixed = min(in_channels, r_in) if positions > 1 else in_channels
    inner = matrices("in", mixed * positions + layer.has_bias, r_in)
    weights, bias = inner[..., : mixed * positions], inner[..., -1].flatten() if layer.has_bias else None
    channels = matrices("channels", in_channels, mixed) if mixed < in_channels else None
    out = matrices("out", layer.out_dim, r_out)
    return Factors(channels, weights.reshape(-1, mixed, *kernel_size), bias, out)


def slides(conv: nn.Conv2d) -> bool:
    """Return whether an output position sees more, or others, than the input at that position."""
    pads = not isinstance(conv.padding, str) and any(conv.padding)
    return pads or any(size != 1 for size in (*conv.kernel_size, *conv.stride))


class KroneckerProjector:
    """Projects both sides of every weight gradient, then folds all layers together (eq. (7)).

    A layer's block is `sum over tokens of (P_out^T d)(P_in^T a)^T`, of shape (r_out, r_in); the groups of a
    convolution have matrices of their own and are summed. The layers are dealt out, in turn, over as many rows as a
    feature has blocks of `block_dim` coordinates; the entries of each row are given random signs and added up: a sparse
    sign sketch whose buckets are equally full. Unbiased: `E[P P^T] = I` for each factor, and signs make the cross terms
    of a fold vanish in the mean.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        rank: int,
        proj_dim: int,
        block_dim: int,
        seed: int,
        device: torch.device | str,
    ) -> None:
        self._drawn = {layer.name: draw_factors(layer, rank, seed) for layer in layers}
        self._placed: dict[tuple[str, torch.device, torch.dtype], Factors] = {}
        self._rank = rank
        self._ranks = {layer.name: ranks(layer, rank) for layer in layers}
        self._exact = {
            n: (layer.out_dim == self._ranks[n][1], layer.in_dim == self._ranks[n][0])
            for layer in layers
            if (n := layer.name)
        }
        entries = {name: math.prod(sides) for name, sides in self._ranks.items()}
        num_entries = sum(entries.values())
        self.block_dim = min(block_dim, proj_dim, num_entries)
        num_blocks = min(proj_dim, num_entries) // self.block_dim
        names = list(entries)
        self._entries = {name: entries[name] for first in range(num_blocks) for name in names[first::num_blocks]}
        self.proj_dim = num_blocks * self.block_dim
        self._per_block = math.ceil(num_entries / num_blocks)
        self._unused = num_blocks * self._per_block - num_entries
        self._depth = math.ceil(self._per_block / self.block_dim)
        self._fold = (num_blocks, self._depth, self.block_dim)
        signs = random_signs(stream_key(seed, "kronecker", "fold signs"), 0, math.prod(self._fold), device)
        self._signs = signs.view(num_blocks, -1)

    @property
    def families(self) -> Int64[Tensor, "2 proj_dim"]:
        """Coordinates that share a column of P_out, and those that share one of P_in, in most of the layers folded.

        None, -1, where these are columns of an identity and nothing is folded.
        """
        positions = {name: number for number, name in enumerate(self._ranks)}
        numbers = torch.cat([self._columns(positions[name], name) for name in self._entries], 1)
        numbers = torch.cat([numbers, numbers[:, :1].expand(2, self._unused)], 1).view(2, -1, self._per_block)
        num_blocks, depth, size = self._fold
        shorter = depth * size - self._per_block  # the last row of a fold, which the first one makes up for
        numbers = torch.cat([numbers, numbers[..., size - shorter : size]], 2)
        return numbers.view(2, num_blocks, depth, size).mode(2).values.flatten(1)

    def _columns(self, number: int, name: str) -> Int64[Tensor, "2 block"]:
        """Return the groups of the entries of a layer's block, by its columns of P_out and of P_in."""
        r_in, r_out = self._ranks[name]
        columns = torch.cartesian_prod(torch.arange(r_out), torch.arange(r_in)).T
        groups = (columns + number * self._rank) % NUM_GROUPS
        exact = torch.tensor(self._exact[name]) & (self._depth == 1)
        return groups.where(~exact[:, None], -1)

    def matrices(
        self, layer: Layer
    ) -> tuple[Float64[Tensor, "groups in_dim in_rank"], Float64[Tensor, "groups out_dim out_rank"]]:
        """Return P_in and P_out of each group of a layer, multiplied out."""
        factors, groups = self._drawn[layer.name].to(torch.device("cpu"), torch.float64), layer.groups
        rows, mixed = factors.inner.shape[:2]
        inner = factors.inner.reshape(groups, rows // groups, mixed, -1)  # groups in_rank mixed positions
        if factors.channels is not None:
            inner = torch.einsum("grmk,gmc->grck", inner, factors.channels)
        columns = [inner.flatten(2)]
        if factors.bias is not None:
            columns.append(factors.bias.view(groups, -1, 1))
        return torch.cat(columns, dim=2).transpose(1, 2), factors.out.transpose(1, 2)

    def _at(self, layer: Layer, activations: Tensor) -> Factors:
        """Return the factors of a layer where these activations are, in their dtype."""
        key = (layer.name, activations.device, activations.dtype)
        if key not in self._placed:
            self._placed[key] = self._drawn[layer.name].to(activations.device, activations.dtype)
        return self._placed[key]

    def keep(self, layer: Layer, inputs: Tensor) -> Float[Tensor, "rows groups_rank *positions"]:
        """Return P_in^T a; for a convolution, by convolving: no patches are written out."""
        factors = self._at(layer, inputs)
        if isinstance(layer.module, nn.Linear):
            return project_tokens(inputs, factors.inner, factors.bias)
        conv = layer.module
        if not slides(conv):
            projected = mix_channels(factors.inner.view(conv.groups, -1, factors.inner.shape[1]), inputs)
            return projected if factors.bias is None else projected + factors.bias.view(-1, 1, 1)
        inputs, padding = padded(conv, inputs)
        mixed = inputs if factors.channels is None else mix_channels(factors.channels, inputs)
        return F.conv2d(mixed, factors.inner, factors.bias, conv.stride, padding, conv.dilation, conv.groups)

    def block(self, layer: Layer, kept: Tensor, output_gradients: Tensor) -> Float[Tensor, "rows block"]:
        """Return `sum over tokens and groups of (P_out^T d)(P_in^T a)^T`, flat, in float32 at least."""
        out = self._at(layer, output_gradients).out
        if isinstance(layer.module, nn.Linear):
            projected = project_tokens(output_gradients, out[0])
        else:
            projected = mix_channels(out, output_gradients)
        inner, outer = (rank_by_token(x, layer.groups) for x in (kept, projected))
        return (outer @ inner.transpose(1, 2)).flatten(1)

    def combine(self, blocks: Mapping[str, Tensor]) -> Float[Tensor, "rows proj_dim"]:
        """Return the fold of all blocks; a layer that did not run counts as zero."""
        first = next(iter(blocks.values()))
        rows = len(first)
        flat = torch.cat(
            [blocks.get(name, first.new_zeros(rows, count)) for name, count in self._entries.items()]
            + [first.new_zeros(rows, self._unused)],
            dim=1,
        )
        if self._depth == 1:
            return flat
        flat = flat.view(rows, -1, self._per_block)
        padded = F.pad(flat, (0, self._signs.shape[1] - self._per_block))
        return (padded * self._signs).view(rows, *self._fold).sum(2).flatten(1)


def project_tokens(
    inputs: Float[Tensor, "rows *tokens features"],
    matrix: Float[Tensor, "rank features"],
    bias: Float[Tensor, " rank"] | None = None,
) -> Float[Tensor, "rows rank tokens"]:
    """Return the product of a matrix with every token, by one product for all rows.

    In float32 on a CPU it is written as a 1 x 1 convolution with channels last, which is how the memory lies: there the
    matrix library takes longer for so few outputs. With channels first it is the other way round, see `mix_channels`.
    """
    tokens = inputs.reshape(len(inputs), -1, inputs.shape[-1])
    if inputs.device.type == "cpu" and inputs.dtype == torch.float32:
        return F.conv2d(tokens.transpose(1, 2).unsqueeze(2), matrix[:, :, None, None], bias).squeeze(2)
    return F.linear(tokens, matrix, bias).transpose(1, 2)


def mix_channels(
    matrices: Float[Tensor, "groups mixed channels"], pictures: Float[Tensor, "rows groups_channels h w"]
) -> Float[Tensor, "rows groups_mixed h w"]:
    """Return the product of each group's matrix with its channels at every position.

    A broadcast matrix product is several times faster on a CPU than the same 1 x 1 convolution to so few channels.
    """
    rows, _, height, width = pictures.shape
    grouped = pictures.reshape(rows, len(matrices), -1, height * width)
    return torch.matmul(matrices, grouped).view(rows, -1, height, width)


def rank_by_token(projected: Tensor, groups: int) -> Float[Tensor, "rows rank tokens"]:
    """Return the tokens of all groups side by side, in float32 at least."""
    tokens: Tensor = (
        projected.reshape(len(projected), groups, projected.shape[1] // groups, -1).transpose(1, 2).flatten(2)
    )
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))
