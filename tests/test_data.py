"""`carv_attrib.data`: images to pixels, files to images, sources to examples."""

import gc
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from carv_attrib.data import (
    RESIZE_RULE,
    PixelSpec,
    decode_image,
    from_pixels,
    open_dataset,
    open_image,
    thumbnail,
    to_pixels,
)
from carv_attrib.errors import ArgumentError, BadImageError, DataError

RGB8 = PixelSpec(8, 8, 3)
GREY8 = PixelSpec(8, 8, 1)


@pytest.fixture(autouse=True)
def hub_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def solid(colour, mode="RGB", size=(8, 8)):
    return Image.new(mode, size, colour)


def encode(image, kind="PNG", **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def noise(width, height, channels=3):
    shape = (height, width, channels) if channels == 3 else (height, width)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def huge_png(side=20_000):
    """The header of a grey PNG of side x side, with no pixels to decode."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def image_folder(root, names):
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(solid((number, 0, 0))))
    return root


def red(example):
    return example.image.convert("RGB").getpixel((0, 0))[0]


def keys(dataset):
    return [dataset.key(row) for row in range(len(dataset))]


def in_memory(**columns):
    return datasets.Dataset.from_dict(columns)


def with_images(num_rows=2, features=None, **columns):
    images = [{"bytes": encode(solid((row, 0, 0))), "path": None} for row in range(num_rows)]
    dataset = datasets.Dataset.from_dict({"image": images, **columns})
    return dataset.cast(datasets.Features({**dataset.features, "image": datasets.Image(), **(features or {})}))


def one_line(caught):
    return "\n" not in str(caught.value)


# Pixels


@pytest.mark.parametrize(("height", "width", "channels", "rule"), [(0, 8, 3, "`height`"), (8, -1, 3, "`width`")])
def test_pixel_spec_refuses_empty_sizes(height, width, channels, rule):
    with pytest.raises(ArgumentError, match=rf"{rule} must be at least 1 pixel, got "):
        PixelSpec(height, width, channels)


def test_pixel_spec_refuses_two_channels():
    with pytest.raises(ArgumentError, match=r"`channels` must be 1 \(grey\) or 3 \(RGB\), got 2\."):
        PixelSpec(8, 8, 2)


def test_resize_rule_is_one_line():
    assert RESIZE_RULE
    assert "\n" not in RESIZE_RULE


def test_pixels_span_minus_one_to_one():
    image = Image.fromarray(np.array([[0, 255]], dtype=np.uint8))
    pixels = to_pixels(image, PixelSpec(1, 2, 1))
    assert pixels.dtype == torch.float32
    assert pixels.tolist() == [[[-1.0, 1.0]]]


@pytest.mark.parametrize(
    ("size", "spec"), [((90, 41), (16, 16)), ((41, 90), (16, 16)), ((33, 77), (20, 12)), ((5, 7), (32, 32))]
)
def test_pixels_equal_resize_then_centre_crop(size, spec):
    image, (height, width) = noise(*size), spec
    scale = max(height / image.height, width / image.width)
    covered = (max(width, int(image.width * scale + 1e-9)), max(height, int(image.height * scale + 1e-9)))
    left, top = round((covered[0] - width) / 2), round((covered[1] - height) / 2)
    resized = image.resize(covered, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
    pixels = to_pixels(image, PixelSpec(height, width, 3))
    reference = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 127.5 - 1
    assert pixels.shape == (3, height, width)
    assert (pixels - reference).abs().max() <= 1.01 / 127.5


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1)])
def test_extreme_aspect_ratio(size):
    assert to_pixels(solid(7, "L", size), PixelSpec(512, 512, 3)).shape == (3, 512, 512)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (3, 500)])
def test_solid_colour_is_kept(size):
    assert torch.equal(to_pixels(solid((0, 255, 0), size=size), RGB8)[:, 3, 3], torch.tensor([-1.0, 1.0, -1.0]))


def test_exif_rotation_is_applied():
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[274] = 6  # the left of the file is the top of the picture
    image = decode_image(encode(Image.fromarray(pixels), "JPEG", exif=exif), "a.jpg")
    rotated = to_pixels(image, PixelSpec(16, 8, 1))
    assert rotated[0, 0].mean() > 0.9
    assert rotated[0, -1].mean() < -0.9


def test_damaged_exif_is_no_reason_to_fail():
    exif = Image.Exif()
    exif[274] = 6
    image = decode_image(encode(solid((255, 0, 0)), exif=exif.tobytes()[:20]), "a.png")
    assert to_pixels(image, RGB8).shape == (3, 8, 8)


def test_16_bit_png_is_scaled():
    grey = np.full((8, 8), 32768, dtype=np.uint16)
    pixels = to_pixels(decode_image(encode(Image.fromarray(grey)), "a.png"), GREY8)
    assert pixels.mean().item() == pytest.approx(0, abs=0.01)


def test_32_bit_grey_of_16_bit_range_is_scaled():
    grey = Image.fromarray(np.full((8, 8), 65535, dtype=np.int32))
    assert to_pixels(grey, GREY8).mean() == 1
    assert to_pixels(Image.fromarray(np.full((8, 8), 128 * 257, dtype=np.int32)), RGB8).mean().abs() < 0.01


def test_32_bit_grey_beyond_16_bits_is_refused():
    content = encode(Image.fromarray(np.full((8, 8), 70_000, dtype=np.int32)), "TIFF")
    with pytest.raises(BadImageError, match=r"a\.tif: grey values must be in \[0, 65535\], got \[70000, 70000\]"):
        decode_image(content, "a.tif")


def test_float_tiff_is_refused():
    with pytest.raises(BadImageError, match=r"a\.tif: pixels of PIL mode F are not read; save it as"):
        decode_image(encode(Image.fromarray(np.zeros((8, 8), dtype=np.float32)), "TIFF"), "a.tif")


def test_float_image_in_memory_is_refused():
    with pytest.raises(BadImageError, match="the image: pixels of PIL mode F are not read"):
        to_pixels(solid(0.5, "F"), RGB8)


@pytest.mark.parametrize("channels", [1, 3])
def test_palette_with_transparency_warns_of_nothing(channels):
    image = solid(0, "P")
    image.putpalette([255, 0, 0, 0, 255, 0])
    content = encode(image, transparency=b"\x80\x40")
    pixels = to_pixels(decode_image(content, "a.png"), PixelSpec(8, 8, channels))
    expected = [1.0, -1.0, -1.0] if channels == 3 else [76 / 127.5 - 1]
    assert pixels[:, 0, 0].tolist() == pytest.approx(expected)


def test_alpha_is_dropped_as_diffusers_does():
    assert to_pixels(decode_image(encode(solid((255, 0, 0, 0), "RGBA")), "a"), RGB8)[:, 0, 0].tolist() == [1, -1, -1]


def test_grey_alpha_is_dropped():
    assert to_pixels(decode_image(encode(solid((255, 0), "LA")), "a"), RGB8).min() == 1


def test_cmyk_jpeg():
    image = decode_image(encode(solid((0, 255, 255, 0), "CMYK"), "JPEG", quality=100), "a.jpg")
    assert image.mode == "CMYK"
    assert to_pixels(image, RGB8)[:, 0, 0].tolist() == pytest.approx([1, -1, -1], abs=0.05)


def test_one_bit_image():
    assert to_pixels(decode_image(encode(solid(1, "1")), "a"), RGB8).min() == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_from_pixels_inverts_to_pixels(channels):
    image = noise(8, 8, channels)
    spec = PixelSpec(8, 8, channels)
    assert np.array_equal(np.asarray(from_pixels(to_pixels(image, spec))), np.asarray(image))


def test_from_pixels_clamps():
    pixels = torch.tensor([[[-7.0, 7.0]]])
    assert list(np.asarray(from_pixels(pixels)).ravel()) == [0, 255]


def test_from_pixels_refuses_a_batch():
    with pytest.raises(ArgumentError, match=r"`pixels` must be \(1 or 3, height, width\), got \(2, 3, 8, 8\)"):
        from_pixels(torch.zeros(2, 3, 8, 8))


def test_small_thumbnail_is_the_exact_png():
    pixels = to_pixels(noise(64, 64), PixelSpec(64, 64, 3))
    image = Image.open(io.BytesIO(thumbnail(pixels)))
    assert image.format == "PNG"
    assert torch.equal(to_pixels(image, PixelSpec(64, 64, 3)), pixels)


def test_large_thumbnail_is_a_jpeg_of_128():
    image = Image.open(io.BytesIO(thumbnail(torch.zeros(1, 100, 256))))
    assert (image.format, image.size, image.mode) == ("JPEG", (128, 50), "L")


# Files


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_raster_formats_are_read(kind):
    assert decode_image(encode(solid((9, 9, 9)), kind), "a").size == (8, 8)


def test_first_frame_of_an_animation():
    frames = [solid((255, 0, 0)), solid((0, 0, 255))]
    content = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(content, "a.gif").convert("RGB").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "content",
    [b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"],
    ids=["text", "svg", "eps"],
)
def test_what_is_no_raster_image_is_refused(content):
    with pytest.raises(BadImageError, match=r"^a\.png: not an image of a known format \(AVIF, BMP, .*WEBP\)\.$"):
        decode_image(content, "a.png")


def test_empty_file_is_refused():
    with pytest.raises(BadImageError, match=r"^a\.png: the file is empty \(0 bytes\); replace or remove it\.$"):
        decode_image(b"", "a.png")


def test_truncated_jpeg_is_refused():
    content = encode(noise(64, 64), "JPEG")
    with pytest.raises(BadImageError, match=r"^a\.jpg: the image is damaged \(image file is truncated.*\); replace"):
        decode_image(content[: len(content) // 2], "a.jpg")


@pytest.mark.parametrize("side", [10_000, 20_000], ids=["PIL warns", "PIL raises"])
def test_decompression_bomb_is_refused_before_decoding(side):
    with pytest.raises(BadImageError, match=r"^a\.png: the image has more than 89478485 pixels \(`PIL.Image.MAX_IM"):
        decode_image(huge_png(side), "a.png")


def test_decoding_leaves_the_warning_filters_alone():
    before = list(warnings.filters)
    decode_image(encode(solid(0)), "a.png")
    assert warnings.filters == before


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_damaged_files_raise_nothing_else(kind):
    content, random = encode(noise(24, 24), kind), np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(content[: random.integers(8, len(content) + 1)])
        for place in random.integers(0, len(damaged), 5):
            damaged[place] = random.integers(256)
        with suppress(BadImageError):
            to_pixels(decode_image(bytes(damaged), "a"), RGB8)


def test_open_image(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(solid((5, 0, 0))))
    assert open_image(str(tmp_path / "a.png")).getpixel((0, 0)) == (5, 0, 0)


def test_open_image_that_is_missing(tmp_path):
    with pytest.raises(DataError, match=r"`image` must be an image file, .*a\.png does not exist; check the path"):
        open_image(tmp_path / "a.png")


def test_open_image_under_the_name_of_its_argument(tmp_path):
    with pytest.raises(DataError, match=r"`mask` must be an image file, .*a\.png does not exist; check the path"):
        open_image(tmp_path / "a.png", argument="mask")


def test_open_image_that_is_a_folder(tmp_path):
    with pytest.raises(DataError, match=r"`image` must be an image file, .* is a folder; name a file in it"):
        open_image(tmp_path)


def test_open_image_names_the_damaged_file(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(BadImageError, match=r"a\.png: not an image"):
        open_image(tmp_path / "a.png")


# Sources


def test_digits():
    dataset = open_dataset("digits")
    example = dataset.load(17)
    assert (len(dataset), dataset.source, example.key, example.id) == (1797, "digits", "digit 17", 17)
    assert dataset.label_names == tuple("0123456789")
    assert (example.label, example.image.size, example.image.mode) == (7, (8, 8), "L")
    assert np.asarray(dataset.load(0).image)[0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert (dataset.has_labels, dataset.has_captions, example.caption) == (True, False, None)


def test_digits_without_sklearn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        DataError, match=r"digits needs scikit-learn, which is not installed; `pip install scikit-learn`"
    ):
        open_dataset("digits")


def test_image_folder(tmp_path):
    dataset = open_dataset(image_folder(tmp_path, ["b.png", "a.png", "c d/e.png"]))
    assert keys(dataset) == ["a.png", "b.png", "c d/e.png"]
    assert [red(dataset.load(row)) for row in range(3)] == [1, 0, 2]
    assert dataset.columns == {"image": "image", "label": None, "caption": None, "id": None}
    assert dataset.source == str(tmp_path)
    assert dataset.ids.dtype == np.int64


def test_sub_folders_are_labels(tmp_path):
    dataset = open_dataset(image_folder(tmp_path, ["cat/1.png", "dog/1.png", "dog/2.png"]))
    assert dataset.label_names == ("cat", "dog")
    assert [dataset.load(row).label for row in range(3)] == [0, 1, 1]
    assert dataset.key(2) == "dog/2.png"


def test_words_for_splits_in_names_lose_no_image(tmp_path):
    dataset = open_dataset(image_folder(tmp_path, ["bus/1.png", "bus/my_test.png", "train/1.png"]))
    assert keys(dataset) == ["bus/1.png", "bus/my_test.png", "train/1.png"]
    assert dataset.label_names == ("bus", "train")


def test_split_folders_are_splits(tmp_path):
    image_folder(tmp_path, ["train/1.png", "test/2.png"])
    train, test = open_dataset(tmp_path), open_dataset(tmp_path, split="test")
    assert (keys(train), keys(test)) == (["train/1.png"], ["test/2.png"])
    assert not train.has_labels
    assert not test.has_labels


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # datasets leaves its CSV file to the garbage collector
def test_metadata_csv_gives_captions(tmp_path):
    image_folder(tmp_path, ["1.png", "2.png"])
    (tmp_path / "metadata.csv").write_text("file_name,text,year\n2.png,a red car,1990\n1.png,,1991\n")
    dataset = open_dataset(tmp_path)
    assert [(example.key, example.caption) for example in map(dataset.load, range(2))] == [
        ("2.png", "a red car"),
        ("1.png", ""),
    ]
    assert dataset.columns["caption"] == "text"
    assert not dataset.has_labels
    gc.collect()


def test_metadata_jsonl_with_several_captions_takes_the_first(tmp_path):
    image_folder(tmp_path, ["1.png", "2.png"])
    lines = [
        {"file_name": "1.png", "prompt": ["one", "two"], "label": 4},
        {"file_name": "2.png", "prompt": [], "label": 5},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    dataset = open_dataset(tmp_path)
    assert [(dataset.load(row).caption, dataset.load(row).label) for row in range(2)] == [("one", 4), ("", 5)]
    assert dataset.label_names is None


def test_metadata_with_a_missing_file_fails_only_there(tmp_path):
    image_folder(tmp_path, ["1.png"])
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png"}\n{"file_name": "gone.png"}\n')
    dataset = open_dataset(tmp_path)
    assert dataset.load(0).key == "1.png"
    with pytest.raises(BadImageError, match=r"^gone\.png: the file is missing; restore it or remove its row\.$"):
        dataset.load(1)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # as above
def test_pictures_without_metadata_are_counted(tmp_path, caplog):
    image_folder(tmp_path, ["1.png", "2.png", ".3.png", ".thumbnails/1.png", "__MACOSX/1.png"])
    (tmp_path / "metadata.csv").write_text("file_name,label\n1.png,0\n")
    assert len(open_dataset(tmp_path)) == 1
    assert "1 of 2 pictures in" in caplog.text
    (tmp_path / "metadata.csv").write_text("file_name,label\n1.png,0\n2.png,\n")
    with pytest.raises(ArgumentError, match="column label is of type float64; fill empty cells, or name another"):
        open_dataset(tmp_path, label_column="label")
    gc.collect()


def test_metadata_without_file_names(tmp_path):
    image_folder(tmp_path, ["1.png"])
    (tmp_path / "metadata.jsonl").write_text('{"file": "1.png"}\n')
    with pytest.raises(
        DataError, match=r"`dataset` cannot be read from the folder .*`file_name`.* must be present"
    ) as caught:
        open_dataset(tmp_path)
    assert one_line(caught)


def test_metadata_that_leaves_the_folder(tmp_path):
    image_folder(tmp_path, ["in/1.png", "out.png"])
    (tmp_path / "in" / "metadata.jsonl").write_text('{"file_name": "../out.png"}\n')
    with pytest.raises(DataError, match=r"cannot be read from the folder .*Invalid metadata file_name '\.\./out\.png'"):
        open_dataset(tmp_path / "in")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.png", b"hello", "not an image of a known format"),
        ("b.jpg", encode(noise(64, 64), "JPEG")[:900], "the image is damaged"),
        ("b.png", huge_png(), "the image has more than 89478485 pixels"),
        ("b.png", b"", "the file is empty"),
    ],
    ids=["text", "truncated", "huge", "empty"],
)
def test_bad_image_in_a_folder_fails_only_when_loaded(tmp_path, name, content, message):
    image_folder(tmp_path, ["a.png", "c.png"])
    (tmp_path / name).write_bytes(content)
    dataset = open_dataset(tmp_path)
    assert [dataset.load(row).key for row in (0, 2)] == ["a.png", "c.png"]
    with pytest.raises(BadImageError, match=f"^{name}: {message}"):
        dataset.load(1)


def test_link_that_leaves_the_folder_is_refused(tmp_path):
    folder = image_folder(tmp_path / "in", ["a.png"])
    (tmp_path / "secret.png").write_bytes(encode(solid(0)))
    (folder / "b.png").symlink_to(tmp_path / "secret.png")
    (folder / "c.png").symlink_to(folder / "a.png")
    dataset = open_dataset(folder)
    assert red(dataset.load(2)) == red(dataset.load(0))
    with pytest.raises(BadImageError, match=r"^b\.png: a link that leads out of the folder; copy the file into it\.$"):
        dataset.load(1)


def test_folder_behind_a_link(tmp_path):
    image_folder(tmp_path / "in", ["a.png"])
    (tmp_path / "link").symlink_to(tmp_path / "in")
    assert open_dataset(tmp_path / "link").load(0).key == "a.png"


def test_names_with_line_breaks_are_escaped(tmp_path):
    image_folder(tmp_path, ["é.png"])
    (tmp_path / "a\nb.png").write_text("hello")
    dataset = open_dataset(tmp_path)
    assert keys(dataset) == ["a\\nb.png", "é.png"]
    with pytest.raises(BadImageError, match=r"^a\\nb\.png: not an image"):
        dataset.load(0)


def test_folder_with_glob_characters(tmp_path):
    assert keys(open_dataset(image_folder(tmp_path / "x[1] *?", ["a[2].png"]))) == ["a[2].png"]


def test_relative_folder(tmp_path, monkeypatch):
    image_folder(tmp_path / "in", ["a.png"])
    monkeypatch.chdir(tmp_path)
    dataset = open_dataset("in/../in")
    assert (dataset.key(0), dataset.load(0).id) == ("a.png", 0)
    monkeypatch.chdir(tmp_path / "in")
    assert open_dataset(dataset.source).fingerprint == dataset.fingerprint  # an index is asked from anywhere


def test_zip_in_a_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("a.png", encode(solid((3, 0, 0))))
        archive.writestr("b.png", b"hello")
    dataset = open_dataset(tmp_path)
    assert (dataset.key(0), red(dataset.load(0))) == ("z.zip/a.png", 3)
    with pytest.raises(BadImageError, match=r"^z\.zip/b\.png: not an image"):
        dataset.load(1)


@pytest.mark.parametrize("names", [[], ["notes.txt", "drawing.svg"]])
def test_folder_without_images(tmp_path, names):
    image_folder(tmp_path, names)
    with pytest.raises(DataError, match=r"`dataset` must hold images, the folder .* has none; give a folder of"):
        open_dataset(tmp_path)


def test_saved_dataset(tmp_path):
    with_images(label=[3, 4]).save_to_disk(tmp_path / "saved")
    dataset = open_dataset(tmp_path / "saved")
    assert [(red(dataset.load(row)), dataset.load(row).label) for row in range(2)] == [(0, 3), (1, 4)]
    assert keys(dataset) == ["row 0", "row 1"]


def test_saved_dataset_dict_takes_the_split(tmp_path):
    datasets.DatasetDict({"train": with_images(2), "val": with_images(3)}).save_to_disk(tmp_path / "saved")
    assert (len(open_dataset(tmp_path / "saved")), len(open_dataset(tmp_path / "saved", split="val"))) == (2, 3)


def test_damaged_saved_dataset(tmp_path):
    with_images().save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "saved").glob("*.arrow"):
        path.write_bytes(b"hello")
    with pytest.raises(DataError, match=r"`dataset` cannot be read from .*saved: ") as caught:
        open_dataset(tmp_path / "saved")
    assert one_line(caught)


def test_parquet_with_image_feature(tmp_path):
    with_images(caption=["x", None]).to_parquet(tmp_path / "a.parquet")
    dataset = open_dataset(tmp_path / "a.parquet")
    assert [(red(dataset.load(row)), dataset.load(row).caption) for row in range(2)] == [(0, "x"), (1, "")]


def test_parquet_with_plain_bytes(tmp_path):
    pq.write_table(pa.table({"jpg": [encode(solid((6, 0, 0)))], "cls": [1]}), tmp_path / "a.parquet")
    dataset = open_dataset(tmp_path / "a.parquet", label_column="cls")
    assert (red(dataset.load(0)), dataset.key(0), dataset.load(0).label) == (6, "row 0", 1)


def test_parquet_with_bytes_and_path(tmp_path):
    pq.write_table(pa.table({"x": [{"bytes": encode(solid((6, 0, 0))), "path": "n.png"}]}), tmp_path / "a.parquet")
    dataset = open_dataset(tmp_path / "a.parquet")
    assert (red(dataset.load(0)), dataset.key(0)) == (6, "n.png")


def test_parquet_without_images(tmp_path):
    pq.write_table(pa.table({"text": ["x"], "size": [1]}), tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"must have a column of images, the columns are text \(text\), size \(integer\)"
    ):
        open_dataset(tmp_path / "a.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1 hello", encode(noise(8, 8))])
def test_damaged_parquet(tmp_path, content, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)  # it would log the damage before it raises
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"`dataset` cannot be read from .*a\.parquet: Parquet (magic|file)") as caught:
        open_dataset(tmp_path / "a.parquet")
    assert one_line(caught)


def test_file_of_another_type(tmp_path):
    (tmp_path / "a.csv").write_text("x\n1\n")
    with pytest.raises(DataError, match=r"must be a \.parquet file if it is a file, got .*a\.csv; give a folder"):
        open_dataset(tmp_path / "a.csv")


def test_parquet_with_damaged_text(tmp_path):
    captions = pa.array([b"\x80"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"x": [encode(solid((6, 0, 0)))], "caption": captions}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="`dataset` cannot be read: column caption is damaged .*'utf-8' codec"):
        open_dataset(tmp_path / "a.parquet")


def test_parquet_with_damaged_features(tmp_path):
    about = {"huggingface": json.dumps({"info": {"features": {"x": ["binary"]}}})}
    table = pa.table({"x": [encode(solid((6, 0, 0)))]}).replace_schema_metadata(about)
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="`dataset` cannot be read from"):
        open_dataset(tmp_path / "a.parquet")


@pytest.mark.parametrize("source", ["/no/such/folder", "./missing", "missing.parquet", "a b", "x/y/z"])
def test_missing_path(source):
    with pytest.raises(
        DataError, match=rf"`dataset` must exist, {source} does not; give a folder of images, a `save_t"
    ):
        open_dataset(source)


@pytest.mark.parametrize(("source", "got"), [("", "an empty text"), ([1], "a list"), (None, "a NoneType")])
def test_source_of_another_type(source, got):
    with pytest.raises(ArgumentError, match=rf"`dataset` must be a path, a name or .*, got {got}; give a folder of"):
        open_dataset(source)


def test_hub_id_while_offline(monkeypatch):
    def refuse(name):
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub\n(offline)")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        DataError, match=r"from owner/name \(no such path here, so taken as a hub id\): Couldn't reach 'ow"
    ) as caught:
        open_dataset("owner/name")
    assert one_line(caught)


def test_unknown_split_lists_those_there_are(tmp_path):
    image_folder(tmp_path, ["train/1.png", "val/2.png"])
    with pytest.raises(ArgumentError, match=r"`split` must be one of train, val, got test\."):
        open_dataset(tmp_path, split="test")


def test_no_rows():
    with pytest.raises(DataError, match="`dataset` must hold at least one row, in-memory dataset has none"):
        open_dataset(with_images(2).select([]))


def test_in_memory_pil_images():
    images = [solid((row, 0, 0)) for row in range(3)]
    rows = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    dataset = open_dataset(rows)
    assert [red(dataset.load(row)) for row in range(3)] == [0, 1, 2]
    assert dataset.source == "in-memory dataset"


def test_transform_of_the_rows_is_not_run():
    rows = with_images(2).with_transform(lambda batch: {"image": [None] * len(batch["image"])})
    assert red(open_dataset(rows).load(1)) == 1


def test_rows_that_were_selected_and_formatted():
    rows = with_images(5, label=[0, 1, 2, 3, 4]).select([4, 1]).with_format("torch")
    dataset = open_dataset(rows)
    assert [(red(dataset.load(row)), dataset.load(row).label) for row in range(2)] == [(4, 4), (1, 1)]


def test_in_memory_split_is_the_one_there_is():
    rows = with_images(2)
    rows = datasets.Dataset(rows.data, rows.info, datasets.Split.TEST)
    assert len(open_dataset(rows)) == len(open_dataset(rows, split="test")) == 2
    with pytest.raises(ArgumentError, match="`split` must be one of train, test, got val"):
        open_dataset(rows, split="val")


def test_row_without_an_image():
    cells = [{"bytes": encode(solid(0)), "path": None}, None]
    rows = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": datasets.Image()}))
    dataset = open_dataset(rows)
    with pytest.raises(BadImageError, match=r"^row 1: the row has no image \(neither bytes nor a path\)"):
        dataset.load(1)


# Columns


def test_several_images_with_one_named_image():
    rows = with_images().add_column("mask", [b"x", b"y"]).cast_column("mask", datasets.Image())
    assert open_dataset(rows).columns["image"] == "image"


def test_several_images_without_a_clear_name():
    rows = with_images().rename_column("image", "front")
    rows = rows.add_column("back", [b"x", b"y"]).cast_column("back", datasets.Image())
    message = r"`image_column` must be given .*\(front, back\), got none; choose one, such as `--image-column front`"
    with pytest.raises(ArgumentError, match=message):
        open_dataset(rows)
    assert open_dataset(rows, image_column="back").columns["image"] == "back"


@pytest.mark.parametrize("role", ["image", "label", "caption", "id"])
def test_given_column_must_exist(role):
    with pytest.raises(ArgumentError, match=rf"`{role}_column` must be one of image, n, got nope\."):
        open_dataset(with_images(n=[1, 2]), **{f"{role}_column": "nope"})


@pytest.mark.parametrize(
    ("role", "types", "way_out"),
    [
        ("image", "image, bytes", "name another"),
        ("label", "class, integer", "fill empty cells, or name another"),
        ("caption", "text", "name another"),
    ],
)
def test_given_column_must_have_the_type(role, types, way_out):
    message = rf"`{role}_column` must hold one of the types {types}, column n is of type float64; {way_out}\."
    with pytest.raises(ArgumentError, match=message):
        open_dataset(with_images(n=[1.5, 2.5]), **{f"{role}_column": "n"})


def test_class_label_is_found_under_any_name():
    rows = with_images(2, {"digit": datasets.ClassLabel(names=["zero", "one"])}, digit=[1, 0], label=[5, 6])
    dataset = open_dataset(rows)
    assert (dataset.columns["label"], dataset.label_names, dataset.load(0).label) == ("digit", ("zero", "one"), 1)


def test_integers_are_labels_only_by_name():
    assert open_dataset(with_images(width=[1, 2])).columns["label"] is None
    assert open_dataset(with_images(Target=[1, 2])).columns["label"] == "Target"


def test_two_kinds_of_classes_must_be_chosen():
    classes = datasets.ClassLabel(names=["a", "b"])
    rows = with_images(2, {"fine": classes, "coarse": classes}, fine=[0, 1], coarse=[1, 0])
    with pytest.raises(ArgumentError, match=r"`label_column` must be given .*\(fine, coarse\).*`--label-column fine`"):
        open_dataset(rows)


def test_missing_labels_are_none():
    rows = with_images(3, {"label": datasets.ClassLabel(names=["a", "b"])}, label=[1, None, -1])
    assert [open_dataset(rows).load(row).label for row in range(3)] == [1, None, None]


def test_column_without_any_label_is_no_label_column():
    dataset = open_dataset(with_images(2, {"label": datasets.ClassLabel(names=["a"])}, label=[-1, -1]))
    assert (dataset.has_labels, dataset.columns["label"], dataset.label_names) == (False, None, None)


def test_captions_are_found_by_name_only():
    dataset = open_dataset(with_images(author=["x", "y"], prompt=["p", "q"]))
    assert (dataset.columns["caption"], dataset.load(1).caption) == ("prompt", "q")


def test_ids_are_taken_only_when_asked():
    rows = with_images(id=[70, 50])
    assert open_dataset(rows).ids.tolist() == [0, 1]
    dataset = open_dataset(rows, id_column="id")
    assert (dataset.ids.tolist(), dataset.load(1).id) == ([70, 50], 50)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([3, 3], "must be unique, column id repeats 3"),
        (["a", "b"], "must hold an integer in every row, column id does not"),
        ([1, None], "must hold an integer in every row, column id does not"),
        ([1, 2**63], f"must hold int64 integers, column id has {2**63}"),
    ],
)
def test_ids_must_be_unique_integers(values, message):
    rows = with_images(
        2,
        {"id": datasets.Value("uint64")} if values[1] == 2**63 else None,
        id=np.array(values).tolist() if values[1] == 2**63 else values,
    )
    with pytest.raises(DataError, match=rf"`id_column` {message}"):
        open_dataset(rows, id_column="id")


# Costs and promises


def test_opening_reads_no_image(tmp_path, monkeypatch):
    image_folder(tmp_path, ["a.png", "b.png"])

    def refuse(*_):
        raise AssertionError("an image was read")

    monkeypatch.setattr(Image, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert len(open_dataset(tmp_path)) == 2


def test_progress_bars_are_as_before(tmp_path, capfd):
    image_folder(tmp_path, ["a.png"])
    datasets.enable_progress_bars()
    open_dataset(tmp_path)
    assert not datasets.are_progress_bars_disabled()
    assert capfd.readouterr() == ("", "")


def test_fingerprint_is_the_same_elsewhere(tmp_path):
    folder = image_folder(tmp_path / "one", ["cat/1.png", "dog/2.png"])
    (folder / "dog" / "bad.png").symlink_to("/etc/hostname")
    shutil.copytree(folder, tmp_path / "two", symlinks=True)
    two = str(tmp_path / "two")
    code = f"import sys, carv_attrib.data as data; sys.stdout.write(data.open_dataset({two!r}).fingerprint)"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout == open_dataset(folder).fingerprint
    assert len(run.stdout) == 64


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.select([0, 1, 2]),
        lambda rows: rows.select([1, 0, 2, 3]),
        lambda rows: rows.remove_columns("label").add_column("label", [0, 1, 2, 9]),
        lambda rows: rows.remove_columns("caption").add_column("caption", ["a", "b", "c", "X"]),
        lambda rows: rows.map(
            lambda row: {"image": row["image"].rotate(90, expand=True, fillcolor="red").resize((9, 9))}
        ),
    ],
    ids=["fewer rows", "order", "label", "caption", "pixels"],
)
def test_fingerprint_sees(change):
    rows = with_images(4, label=[0, 1, 2, 3], caption=["a", "b", "c", "d"])
    assert open_dataset(change(rows)).fingerprint != open_dataset(rows).fingerprint
    assert open_dataset(rows.with_format("numpy")).fingerprint == open_dataset(rows).fingerprint


def test_fingerprint_reads_at_most_64_images(tmp_path, monkeypatch):
    dataset, read, count = open_dataset(image_folder(tmp_path, [f"{n}.png" for n in range(100)])), Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda path: count.append(path) or read(path))
    assert dataset.fingerprint
    assert len(set(count)) == len(count) == 64


def test_import_is_light_and_hub_is_not_needed(tmp_path):
    code = (
        "import sys, carv_attrib.data as data; from carv_attrib.errors import DataError\n"
        "heavy = {'datasets', 'sklearn', 'pandas', 'pyarrow'} & set(sys.modules)\n"
        "sys.stdout.write(f'{sorted(heavy)} ')\n"
        "try: data.open_dataset('nobody/nothing')\n"
        "except DataError as err: sys.stdout.write(str(err))\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.startswith("[] `dataset` cannot be read from nobody/nothing (no such path here")
    assert "Couldn't reach 'nobody/nothing' on the Hub" in run.stdout
    assert run.stderr == ""
