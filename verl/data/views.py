"""Views: another look at the same tokens, under transformed images. verl has the mechanism, plugins the views."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from verl.columns import view_column
from verl.config.algorithm import ViewConfig
from verl.config.store import store_option
from verl.protocol import DataProto
from verl.registry import Registry
from verl.utils.seeding import derive_seed

if TYPE_CHECKING:  # a plugin that registers a view should not pay for importing transformers
    from verl.data.vision import VisionProcessor

# (RGB image, random generator, options) -> RGB image of the same size
ViewFunction = Callable[[Image.Image, np.random.Generator, Any], Image.Image]

VIEWS: Registry[ViewFunction] = Registry("view")


def image_view(name: str, config: type[ViewConfig]) -> Callable[[ViewFunction], ViewFunction]:
    """Decorator: register a transformation of one RGB image as a kind of view.

    Args:
        config: the dataclass of its options, whose `kind` is `name`; it joins Hydra's group `view`.
    """

    def add(function: ViewFunction) -> ViewFunction:
        store_option("view", name, config)
        return VIEWS.register(name)(function)

    return add


def add_view(
    prompts: DataProto, view: str, config: ViewConfig, vision: VisionProcessor, seed: int, epoch: int
) -> DataProto:
    """Prompts with the columns `<view>_mm_inputs` and `<view>_rows` (False where a prompt has no image).

    Each image of a prompt is transformed once, and the responses to the prompt share it. The random numbers
    follow from run seed, view, prompt, epoch and the image's place, so a run can be repeated.
    """
    transform = VIEWS[config.kind]
    columns = []
    for uid, images, original in zip(prompts["uid"], prompts["images"], prompts["mm_inputs"], strict=True):
        if not images:
            columns.append({})
            continue
        changed = []
        for place, image in enumerate(images):
            rng = np.random.default_rng(derive_seed(seed, view, uid, epoch, place))
            changed.append(transform(image, rng, config))
            if changed[-1].size != image.size:
                raise ValueError(f"view '{view}' changed the size of an image of {uid}: its tokens would not fit")
        inputs = vision.encode_images(changed)
        assert torch.equal(inputs["image_grid_thw"], original["image_grid_thw"])
        columns.append(inputs)
    rows = torch.tensor([bool(inputs) for inputs in columns])
    return prompts.with_columns({view_column(view, "rows"): rows}, {view_column(view, "mm_inputs"): columns})
