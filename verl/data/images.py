"""Pictures as rows hold them, to RGB; everything that cannot be one is refused by name."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# Pillow opens many more, some of which start other programs (EPS) or have no size in their header.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"P5", b"P6")  # AVIF apart
MAX_PIXELS = 89_478_485  # 256 MiB of RGB, the size from which on Pillow speaks of a decompression bomb
Image.init()  # or Image.open would know only the most common of them
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # of these, width and height change places


def open_image(image: Any, image_dir: str | None) -> Image.Image:
    """An RGB picture, upright, from bytes, a {bytes, path} dict, a path, base64 (bare or a data: URI) or a PIL image.

    The EXIF orientation is applied, transparency is put on white, 16-bit values are scaled to 8, of several frames the
    first is taken. Engine, trainer and views all see this picture.

    Raises:
        ValueError, FileNotFoundError: saying which image it is and what is wrong with it: it is none, it is cut off,
            it is given by an address, it has more than MAX_PIXELS, or values of which none is known to be white.
    """
    with _opened(image, image_dir) as opened:
        turn = TURNS.get(_orientation(opened))
        opened.load()
        picture = _rgb(opened)
        picture = picture if turn is None else picture.transpose(turn)
        picture.info = {}  # profiles and thumbnails would travel with every copy
        return picture


def image_size(image: Any, image_dir: str | None) -> tuple[int, int]:
    """(width, height) of what `open_image` makes, from the file's header alone. Raises as `open_image` does."""
    with _opened(image, image_dir) as opened:
        width, height = opened.size
        return (height, width) if _orientation(opened) in SIDEWAYS else (width, height)


@contextmanager
def _opened(image: Any, image_dir: str | None) -> Iterator[Image.Image]:
    """The image with its header read, its pixels perhaps not yet. What goes wrong in the block gets its name."""
    source, name = _source(image, image_dir)
    try:
        with nullcontext(source) if isinstance(source, Image.Image) else Image.open(source, formats=FORMATS) as opened:
            width, height = opened.size
            if not width or not height:
                raise ValueError(f"it has {width}x{height} pixels")
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"it has {width}x{height} pixels")
            yield opened
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} cannot be read: it is no image, or none of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} cannot be read: {error}; at most {MAX_PIXELS} are decoded: make it smaller"
        ) from error
    except Exception as error:  # on a broken file, decoders raise anything from SyntaxError to struct.error
        raise ValueError(f"{name} cannot be read: {error or type(error).__name__}") from error


def _source(image: Any, image_dir: str | None) -> tuple[io.BytesIO | str | Image.Image, str]:
    """(what Pillow opens, how errors call it)."""
    if isinstance(image, dict):
        data, path = image.get("bytes"), image.get("path")
        if not data and not path:
            raise ValueError(f"an image is given as a mapping of {sorted(image)}; one of bytes and path must be filled")
        image = _decoded(data) if isinstance(data, str) and data else data or path
    if isinstance(image, (str, os.PathLike)):
        image = _from_text(os.fspath(image), image_dir)
    if isinstance(image, Image.Image):
        return image, f"an image of {image.width}x{image.height} pixels"
    if isinstance(image, str):
        return image, f"the image file '{image}'"
    if isinstance(image, (bytes, bytearray, memoryview)):
        return io.BytesIO(image), f"an image of {len(image)} bytes"
    raise ValueError(
        f"an image is given as {type(image).__name__}; bytes, a path, base64 or {{bytes, path}} are needed"
    )


def _from_text(text: str, image_dir: str | None) -> bytes | str:
    """The path, or the bytes, that `text` stands for. Only what is no file can be base64."""
    if text.startswith("data:"):
        head, _, body = text.partition(",")
        if not head.endswith(";base64"):
            raise ValueError(f"an image is given as '{text[:60]}'; of data: URIs only data:...;base64,... is read")
        return _decoded(body)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise ValueError(
            f"an image is given by its address, '{text[:200]}', and nothing is fetched during training: download the "
            "images, give paths, and name their folder in data.image_dir"
        )
    path = os.path.join(image_dir or "", text)
    if os.path.isfile(path):
        return path
    try:
        data = _decoded(text)
    except ValueError:
        data = b""
    if data.startswith(SIGNATURES) or data[4:8] == b"ftyp":
        return data
    raise FileNotFoundError(
        f"there is no image file '{path[:500]}' (relative paths are looked up in data.image_dir), and it is not base64 "
        "of an image"
    )


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise ValueError(f"an image is given as {len(text)} characters that are not base64: {error}") from error


def _orientation(opened: Image.Image) -> int:
    """The EXIF orientation, where it stands before the pixels; 1, upright, where it is missing or cannot be read."""
    if opened.format == "TIFF" or (opened.format == "PNG" and "exif" not in opened.info):
        return 1  # Pillow turns TIFF itself; of PNG it would decode all pixels to look behind them
    try:
        return opened.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken metadata of a picture that is whole
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    """RGB before anything else touches pixels: palette indices and 16-bit values are no colours."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        # Pillow would clip all above 255 to white.
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are 32-bit numbers (mode {image.mode}), of which none is known to be white: save it with 8 or "
            "16 bits"
        )
    if not image.has_transparency_data:
        return image.convert("RGB")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas.convert("RGB")
