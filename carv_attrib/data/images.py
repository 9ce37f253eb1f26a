"""Images as the pixels that a teacher takes, and files as images."""

from __future__ import annotations

import io
import struct
import textwrap
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from carv_attrib.errors import ArgumentError, BadImageError, DataError

RESIZE_RULE = "exif-rotate, convert to L or RGB, resize the shorter side (PIL bilinear), centre crop, scale to [-1, 1]"
RASTER_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

_COLOUR_MODES = frozenset("1 L LA P PA RGB RGBA RGBX RGBa CMYK YCbCr HSV".split())
_DEEP_GREY_MODES = frozenset(("I", "I;16", "I;16L", "I;16B", "I;16N"))
# What PIL's decoders raise on damaged files, by fuzzing them and by their source.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, RuntimeError, EOFError, struct.error)
_WARNING_FILTERS = threading.Lock()


@dataclass(frozen=True)
class PixelSpec:
    """Height, width and channels of the pixels, in [-1, 1], that a teacher takes.

    Raises:
        ArgumentError: `height` or `width` is below 1, or `channels` is neither 1 nor 3.
    """

    height: int
    width: int
    channels: int

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name in ("height", "width"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"`{name}` must be at least 1 pixel, got {getattr(self, name)}.")
        if self.channels not in (1, 3):
            raise ArgumentError(f"`channels` must be 1 (grey) or 3 (RGB), got {self.channels}.")


def to_pixels(image: Image.Image, spec: PixelSpec) -> Float[Tensor, "channels height width"]:
    """The image as a teacher sees it, by `RESIZE_RULE`: float32 in [-1, 1].

    The same pixels as `Resize` (bilinear) and `CenterCrop` in diffusers' training scripts, but only those that the crop
    keeps are computed, so an extreme aspect ratio costs nothing. Transparency is dropped, 16-bit grey is scaled.

    Raises:
        BadImageError: the mode of `image` holds no plain colours (float or 32-bit grey, LAB).
    """
    image = _to_mode(ImageOps.exif_transpose(image), "L" if spec.channels == 1 else "RGB")
    image = image.resize((spec.width, spec.height), Image.Resampling.BILINEAR, box=_cover_box(image.size, spec))
    values = np.asarray(image, dtype=np.float32).reshape(spec.height, spec.width, spec.channels)
    return torch.from_numpy(values / np.float32(127.5) - 1).permute(2, 0, 1).contiguous()


def _cover_box(size: tuple[int, int], spec: PixelSpec) -> tuple[float, float, float, float]:
    """The part of an image of `size` that a resize to cover and a centre crop would keep, in its own pixels."""
    width, height = size
    if width * spec.height >= spec.width * height:
        covered_width, covered_height = width * spec.height // height, spec.height
    else:
        covered_width, covered_height = spec.width, height * spec.width // width
    left, top = round((covered_width - spec.width) / 2), round((covered_height - spec.height) / 2)
    x, y = width / covered_width, height / covered_height
    return left * x, top * y, min((left + spec.width) * x, width), min((top + spec.height) * y, height)


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    _check_mode(image, "the image")
    if image.mode in _DEEP_GREY_MODES:
        image = Image.fromarray(np.round(np.asarray(image) / 257.0).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def _check_mode(image: Image.Image, key: str) -> None:
    if image.mode in _COLOUR_MODES or image.mode in _DEEP_GREY_MODES - {"I"}:
        return
    if image.mode != "I":
        raise BadImageError(
            f"{key}: pixels of PIL mode {image.mode} are not read; save it as 8- or 16-bit grey or RGB."
        )
    low, high = np.asarray(image).min(), np.asarray(image).max()
    if low < 0 or high > 65535:
        raise BadImageError(f"{key}: grey values must be in [0, 65535], got [{low}, {high}]; save it as 16-bit grey.")


def from_pixels(pixels: Tensor) -> Image.Image:
    """The pixels, clamped to [-1, 1], as an 8-bit grey (1 channel) or RGB (3 channels) image.

    Raises:
        ArgumentError: `pixels` is not (1 or 3, height, width).
    """
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise ArgumentError(f"`pixels` must be (1 or 3, height, width), got {tuple(pixels.shape)}.")
    values = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(values[0].numpy() if len(values) == 1 else values.permute(1, 2, 0).contiguous().numpy())


def thumbnail(image_pixels: Tensor) -> bytes:
    """What the teacher saw, as a file: PNG up to 64 x 64, else JPEG with the longest side at most 128 pixels."""
    image, content = from_pixels(image_pixels), io.BytesIO()
    if max(image.size) <= 64:
        image.save(content, "PNG")
    else:
        image.thumbnail((128, 128))
        image.save(content, "JPEG", quality=85)
    return content.getvalue()


def decode_image(content: bytes, key: str) -> Image.Image:
    """The image (of an animation the first frame), fully decoded; `key` names it in errors.

    Raises:
        BadImageError: not a raster image, damaged, of an unknown mode, or above `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    if not content:
        raise BadImageError(f"{key}: the file is empty (0 bytes); replace or remove it.")
    try:
        image = _open_quietly(content)
        image.load()
    except UnidentifiedImageError as err:
        raise BadImageError(f"{key}: not an image of a known format ({', '.join(RASTER_FORMATS)}).") from err
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as err:
        limit = f"{Image.MAX_IMAGE_PIXELS} pixels (`PIL.Image.MAX_IMAGE_PIXELS`)"
        raise BadImageError(f"{key}: the image has more than {limit}; scale it down or raise that limit.") from err
    except _DECODE_ERRORS as err:
        raise BadImageError(f"{key}: the image is damaged ({reason(err)}); replace or remove it.") from err
    _check_mode(image, key)
    return image


def _open_quietly(content: bytes) -> Image.Image:
    """Read the header and EXIF; a size that PIL warns of is an error, its other warnings are noise."""
    with _WARNING_FILTERS, warnings.catch_warnings():  # the filters are global: one thread at a time
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(content), formats=RASTER_FORMATS)
        image.getexif()
        return image


def open_image(path: str | Path, *, argument: str = "image") -> Image.Image:
    """The image in one file; `argument` is what messages call it.

    Raises:
        DataError: `path` is missing, a folder, or not readable.
        BadImageError: the file is not an image that `decode_image` takes.
    """
    key = printable(str(path))
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError as err:
        raise DataError(f"`{argument}` must be an image file, {key} does not exist; check the path.") from err
    except IsADirectoryError as err:
        raise DataError(f"`{argument}` must be an image file, {key} is a folder; name a file in it.") from err
    except (OSError, ValueError) as err:
        raise DataError(f"`{argument}` must be an image file, {key} cannot be read ({reason(err)}).") from err
    return decode_image(content, key)


def printable(name: str) -> str:
    """The name with line breaks and other control characters escaped, so that it fits in a one-line message."""
    return name if name.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def reason(err: BaseException) -> str:
    """The message of a foreign error as one short line."""
    return textwrap.shorten(printable(" ".join(str(err).split())) or type(err).__name__, 300)
