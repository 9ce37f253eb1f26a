"""What a projector knows of a layer: its weight gradient is `G = sum over tokens of d a^T` for each row of a batch.

Layer inputs `a` have a one appended for the bias, `d` are output gradients, and a convolution's tokens are its output
positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

NUM_GROUPS = 16
"""Of coordinates that are left out together, in each family: as many squares are in a standard error."""


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
        return self.module.weight[0].numel() + self.has_bias

    @property
    def num_weights(self) -> int:
        """Weights of the layer, the bias included."""
        return self.groups * self.out_dim * self.in_dim

    @property
    def has_bias(self) -> bool:
        """Whether there is a bias."""
        return self.module.bias is not None

    def tokens_in(self, inputs: Tensor) -> Float[Tensor, "rows tokens groups in_dim"]:
        """Return `a` for each token: patches of a convolution, written out, with a one for the bias."""
        rows = len(inputs)
        if isinstance(self.module, nn.Conv2d):
            conv = self.module
            inputs, padding = padded(conv, inputs)
            patches = F.unfold(inputs, conv.kernel_size, conv.dilation, padding, conv.stride)
            tokens = patches.view(rows, self.groups, -1, patches.shape[-1]).permute(0, 3, 1, 2)
        else:
            tokens = inputs.reshape(rows, -1, 1, inputs.shape[-1])
        return F.pad(tokens, (0, 1), value=1.0) if self.has_bias else tokens

    def tokens_out(self, output_gradients: Tensor) -> Float[Tensor, "rows tokens groups out_dim"]:
        """Return `d` for each token."""
        rows = len(output_gradients)
        if isinstance(self.module, nn.Conv2d):
            return output_gradients.reshape(rows, self.groups, self.out_dim, -1).permute(0, 3, 1, 2)
        return output_gradients.reshape(rows, -1, 1, self.out_dim)


def padded(conv: nn.Conv2d, inputs: Float[Tensor, "rows channels h w"]) -> tuple[Tensor, tuple[int, int]]:
    """Return inputs with any padding but plain zeros written out, and the (vertical, horizontal) zeros still to add."""
    if conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
        vertical, horizontal = conv.padding
        return inputs, (vertical, horizontal)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(inputs, conv._reversed_padding_repeated_twice, mode=mode), (0, 0)


def weight_gradient(layer: Layer, inputs: Tensor, output_gradients: Tensor) -> Float[Tensor, "rows params"]:
    """Return each row's gradient of a layer's weight and bias, flat in the order (group, out, in, bias last)."""
    tokens_in, tokens_out = layer.tokens_in(inputs), layer.tokens_out(output_gradients)
    dtype = torch.promote_types(tokens_in.dtype, torch.float32)
    return torch.einsum("ntgo,ntgi->ngoi", tokens_out.to(dtype), tokens_in.to(dtype)).flatten(1)


def independent_groups(proj_dim: int) -> Int64[Tensor, "1 proj_dim"]:
    """Return one family of groups, for a projection whose coordinates share no random numbers."""
    return torch.arange(proj_dim)[None] % NUM_GROUPS
