"""One black rectangle."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from papo.corruption.patches import ShareConfig
from verl.data.views import image_view


@dataclass
class BlockConfig(ShareConfig):
    """One rectangle of random shape and place hides `prob` of the area."""

    kind: str = "block"


@image_view("block", BlockConfig)
def block(image: Image.Image, rng: np.random.Generator, config: BlockConfig) -> Image.Image:
    """The RGB `image` with one rectangle black, `prob` of the area to within half a row or column of pixels."""
    if config.prob == 0:
        return image
    pixels = np.array(image)
    # The share of the height lies between prob (then the rectangle is as wide as the picture) and 1.
    height = math.ceil(image.height * config.prob ** rng.random())
    width = round(config.prob * image.height * image.width / height)
    top, left = rng.integers(image.height - height + 1), rng.integers(image.width - width + 1)
    pixels[top : top + height, left : left + width] = 0
    return Image.fromarray(pixels)
