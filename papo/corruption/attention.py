"""Semantic masking, the paper's second strategy: the patches black that DINOv2 attends to most."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from omegaconf import MISSING

from papo.corruption.patches import ShareConfig, blacken, lowest
from verl.config.option import option
from verl.data.views import image_view

if TYPE_CHECKING:  # PIL and transformers are imported where they are used
    from PIL import Image
    from transformers import Dinov2Model

# ImageNet's, with which every DINOv2 was trained.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class AttentionConfig(ShareConfig):
    """The floor(prob * patches) most salient patches of a DINOv2 are black (arXiv 2507.06448, appendix G).

    `model_path` is a folder or a name on the hub ("facebook/dinov2-base"), `layers` are counted from 0: the paper says
    6 to 9, and neither from where it counts nor which DINOv2 it took. A picture is shown to it at about its own size,
    with `max_patches` at most, because attention takes memory by the square of their number. The driver does this on
    its CPU at every step, and nothing in it is random: for more than a trial, mask once and use `precomputed`.
    """

    kind: str = "attention"
    model_path: str = option(MISSING, "a DINOv2: folder or hub name")
    layers: list[int] = option(lambda: [6, 7, 8, 9], "layers whose attention counts, from 0")
    max_patches: int = option(1024, "most patches that it sees of a picture", least=1)

    def check(self, key: str) -> None:
        if not self.layers or min(self.layers) < 0:
            raise ValueError(f"{key}.layers={self.layers}: one layer or more is needed, counted from 0")
        try:  # a mistyped path stops a run here, before anything is built
            load_dino(self.model_path, max(self.layers))
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{key}.{error}") from error


@lru_cache(maxsize=2)
def load_dino(model_path: str, last_layer: int) -> Dinov2Model:
    """The DINOv2 at `model_path` without the layers above `last_layer`; once per process.

    Raises ValueError or FileNotFoundError that begins with the option at fault.
    """
    from transformers import AutoConfig, Dinov2Model

    if model_path.startswith(("/", ".", "~")) and not os.path.isfile(os.path.join(model_path, "config.json")):
        raise FileNotFoundError(f"model_path='{os.path.abspath(model_path)}' is no Hugging Face folder")
    try:
        config = AutoConfig.from_pretrained(model_path)
        if config.model_type != "dinov2":
            raise ValueError(f"it is a {config.model_type}, and a dinov2 is needed")
        # Only the eager implementation has attention weights to return.
        model = Dinov2Model.from_pretrained(model_path, attn_implementation="eager", dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"model_path='{model_path}' does not load: {error}") from error
    if last_layer >= config.num_hidden_layers:
        raise ValueError(f"layers goes up to {last_layer}; '{model_path}' has 0 to {config.num_hidden_layers - 1}")
    model.encoder.layer = model.encoder.layer[: last_layer + 1]
    return model.eval()


@torch.no_grad()
def saliency(image: Image.Image, model: Dinov2Model, layers: list[int], max_patches: int) -> np.ndarray:
    """Attention that each patch receives from all other patches, [rows, columns]: mean over heads and `layers`."""
    from PIL import Image

    size = model.config.patch_size
    scale = min(1.0, size * math.sqrt(max_patches / (image.width * image.height)))
    rows, columns = (max(1, math.floor(scale * side / size)) for side in (image.height, image.width))
    pixels = np.array(image.resize((columns * size, rows * size), Image.Resampling.BICUBIC)) / 255
    pixels = torch.tensor((pixels - MEAN) / STD, dtype=torch.float32).permute(2, 0, 1)
    attentions = model(pixels[None], output_attentions=True).attentions  # of each layer [1, heads, 1 + N, 1 + N]
    mean = torch.stack([attentions[layer][0].mean(dim=0) for layer in layers]).mean(dim=0)
    among_patches = mean[1:, 1:]  # token 0 is CLS
    return (among_patches.sum(dim=0) - among_patches.diagonal()).reshape(rows, columns).numpy()


@image_view("attention", AttentionConfig)
def attention(image: Image.Image, rng: np.random.Generator, config: AttentionConfig) -> Image.Image:
    """The RGB `image` with the top floor(prob * N) of its N patches black; DINOv2's grid is laid over all of it."""
    model = load_dino(config.model_path, max(config.layers))
    scores = saliency(image, model, config.layers, config.max_patches)
    rows, columns = scores.shape
    black = lowest(-scores, math.floor(config.prob * scores.size + 1e-9))  # 0.29 * 100 is 28.999...
    row_of, column_of = np.arange(image.height) * rows // image.height, np.arange(image.width) * columns // image.width
    return blacken(image, black, row_of, column_of)
