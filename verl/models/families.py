"""What differs between model families: positions, and which tokens are not for sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# Tested families. Another one may work and may as well train on wrong positions: it is refused, not guessed.
SUPPORTED = ("qwen2_5_vl",)

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
    """`banned`: ids that stand for images, video or audio, which a response must never hold."""

    pad: int
    eos: tuple[int, ...]
    banned: tuple[int, ...]


def check_family(config: Any) -> None:
    """Raise ValueError for a model type that this version has no tested support for."""
    if config.model_type not in SUPPORTED:
        raise ValueError(
            f"worker.actor.model.model_path holds a '{config.model_type}' model; supported: {', '.join(SUPPORTED)}"
        )


def special_tokens(config: Any, tokenizer: Any) -> SpecialTokens:
    """The special token ids of a model and its tokenizer."""
    check_family(config)
    vocabulary = tokenizer.get_vocab()
    banned = {vocabulary[token] for token in MODALITY_TOKENS if token in vocabulary}
    banned |= {getattr(config, f"{kind}_token_id", None) for kind in ("image", "video", "audio")} - {None}
    eos = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id
    return SpecialTokens(pad if pad is not None else eos, (eos,), tuple(sorted(banned)))


def positions_of_prompt(ids: torch.Tensor, image_grid_thw: torch.Tensor | None, config: Any) -> torch.Tensor:
    """Multimodal rotary positions (Qwen2-VL, arXiv 2409.12191, section 2.1) of one prompt without padding.

    Text counts on in all three rows (time, height, width); an image's tokens share one time and take their
    place in its merged grid, and the text behind goes on after the largest position so far.

    Args:
        ids: [P] with one image token per merged patch.
        image_grid_thw: [images, 3] patches before merging, or None.

    Returns:
        [3, P] int64.
    """
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
        ValueError: the image tokens are not those that the images take, one run for each.
    """
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
