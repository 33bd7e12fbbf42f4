"""Patches: squares of an image that are blackened, drawn one by one, as an exact share, as a grid or a block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from verl.config.algorithm import ViewConfig
from verl.config.option import option
from verl.data.views import image_view

if TYPE_CHECKING:  # PIL is imported where a picture is made: a run of scripts/gpu_check.py needs none
    from PIL import Image


@dataclass
class ShareConfig(ViewConfig):
    """A share of the picture is hidden."""

    STRENGTH: ClassVar[str] = "prob"
    prob: float = option(0.6, "share of the picture that is hidden", least=0, most=1)


@dataclass
class PatchConfig(ShareConfig):
    """Squares of `patch_size` pixels are black or untouched."""

    patch_size: int = option(14, "side of a square, pixels", least=1)
    exact: bool = option(False, "black round(prob * squares) of them, not each with probability prob")


def patch_grid(image: Image.Image, patch_size: int) -> tuple[int, int]:
    """(rows, columns) of the squares, counted from the top left corner; those at the far edges may be cut off."""
    return -(-image.height // patch_size), -(-image.width // patch_size)


def lowest(scores: np.ndarray, count: int) -> np.ndarray:
    """True on the `count` smallest of `scores` (any shape); the earlier one where they are equal."""
    chosen = np.zeros(scores.size, dtype=bool)
    chosen[np.argsort(scores, axis=None, kind="stable")[:count]] = True
    return chosen.reshape(scores.shape)


def blacken_patches(image: Image.Image, scores: np.ndarray, config: PatchConfig) -> Image.Image:
    """The RGB `image` with the squares black whose score [rows, columns], spread evenly over 0..1, is below `prob`."""
    black = lowest(scores, round(config.prob * scores.size)) if config.exact else scores < config.prob
    return blacken(
        image, black, np.arange(image.height) // config.patch_size, np.arange(image.width) // config.patch_size
    )


def blacken(image: Image.Image, black: np.ndarray, row_of: np.ndarray, column_of: np.ndarray) -> Image.Image:
    """The RGB `image` with the cells black that are True in `black` [rows, columns].

    Args:
        row_of: [height], the row of `black` that each line of pixels belongs to; `column_of` [width] likewise.
    """
    from PIL import Image

    pixels = np.array(image)
    pixels[black[row_of[:, None], column_of]] = 0
    return Image.fromarray(pixels)


@dataclass
class RandomPatchConfig(PatchConfig):
    """Each `patch_size` x `patch_size` square is blackened with probability `prob`, on its own unless `exact`."""

    kind: str = "random_patch"


@dataclass
class PixelConfig(PatchConfig):
    """Random single pixels are black: the "random" masking of TRL, a weak corruption to compare with."""

    kind: str = "pixel"
    patch_size: int = option(1, "side of a square, pixels", least=1)


@image_view("pixel", PixelConfig)
@image_view("random_patch", RandomPatchConfig)
def random_patch(image: Image.Image, rng: np.random.Generator, config: PatchConfig) -> Image.Image:
    """The RGB `image` with random squares black (arXiv 2507.06448, appendix G), counted from the top left corner.

    Squares at the right and lower edge are cut off where the size is no multiple of `patch_size`.
    """
    return blacken_patches(image, rng.random(patch_grid(image, config.patch_size)), config)


@dataclass
class GridConfig(PatchConfig):
    """Black squares spread as evenly as `prob` allows: a checkerboard at 0.5. Only where it begins is random."""

    kind: str = "grid"


def bayer(steps: int) -> np.ndarray:
    """The ordered-dither matrix [2^steps, 2^steps], 0..1: whatever share lies below a threshold lies evenly spread."""
    matrix = np.zeros((1, 1))
    for _ in range(steps):
        matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
    return (matrix + 0.5) / matrix.size


@image_view("grid", GridConfig)
def grid(image: Image.Image, rng: np.random.Generator, config: GridConfig) -> Image.Image:
    """The RGB `image` with a regular pattern of squares black; their share is `prob` to within 1/64 on large grids."""
    thresholds = bayer(3)
    top, left = rng.integers(8, size=2)
    rows, columns = patch_grid(image, config.patch_size)
    scores = thresholds[(np.arange(rows)[:, None] + top) % 8, (np.arange(columns) + left) % 8]
    return blacken_patches(image, scores, config)


@dataclass
class BlockConfig(ShareConfig):
    """One rectangle of random shape and place hides `prob` of the area."""

    kind: str = "block"


@image_view("block", BlockConfig)
def block(image: Image.Image, rng: np.random.Generator, config: BlockConfig) -> Image.Image:
    """The RGB `image` with one rectangle black, `prob` of the area to within half a row or column of pixels."""
    from PIL import Image

    if config.prob == 0:
        return image
    pixels = np.array(image)
    # The share of the height lies between prob (then the rectangle is as wide as the picture) and 1.
    height = math.ceil(image.height * config.prob ** rng.random())
    width = round(config.prob * image.height * image.width / height)
    top, left = rng.integers(image.height - height + 1), rng.integers(image.width - width + 1)
    pixels[top : top + height, left : left + width] = 0
    return Image.fromarray(pixels)
