"""Random patch blackening, the paper's random masking strategy; and the same with single pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from papo.corruption.patches import PatchConfig, blacken_patches, patch_grid
from verl.data.views import image_view


@dataclass
class RandomPatchConfig(PatchConfig):
    """Each `patch_size` x `patch_size` square is blackened with probability `prob`, on its own unless `exact`."""

    kind: str = "random_patch"


@dataclass
class PixelConfig(PatchConfig):
    """Random single pixels are black: the "random" masking of TRL, a weak corruption to compare with."""

    kind: str = "pixel"
    patch_size: int = 1


@image_view("pixel", PixelConfig)
@image_view("random_patch", RandomPatchConfig)
def random_patch(image: Image.Image, rng: np.random.Generator, config: PatchConfig) -> Image.Image:
    """The RGB `image` with random squares black (arXiv 2507.06448, appendix G), counted from the top left corner.

    Squares at the right and lower edge are cut off where the size is no multiple of `patch_size`.
    """
    return blacken_patches(image, rng.random(patch_grid(image, config.patch_size)), config)
