"""Views: another look at the same tokens, under transformed images. verl has the mechanism, plugins the views."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from verl.columns import view_column
from verl.config.algorithm import ViewConfig, ViewPer, ViewStage
from verl.config.store import store_option
from verl.protocol import DataProto
from verl.registry import Registry
from verl.utils.rng import derive_seed

if TYPE_CHECKING:  # a plugin that registers a view should not pay for importing transformers
    from PIL import Image

    from verl.data.vision import VisionProcessor
    from verl.models.families.base import Images

# (RGB image, random generator, options) -> RGB image of the same size
ViewFunction = Callable[["Image.Image", np.random.Generator, Any], "Image.Image"]

VIEWS: Registry[ViewFunction] = Registry("view")
VIEW_CONFIGS: Registry[type[ViewConfig]] = Registry("view")


def image_view(name: str, config: type[ViewConfig]) -> Callable[[ViewFunction], ViewFunction]:
    """Decorator: register a transformation of one RGB image as a kind of view.

    Args:
        config: the dataclass of its options, whose `kind` is `name`; it joins Hydra's group `view`.
    """

    def add(function: ViewFunction) -> ViewFunction:
        store_option("view", name, config)
        VIEW_CONFIGS.register(name)(config)
        return VIEWS.register(name)(function)

    return add


def add_view(
    rows: DataProto,
    view: str,
    config: ViewConfig,
    vision: VisionProcessor,
    seed: int,
    epoch: int,
    num_responses: int = 1,
) -> DataProto:
    """Rows with the columns `<view>_mm_inputs` and `<view>_rows` (False where a prompt has no image).

    The random numbers of an image follow from run seed, view, prompt, epoch, the image's place and, with
    `per: response`, the response's, so a run can be repeated.

    Args:
        rows: prompts, each `num_responses` times side by side; copies share their tensors with `per: prompt`.
    """
    columns: list[Images] = []
    for row, (uid, images, original) in enumerate(zip(rows["uid"], rows["images"], rows["mm_inputs"], strict=True)):
        response = row % num_responses
        if not images:
            columns.append(original)
        elif response and config.per == ViewPer.prompt:
            columns.append(columns[-1])
        else:
            sources = rows["view_images"][row][config.column] if config.column else images
            _check_sizes(view, config, uid, sources, images)
            seeds = image_seeds(view, config, len(images), seed, uid, epoch, response)
            changed = change_images(view, config, sources, seeds, vision)
            # Named after what they are made of, which is cheaper than reading them once more.
            names = [f"{digest}/{view}/{each}" for digest, each in zip(original.digests, seeds, strict=True)]
            columns.append(vision.encode_images(changed, do_resize=config.stage == ViewStage.raw, digests=names))
    covered = torch.tensor([len(inputs) > 0 for inputs in columns])
    return rows.with_columns({view_column(view, "rows"): covered}, {view_column(view, "mm_inputs"): columns})


def image_seeds(view: str, config: ViewConfig, count: int, seed: int, uid: str, epoch: int, response: int) -> list[int]:
    """The seed of each of a prompt's `count` images."""
    copy = (response,) if config.per == ViewPer.response else ()
    return [derive_seed(seed, view, uid, epoch, place, *copy) for place in range(count)]


def change_images(
    view: str, config: ViewConfig, images: list[Image.Image], seeds: list[int], vision: VisionProcessor
) -> list[Image.Image]:
    """The `images` as pictures, each transformed with its seed. Raises ValueError where a size changes."""
    if config.stage == ViewStage.resized:
        images = [vision.resize(image) for image in images]
    changed = [transform(image, config, seed) for image, seed in zip(images, seeds, strict=True)]
    for image, result in zip(images, changed, strict=True):
        if result.size != image.size:
            raise ValueError(
                f"view '{view}': '{config.kind}' made {result.size} pixels of {image.size}: its tokens would not fit"
            )
    return changed


def transform(image: Image.Image, config: ViewConfig, seed: int) -> Image.Image:
    """One RGB image under the view that `config` describes."""
    return VIEWS[config.kind](image, np.random.default_rng(seed), config)


def _check_sizes(
    view: str, config: ViewConfig, uid: str, sources: list[Image.Image], images: list[Image.Image]
) -> None:
    sizes, wanted = [source.size for source in sources], [image.size for image in images]
    if sizes != wanted:
        raise ValueError(
            f"algorithm.views.{view}.column='{config.column}': its pictures of {uid} have {sizes} pixels, the prompt's "
            f"images {wanted}; they must agree, or tokens would not fit"
        )
