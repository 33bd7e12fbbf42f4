"""Random patch blackening, the paper's random masking strategy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from verl.config.algorithm import ViewConfig
from verl.data.views import image_view


@dataclass
class RandomPatchConfig(ViewConfig):
    """Each `patch_size` x `patch_size` square is blackened with probability `prob`, on its own."""

    kind: str = "random_patch"
    patch_size: int = 14
    prob: float = 0.6

    def check(self, key: str) -> None:
        if self.patch_size < 1:
            raise ValueError(f"{key}.patch_size={self.patch_size}: 1 pixel or more is needed")
        if not 0 <= self.prob <= 1:
            raise ValueError(f"{key}.prob={self.prob}: a probability from 0 to 1 is needed")


@image_view("random_patch", RandomPatchConfig)
def random_patch(image: Image.Image, rng: np.random.Generator, config: RandomPatchConfig) -> Image.Image:
    """The RGB `image` with random squares black (arXiv 2507.06448, appendix G), counted from the top left corner.

    Squares at the right and lower edge are cut off where the size is no multiple of `patch_size`.
    """
    pixels = np.array(image)
    height, width = pixels.shape[:2]
    size = config.patch_size
    black = rng.random((-(-height // size), -(-width // size))) < config.prob
    black = black.repeat(size, axis=0).repeat(size, axis=1)[:height, :width]
    pixels[black] = 0
    return Image.fromarray(pixels)
