"""Random flips and crops of pixels, before they are encoded: upstream randomness, one stream for each example."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from carv_attrib.config import Augmentation

CROP_SHARE = 8
"""A crop is moved by up to one part in this many of the height and width; the edge is repeated."""


def augment(
    pixels: Float[Tensor, "batch channels height width"], kind: Augmentation, streams: Sequence[np.random.Generator]
) -> Float[Tensor, "batch channels height width"]:
    """Return the pictures, each flipped left to right with probability 1/2, or moved, by its own random stream."""
    if kind == "none":
        return pixels
    move = _flip if kind == "flip" else _crop
    return torch.stack([move(picture, random) for picture, random in zip(pixels, streams, strict=True)])


def _flip(
    picture: Float[Tensor, "channels height width"], random: np.random.Generator
) -> Float[Tensor, "channels height width"]:
    return picture.flip(-1) if random.random() < 0.5 else picture


def _crop(
    picture: Float[Tensor, "channels height width"], random: np.random.Generator
) -> Float[Tensor, "channels height width"]:
    height, width = picture.shape[1:]
    down, right = (int(random.integers(-(size // CROP_SHARE), size // CROP_SHARE + 1)) for size in (height, width))
    rows = (torch.arange(height) + down).clamp(0, height - 1)
    columns = (torch.arange(width) + right).clamp(0, width - 1)
    return picture[:, rows][:, :, columns]
