"""What the strategies share that blacken parts of a picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from verl.config.algorithm import ViewConfig


@dataclass
class ShareConfig(ViewConfig):
    """`prob` is the share of the picture that is hidden."""

    prob: float = 0.6

    def check(self, key: str) -> None:
        super().check(key)
        if not 0 <= self.prob <= 1:
            raise ValueError(f"{key}.prob={self.prob}: a probability from 0 to 1 is needed")


@dataclass
class PatchConfig(ShareConfig):
    """Squares of `patch_size` pixels are black or untouched; with `exact`, round(prob * squares) of them are black."""

    patch_size: int = 14
    exact: bool = False

    def check(self, key: str) -> None:
        super().check(key)
        if self.patch_size < 1:
            raise ValueError(f"{key}.patch_size={self.patch_size}: 1 pixel or more is needed")


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
    pixels = np.array(image)
    pixels[black[row_of[:, None], column_of]] = 0
    return Image.fromarray(pixels)
