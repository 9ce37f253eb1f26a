"""Flips and crops: what they do to a picture, how often, and that each has a stream of its own."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from carv_attrib.augmentation import augment
from carv_attrib.config import Augmentation
from carv_attrib.seeding import stream


def numbered(height: int, width: int) -> Tensor:
    """Return a picture in which each pixel tells its row and column."""
    rows = torch.arange(height).view(-1, 1).expand(height, width)
    columns = torch.arange(width).view(1, -1).expand(height, width)
    return torch.stack([rows, columns]).float()


def augmented(picture: Tensor, kind: Augmentation, count: int) -> Tensor:
    """Return so many augmentations of one picture, each by its own stream."""
    return augment(picture.expand(count, *picture.shape), kind, [stream(0, "test", i) for i in range(count)])


def test_no_augmentation_is_the_pictures_themselves() -> None:
    pixels = torch.rand(3, 1, 4, 4)
    assert augment(pixels, "none", []) is pixels


def test_a_flip_turns_half_of_the_pictures_left_to_right_and_nothing_else() -> None:
    picture = numbered(4, 6)
    results = augmented(picture, "flip", 1000)
    turned = (results == picture.flip(-1)).flatten(1).all(1)
    kept = (results == picture).flatten(1).all(1)
    assert bool((turned ^ kept).all())
    assert abs(float(turned.float().mean()) - 0.5) < 4 * 0.5 / 1000**0.5


def test_a_crop_moves_a_picture_by_up_to_an_eighth_and_repeats_the_edge() -> None:
    height, width = 16, 24
    shifts = []
    for result in augmented(numbered(height, width), "crop", 1500):
        down, right = int(result[0, height // 2, 0]) - height // 2, int(result[1, 0, width // 2]) - width // 2
        rows = (torch.arange(height) + down).clamp(0, height - 1).float()
        columns = (torch.arange(width) + right).clamp(0, width - 1).float()
        assert torch.equal(result[0], rows.view(-1, 1).expand(height, width))
        assert torch.equal(result[1], columns.view(1, -1).expand(height, width))
        shifts.append((down, right))
    counts = Counter(shifts)
    assert set(counts) == {(down, right) for down in range(-2, 3) for right in range(-3, 4)}
    expected = 1500 / 35
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 34 + 4 * (2 * 34) ** 0.5  # uniform, and the two directions independent


def test_a_picture_of_fewer_than_eight_pixels_is_not_moved() -> None:
    picture = numbered(7, 7)
    assert torch.equal(augmented(picture, "crop", 20), picture.expand(20, 2, 7, 7))


@pytest.mark.parametrize("kind", ["flip", "crop"])
def test_an_augmentation_follows_its_stream_and_not_its_place(kind: Augmentation) -> None:
    pixels = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    together = augment(pixels, kind, [stream(0, i) for i in range(6)])
    order = [4, 0, 5]
    alone = augment(pixels[order], kind, [stream(0, i) for i in order])
    assert torch.equal(alone, together[order])


def test_every_picture_needs_a_stream() -> None:
    with pytest.raises(ValueError, match="shorter"):
        augment(torch.rand(2, 1, 8, 8), "flip", [stream(0, 0)])
