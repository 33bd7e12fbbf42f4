"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images as patches of any size, and positions of time, height and width."""

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

PIXELS, GRID = "pixel_values", "image_grid_thw"


class QwenVL(Family):
    """An image's tensors are `pixel_values` [patches, values per patch] and `image_grid_thw` [1, 3], the number of its
    patches in time, height and width; the tower merges squares of patches to one token."""

    has_vision = packs_images = True
    tower_name = "model.visual"
    vision_names = (tower_name,)
    auto_class = AutoModelForImageTextToText

    def image_limits(self, image_processor: Any, min_pixels: int, max_pixels: int) -> dict[str, Any]:
        return {"size": {"shortest_edge": min_pixels, "longest_edge": max_pixels}}

    def split_images(self, encoded: dict[str, Any], processor: Any) -> list[dict[str, torch.Tensor]]:
        pieces = encoded[PIXELS].split(encoded[GRID].prod(dim=1).tolist())
        return [{PIXELS: p, GRID: g} for p, g in zip(pieces, encoded[GRID].split(1), strict=True)]

    def positions(self, ids: torch.Tensor, images: Images, config: Any) -> torch.Tensor:
        """Multimodal rotary positions (Qwen2-VL, arXiv 2409.12191, section 2.1) [3, P].

        Text counts on in all three rows; an image's tokens share one time and take their place in its merged grid, and
        the text behind goes on after the largest position so far. Families differ in the time of videos alone.
        """
        merge = config.vision_config.spatial_merge_size
        is_image = (ids == config.image_token_id).tolist()
        grids = iter(_grids(images))
        pieces, at, start = [], 0, 0
        while at < len(is_image):
            if is_image[at]:
                time, height, width = next(grids, (0, 0, 0))
                if not time:
                    raise ValueError("more image tokens than images: the text itself holds an image token")
                grid = torch.meshgrid(
                    torch.arange(time), torch.arange(height // merge), torch.arange(width // merge), indexing="ij"
                )
                piece = torch.stack([axis.flatten() for axis in grid]) + start
                start += max(height, width) // merge
            else:
                end = is_image.index(True, at) if True in is_image[at:] else len(is_image)
                piece = (torch.arange(end - at) + start).expand(3, -1)
                start += end - at
            pieces.append(piece)
            at += piece.shape[1]
        return torch.cat(pieces, dim=1)

    def image_spans(self, ids: torch.Tensor, images: Images, config: Any, uid: str) -> list[tuple[int, int]]:
        vision = config.vision_config
        positions = (ids == config.image_token_id).nonzero().flatten().tolist()
        grids = _grids(images)
        lengths = [time * height * width // vision.spatial_merge_size**2 for time, height, width in grids]
        spans, at = [], 0
        for length in lengths:
            run = positions[at : at + length]
            if len(run) < length or run[-1] - run[0] != length - 1:
                break
            spans.append((run[0], length))
            at += length
        if len(spans) != len(lengths) or at != len(positions):
            sizes = ", ".join(f"{width * vision.patch_size}x{height * vision.patch_size}" for _, height, width in grids)
            raise ValueError(
                f"{uid}: the prompt has {len(positions)} image tokens, and its {len(lengths)} image(s) of "
                f"{sizes or 'no'} pixels take {lengths}; tokens and images must agree, in order and without gaps"
            )
        return spans

    def image_features(
        self, inner: nn.Module, tensors: dict[str, torch.Tensor] | None, owner: Sequence[int], device: torch.device
    ) -> tuple[Any, torch.Tensor | None]:
        shown = _black_image(inner.config.vision_config, device) if tensors is None else tensors
        features = inner.model.get_image_features(shown[PIXELS], shown[GRID], return_dict=True)
        # Features that enter deeper layers of the language model (Qwen3-VL): for each layer one tensor per image.
        deep = getattr(features, "deepstack_features", None) or []
        if tensors is None:
            # Every level: a weight without gradient on this rank alone would not be reduced with the others'.
            return None, sum(0.0 * torch.cat(list(level)).float().sum() for level in (features.pooler_output, *deep))
        features.pooler_output = [features.pooler_output[i] for i in owner]
        if deep:
            features.deepstack_features = [[level[i] for i in owner] for level in deep]
        return {"image": features}, None

    def forward_arguments(self, position_ids: torch.Tensor, features: Any) -> dict[str, Any]:
        return {"position_ids": position_ids.transpose(0, 1), "mm_encoder_outputs": features}

    def patch_size(self, config: Any) -> int:
        return config.vision_config.patch_size

    def merge(self, config: Any) -> int:
        return config.vision_config.spatial_merge_size

    def image_tokens(self, processor: Any, width: int, height: int) -> int:
        image_processor = processor.image_processor
        try:
            patches = image_processor.get_number_of_image_patches(height, width, {})
        except ValueError as error:
            raise ValueError(
                f"an image of {width}x{height} pixels is none for {self.name}: {error}; crop it, or leave such rows out"
            ) from error
        return patches // image_processor.merge_size**2

    def resize(self, image_processor: Any, image: Image.Image) -> Image.Image:
        from PIL import Image

        resized = image_processor.resize(
            torch.from_numpy(np.array(image)).permute(2, 0, 1),
            size=SizeDict(**dict(image_processor.size)),
            resample=image_processor.resample,
            factor=self.side_unit(image_processor),
        )
        return Image.fromarray(resized.permute(1, 2, 0).numpy())

    def side_unit(self, image_processor: Any) -> int:
        return image_processor.patch_size * image_processor.merge_size


FAMILIES = {
    "qwen2_vl": QwenVL("Qwen2-VL"),
    "qwen2_5_vl": QwenVL("Qwen2.5-VL"),
    "qwen3_vl": QwenVL("Qwen3-VL"),
}


def _grids(images: Images) -> list[list[int]]:
    return [item[GRID][0].tolist() for item in images.items]


def _black_image(vision: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """The smallest picture for a model with the `vision_config` `vision`."""
    merge = vision.spatial_merge_size
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        PIXELS: torch.zeros(merge * merge, size, device=device),
        GRID: torch.tensor([[1, merge, merge]], device=device),
    }
