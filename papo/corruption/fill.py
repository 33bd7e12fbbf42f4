"""Strategies that change every pixel: noise, one colour, or a picture that was made beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from verl.config.algorithm import ViewConfig
from verl.config.option import option
from verl.data.views import image_view

if TYPE_CHECKING:
    from PIL import Image


@dataclass
class GaussianNoiseConfig(ViewConfig):
    """Normal noise of standard deviation `std`, where black is 0 and white 1. The paper calls 0.8 ineffective."""

    kind: str = "gaussian_noise"
    STRENGTH: ClassVar[str] = "std"
    std: float = option(0.6, "standard deviation of the noise; black is 0, white 1", least=0)


@image_view("gaussian_noise", GaussianNoiseConfig)
def gaussian_noise(image: Image.Image, rng: np.random.Generator, config: GaussianNoiseConfig) -> Image.Image:
    """The RGB `image` with noise of its own on every value, clipped to what a picture can hold."""
    from PIL import Image

    pixels = np.array(image) + 255 * config.std * rng.standard_normal((image.height, image.width, 3))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


@dataclass
class BlankConfig(ViewConfig):
    """Nothing but `color`: a name as in CSS, or '#rrggbb' (quoted twice in a shell: "color='#336699'")."""

    kind: str = "blank"
    color: str = option("black", "name as in CSS, or '#rrggbb'")

    def check(self, key: str) -> None:
        from PIL import ImageColor

        try:
            ImageColor.getcolor(self.color, "RGB")
        except ValueError as error:
            raise ValueError(f"{key}.color='{self.color}': a colour's name or '#rrggbb' is needed") from error


@image_view("blank", BlankConfig)
def blank(image: Image.Image, rng: np.random.Generator, config: BlankConfig) -> Image.Image:
    """A picture of the size of `image` in one colour."""
    from PIL import Image, ImageColor

    return Image.new("RGB", image.size, ImageColor.getcolor(config.color, "RGB"))


@dataclass
class PrecomputedConfig(ViewConfig):
    """The masked pictures are in the dataset, in `column`: one for each image of the row, of the same size."""

    kind: str = "precomputed"

    def check(self, key: str) -> None:
        if not self.column:
            raise ValueError(f"{key}.column is not set: it names the dataset column that holds the masked pictures")


@image_view("precomputed", PrecomputedConfig)
def precomputed(image: Image.Image, rng: np.random.Generator, config: PrecomputedConfig) -> Image.Image:
    """The picture from `column`, as it is."""
    return image
