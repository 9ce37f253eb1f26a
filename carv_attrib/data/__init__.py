"""Datasets to (id, image, label, caption), and images to the pixels that a teacher takes.

Opening a dataset reads its columns, never its images: those are decoded one by one in `ExampleDataset.load`, so that
a bad one can name itself.
"""

from carv_attrib.data.examples import Example, ExampleDataset, JoinedExamples
from carv_attrib.data.images import (
    RESIZE_RULE,
    PixelSpec,
    decode_image,
    from_pixels,
    open_image,
    thumbnail,
    to_pixels,
)
from carv_attrib.data.sources import open_dataset

__all__ = [
    "RESIZE_RULE",
    "Example",
    "ExampleDataset",
    "JoinedExamples",
    "PixelSpec",
    "decode_image",
    "from_pixels",
    "open_dataset",
    "open_image",
    "thumbnail",
    "to_pixels",
]
