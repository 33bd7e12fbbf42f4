"""What differs between model families: loading, positions, images, and which tokens are not for sampling.

A family is added by an entry in FAMILIES and its tiny model in tests/fakes/families.py; tests/models/test_families.py
then says whether it works.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Family:
    """A tested kind of model. `has_vision`: whether it has a vision tower, and with it mRoPE positions."""

    name: str
    has_vision: bool = True


# By `config.model_type`. Another one may work and may as well train on wrong positions: it is refused, not guessed.
FAMILIES = {
    "qwen2_vl": Family("Qwen2-VL"),
    "qwen2_5_vl": Family("Qwen2.5-VL"),
    "qwen3_vl": Family("Qwen3-VL"),
    "qwen2": Family("Qwen2.5", has_vision=False),
    "qwen3": Family("Qwen3", has_vision=False),
}

MODALITY_TOKENS = (
    "<|image_pad|>",
    "<|video_pad|>",
    "<|audio_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
)


@dataclass(frozen=True)
class SpecialTokens:
    """`eos`: ids of which each ends a response. `banned`: ids that stand for images, video or audio, which a response
    must never hold."""

    pad: int
    eos: tuple[int, ...]
    banned: tuple[int, ...]


def family_of(config: Any) -> Family:
    """The family of a model's config. Raises ValueError for a model type without tested support."""
    if config.model_type not in FAMILIES:
        supported = ", ".join(f"{model_type} ({family.name})" for model_type, family in FAMILIES.items())
        raise ValueError(f"worker.actor.model.model_path holds a '{config.model_type}' model; supported: {supported}")
    return FAMILIES[config.model_type]


def special_tokens(config: Any, tokenizer: Any, generation: Any = None) -> SpecialTokens:
    """The special token ids of a model and its tokenizer.

    Args:
        generation: the model's GenerationConfig, where it has one: chat models list ends there that the tokenizer does
            not name (<|endoftext|> beside <|im_end|>).
    """
    vocabulary = tokenizer.get_vocab()
    banned = {vocabulary[token] for token in MODALITY_TOKENS if token in vocabulary}
    banned |= {getattr(config, f"{kind}_token_id", None) for kind in ("image", "video", "audio")} - {None}
    eos = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id
    more = getattr(generation, "eos_token_id", None) or []
    ends = dict.fromkeys([eos, *(more if isinstance(more, (list, tuple)) else [more])])
    return SpecialTokens(pad if pad is not None else eos, tuple(ends), tuple(sorted(banned)))


def positions_of_prompt(ids: torch.Tensor, image_grid_thw: torch.Tensor | None, config: Any) -> torch.Tensor:
    """Multimodal rotary positions (Qwen2-VL, arXiv 2409.12191, section 2.1) of one prompt without padding.

    Text counts on in all three rows (time, height, width), and a text-only model reads one of them; an image's
    tokens share one time and take their place in its merged grid, and the text behind goes on after the largest
    position so far. Families differ in the time of videos alone.

    Args:
        ids: [P] with one image token per merged patch.
        image_grid_thw: [images, 3] patches before merging, or None.

    Returns:
        [3, P] int64.
    """
    if not family_of(config).has_vision:
        return torch.arange(len(ids)).expand(3, -1)
    merge = config.vision_config.spatial_merge_size
    is_image = (ids == config.image_token_id).tolist()
    grids = iter([] if image_grid_thw is None else image_grid_thw.tolist())
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


def image_spans(ids: torch.Tensor, image_grid_thw: torch.Tensor | None, config: Any, uid: str) -> list[tuple[int, int]]:
    """(first position, number of tokens) of each image of a prompt without padding.

    Args:
        ids: [P].
        image_grid_thw: [images, 3] patches before merging, or None.
        uid: names the prompt in the error.

    Raises:
        ValueError: the image tokens are not those that the images take, one run for each, or the model is text-only.
    """
    family = family_of(config)
    if not family.has_vision:
        if image_grid_thw is not None:
            raise ValueError(f"{uid}: the prompt has {len(image_grid_thw)} image(s), and {family.name} reads text only")
        return []
    vision = config.vision_config
    positions = (ids == config.image_token_id).nonzero().flatten().tolist()
    grids = [] if image_grid_thw is None else image_grid_thw.tolist()
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


def positions_of_response(prompt_positions: torch.Tensor, length: int) -> torch.Tensor:
    """Positions [B, 3, length] of the response behind prompts with positions [B, 3, P]: text that counts on."""
    start = prompt_positions.amax(dim=(1, 2)) + 1
    return (start[:, None] + torch.arange(length))[:, None, :].expand(-1, 3, -1)


def forward_arguments(config: Any, position_ids: torch.Tensor, features: dict[str, Any] | None) -> dict[str, Any]:
    """What the model beneath the head takes beside tokens and mask.

    Args:
        position_ids: [B, 3, L].
        features: as `encode_images` returns them.
    """
    if family_of(config).has_vision:
        return {"position_ids": position_ids.transpose(0, 1), "mm_encoder_outputs": features}
    return {"position_ids": position_ids[:, 0]}


def encode_images(
    inner: nn.Module,
    pixel_values: torch.Tensor | None,
    image_grid_thw: torch.Tensor | None,
    image_owner: list[int],
    device: torch.device,
) -> tuple[dict[str, Any] | None, torch.Tensor | None]:
    """(features of every image place, graph anchor). The vision tower sees each different image once.

    Without images the tower still runs, on one black patch that counts 0: on another rank it may have images, and
    FSDP's collectives wait for all ranks. A text-only model has none, on no rank.

    Args:
        inner: the Hugging Face model, head included.
        pixel_values, image_grid_thw: of the *different* images only, or None in a batch without images.
        image_owner: which of them each image place is, in the order of rows and of images in a row.
    """
    if not family_of(inner.config).has_vision:
        return None, None
    if pixel_values is None:
        features = inner.model.get_image_features(*_dummy_image(inner.config.vision_config, device), return_dict=True)
        # Every level: a weight without gradient on this rank alone would not be reduced with the others'.
        levels = [features.pooler_output, *_deepstack(features)]
        return None, sum(0.0 * torch.cat(list(level)).float().sum() for level in levels)
    features = inner.model.get_image_features(pixel_values, image_grid_thw, return_dict=True)
    features.pooler_output = [features.pooler_output[i] for i in image_owner]
    if _deepstack(features):
        features.deepstack_features = [[level[i] for i in image_owner] for level in features.deepstack_features]
    return {"image": features}, None


def _deepstack(features: Any) -> list[Any]:
    """Features that enter deeper layers of the language model (Qwen3-VL): for each layer one tensor per image."""
    return getattr(features, "deepstack_features", None) or []


def _dummy_image(vision: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(pixel_values, image_grid_thw) of the smallest picture, for a model with the `vision_config` `vision`."""
    merge = vision.spatial_merge_size
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return torch.zeros(merge * merge, size, device=device), torch.tensor([[1, merge, merge]], device=device)
