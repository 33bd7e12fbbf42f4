"""Every odd image is handled, or refused by name; its size is known from its header."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from verl.data.images import FORMATS, MAX_PIXELS, image_size, open_image


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def noise(width: int = 40, height: int = 24, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def pixel(image: Image.Image | bytes) -> tuple[int, ...]:
    return open_image(image, None).getpixel((0, 0))


def test_bytes_paths_base64_and_pictures_are_the_same_picture(tmp_path):
    data = encoded(noise())
    (tmp_path / "a.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    wrapped = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    ways = [
        data,
        bytearray(data),
        {"bytes": data, "path": None},
        {"bytes": None, "path": "a.png"},
        {"bytes": text},
        "a.png",
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        text,
        wrapped,
        f"data:image/png;base64,{text}",
        noise(),
    ]
    for way in ways:
        assert np.array_equal(np.array(open_image(way, str(tmp_path))), np.array(noise()))
        assert image_size(way, str(tmp_path)) == (40, 24)


def test_a_file_whose_name_could_be_base64_is_a_file(tmp_path):
    name = base64.b64encode(b"BM" + b"\0" * 10).decode()
    (tmp_path / name).write_bytes(encoded(noise()))
    assert open_image(name, str(tmp_path)).size == (40, 24)
    with pytest.raises(FileNotFoundError, match="no image file 'images/cat0'.*not base64 of an image"):
        open_image("images/cat0", None)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_and_its_size_alike(format, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(noise(), format, exif=exif)
    picture = open_image(data, None)
    assert image_size(data, None) == picture.size == ((24, 40) if orientation > 4 else (40, 24))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(np.array(picture), np.array(expected))
    assert not picture.info


def test_broken_exif_leaves_a_whole_picture_as_it_is():
    data = encoded(noise(), "JPEG", exif=b"Exif\0\0garbage")
    assert open_image(data, None).size == image_size(data, None) == (40, 24)


def test_transparent_is_white_whatever_colour_lies_below():
    assert pixel(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))) == (255, 255, 255)
    assert pixel(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 255)))) == (0, 0, 0)
    assert pixel(encoded(Image.new("LA", (4, 4), (0, 128)))) == (127, 127, 127)
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([0, 0, 0] * 4)
    assert pixel(encoded(palette)) == (0, 0, 0)
    assert pixel(encoded(palette, transparency=3)) == (255, 255, 255)
    assert pixel(encoded(Image.new("RGB", (4, 4), (9, 8, 7)), transparency=(9, 8, 7))) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr"])
def test_every_colour_mode_becomes_rgb(mode):
    data = encoded(noise(mode=mode), "TIFF" if mode != "CMYK" else "JPEG")
    assert open_image(data, None).mode == "RGB"


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bits_are_scaled_and_not_clipped(format):
    values = np.array([[0, 257 * 100, 65535, 257 * 7]], dtype=np.uint16)
    picture = open_image(encoded(Image.fromarray(values), format), None)
    assert np.array(picture)[0, :, 0].tolist() == [0, 100, 255, 7]


def test_a_16_bit_ppm_is_scaled():
    assert pixel(b"P5\n2 1\n65535\n" + struct.pack(">HH", 257 * 100, 65535)) == (100, 100, 100)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_known_white_are_refused(mode):
    with pytest.raises(ValueError, match=f"an image of .* cannot be read: .*mode {mode}.*8 or 16 bits"):
        open_image(encoded(Image.new(mode, (4, 4)), "TIFF"), None)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_and_what_is_left_of_a_file_that_was_cut_off(format):
    data = encoded(noise(), format)
    assert open_image(data, None).size == image_size(data, None) == (40, 24)
    with pytest.raises(ValueError, match=r"an image of \d+ bytes cannot be read"):
        open_image(data[: len(data) * 2 // 3], None)


def test_one_pixel_and_a_frame_of_many():
    assert open_image(encoded(noise(1, 1)), None).size == (1, 1)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert pixel(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == (255, 0, 0)


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header says so; its pixels are a few bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b""))
    pieces = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


@pytest.mark.parametrize("size", [(MAX_PIXELS + 1, 1), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_by_its_header(size):
    for look in (open_image, image_size):
        with pytest.raises(ValueError, match=f"pixels; at most {MAX_PIXELS} are decoded|cannot be read"):
            look(bomb(*size), None)
    with pytest.raises(ValueError, match="cannot be read: .*pixels; at most"):
        image_size(bomb(MAX_PIXELS + 1, 1), None)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("https://example.org/a.png", "by its address, 'https://example.org/a.png'.*download the images.*image_dir"),
        ("s3://bucket/a.png", "by its address"),
        ("data:image/png,abc", "of data: URIs only data:...;base64"),
        ("data:image/png;base64,???", "characters that are not base64"),
        ({"url": "x"}, r"a mapping of \['url'\]; one of bytes and path"),
        ({"bytes": b"", "path": ""}, "one of bytes and path must be filled"),
        ({"bytes": "no base64!"}, "10 characters that are not base64"),
        (b"", "an image of 0 bytes cannot be read: it is no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is no image, or none of AVIF, BMP"),
        (7, "an image is given as int"),
        (np.zeros((4, 4, 3)), "an image is given as ndarray"),
        (Image.new("RGB", (0, 4)), "it has 0x4 pixels"),
    ],
)
def test_what_is_no_image_is_named(image, message):
    with pytest.raises(ValueError, match=message):
        open_image(image, None)


@pytest.mark.parametrize("path", ["gone.png", "x" * 5000, "nul\0byte.png", "Qk01_photo.png"])
def test_a_missing_file_is_named(tmp_path, path):
    with pytest.raises(FileNotFoundError, match="no image file .*data.image_dir"):
        open_image(path, str(tmp_path))


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image file"):
        open_image(str(tmp_path), None)
