"""Small pictures, for people: what the model sees, and what a view leaves of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from PIL import Image

from verl.config.algorithm import ViewConfig
from verl.data.views import change_images, image_seeds

if TYPE_CHECKING:
    from verl.data.vision import VisionProcessor

logger = logging.getLogger(__name__)

LONGEST_SIDE = 320  # pixels
GAP = 8  # white pixels between two pictures


def views_to_show(views: Mapping[str, ViewConfig]) -> dict[str, ViewConfig]:
    """The views that can be made of a prompt's own pictures; the log names the others."""
    for name, config in views.items():
        if config.column:
            logger.info("view '%s' has no thumbnails: validation rows have no column '%s'", name, config.column)
    return {name: config for name, config in views.items() if not config.column}


def thumbnails(
    uid: str,
    images: Sequence[Image.Image],
    views: Mapping[str, ViewConfig],
    vision: VisionProcessor,
    seed: int,
    epoch: int = 0,
    response: int = 0,
) -> dict[str, Image.Image]:
    """The prompt's RGB `images` side by side as `image`, and likewise under each view; {} for a prompt without any.

    The masks are those that this response of the prompt has in this epoch of a run with this `seed`. By default they
    are the same at each validation.
    """
    if not images:
        return {}
    pictures = {"image": images}
    for name, config in views.items():
        seeds = image_seeds(name, config, len(images), seed, uid, epoch, response)
        pictures[name] = change_images(name, config, list(images), seeds, vision)
    return {name: side_by_side([shrink(image) for image in row]) for name, row in pictures.items()}


def shrink(image: Image.Image) -> Image.Image:
    """A copy whose longer side is at most LONGEST_SIDE."""
    small = image.copy()
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return small


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """RGB pictures in a row on white, GAP pixels apart."""
    width = sum(image.width for image in images) + GAP * (len(images) - 1)
    row = Image.new("RGB", (width, max(image.height for image in images)), "white")
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + GAP
    return row
