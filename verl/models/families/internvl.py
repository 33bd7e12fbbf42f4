"""InternVL3 and 3.5 in Hugging Face's form: images as square tiles, and positions that count as those of text do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.image_utils import SizeDict

from verl.models.families.base import Family, Images

if TYPE_CHECKING:
    from PIL import Image

PIXELS, TILES = "pixel_values", "image_num_patches"
# With more, a picture that has been resized to its tiles would be cut into others when it is cut again.
MOST_TILES = 12


class InternVL(Family):
    """An image's tensors are `pixel_values` [tiles, 3, height, width] and `image_num_patches` [1], the number of its
    tiles: a grid of them in the picture's proportions and, behind more than one, the whole picture in small. Each takes
    as many tokens."""

    has_vision = True
    tower_name = "model.vision_tower"
    vision_names = (tower_name, "model.multi_modal_projector")
    auto_class = AutoModelForImageTextToText
    modality_tokens = (*Family.modality_tokens, "<IMG_CONTEXT>", "<img>", "</img>", "<video>")

    def image_limits(self, image_processor: Any, min_pixels: int, max_pixels: int) -> dict[str, Any]:
        tile = image_processor.size["height"] * image_processor.size["width"]
        most = max(1, min(max_pixels // tile, MOST_TILES))
        return {"crop_to_patches": True, "min_patches": 1, "max_patches": most}

    def split_images(self, encoded: dict[str, Any], processor: Any) -> list[dict[str, torch.Tensor]]:
        counts = encoded.get("num_patches")  # the image processor alone tells; behind it the tokens do
        if counts is None:
            runs = _runs(encoded["input_ids"][0], processor.image_token_id)
            counts = [length // processor.image_seq_length for _, length in runs]
        counts = torch.as_tensor(counts)
        pieces = encoded[PIXELS].split(counts.tolist())
        return [{PIXELS: piece, TILES: count} for piece, count in zip(pieces, counts.split(1), strict=True)]

    def patches_per_row(self, config: Any) -> int:
        return (config.vision_config.image_size[0] // self.patch_size(config)) ** 2

    def patch_size(self, config: Any) -> int:
        return config.vision_config.patch_size[0]

    def merge(self, config: Any) -> int:
        return round(1 / config.downsample_ratio)

    def image_spans(self, ids: torch.Tensor, images: Images, config: Any, uid: str) -> list[tuple[int, int]]:
        spans = _runs(ids, config.image_token_id)
        lengths = [int(item[TILES]) * config.image_seq_length for item in images.items]
        if [length for _, length in spans] != lengths:
            raise ValueError(
                f"{uid}: the prompt has runs of {[length for _, length in spans]} image tokens, and its {len(images)} "
                f"image(s) take {lengths}; tokens and images must agree, in order and without gaps"
            )
        return spans

    def image_features(
        self, inner: nn.Module, tensors: dict[str, torch.Tensor] | None, owner: Sequence[int], device: torch.device
    ) -> tuple[Any, torch.Tensor | None]:
        if tensors is None:
            black = torch.zeros(1, 3, *inner.config.vision_config.image_size, device=device)
            features = inner.model.get_image_features(black, return_dict=True)
            return None, 0.0 * features.pooler_output.float().sum()
        features = inner.model.get_image_features(tensors[PIXELS], return_dict=True)
        pieces = features.pooler_output.split(tensors[TILES].tolist())
        features.pooler_output = torch.cat([pieces[i] for i in owner])
        return {"image": features}, None

    def forward_arguments(self, position_ids: torch.Tensor, features: Any) -> dict[str, Any]:
        return {"position_ids": position_ids[:, 0], "mm_encoder_outputs": features}

    def engine_tensors(self, images: Images, config: Any) -> dict[str, torch.Tensor]:
        return images.tensors() | {"image_token_id": torch.tensor(config.image_token_id)}

    def image_tokens(self, processor: Any, width: int, height: int) -> int:
        tiles = processor.image_processor.get_number_of_image_patches(height, width, {})
        return tiles * processor.image_seq_length + 2  # the two that enclose it

    def resize(self, image_processor: Any, image: Image.Image) -> Image.Image:
        from PIL import Image
        from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

        tile = image_processor.size["height"], image_processor.size["width"]
        limits = image_processor.min_patches, image_processor.max_patches
        columns, rows = get_optimal_tiled_canvas((image.height, image.width), tile, *limits)
        resized = image_processor.resize(
            torch.from_numpy(np.array(image)).permute(2, 0, 1),
            SizeDict(height=rows * tile[0], width=columns * tile[1]),
            resample=image_processor.resample,
        )
        return Image.fromarray(resized.permute(1, 2, 0).numpy())

    def side_unit(self, image_processor: Any) -> int:
        return image_processor.size["height"]


FAMILIES = {"internvl": InternVL("InternVL")}


def _runs(ids: torch.Tensor, token: int) -> list[tuple[int, int]]:
    """(first place, length) of each run of the token in a prompt [P]."""
    is_token = torch.nn.functional.pad((ids == token).int(), (1, 1)).diff()
    starts, ends = (is_token == 1).nonzero().flatten(), (is_token == -1).nonzero().flatten()
    return list(zip(starts.tolist(), (ends - starts).tolist(), strict=True))
