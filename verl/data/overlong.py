"""Which prompts are too long, counted without decoding an image."""

from __future__ import annotations

import io
import logging
import os
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm import tqdm

if TYPE_CHECKING:
    from verl.data.dataset import PromptDataset

logger = logging.getLogger(__name__)


def filter_overlong(dataset: PromptDataset) -> list[int]:
    """Indices of the rows whose prompt has at most `data.max_prompt_length` tokens; what is dropped is logged.

    Raises ValueError where no row is left, or for an image without a readable header, naming file and row.
    """
    limit = dataset.config.max_prompt_length
    kept, dropped = [], []
    for index in tqdm(dataset.indices, desc="counting prompt tokens", unit="row", leave=False):
        try:
            length = prompt_length(dataset, dataset.rows.dataset[index])
        except (OSError, ValueError) as error:
            raise ValueError(f"{dataset.where(index)}: {error}") from error
        (kept if length <= limit else dropped).append(index)
    if dropped:
        examples = "; ".join(dataset.where(index) for index in dropped[:3])
        logger.warning(
            "%d of %d prompts are longer than data.max_prompt_length=%d tokens and are dropped, the first: %s",
            len(dropped),
            len(dropped) + len(kept),
            limit,
            examples,
        )
    if not kept:
        raise ValueError(f"every prompt is longer than data.max_prompt_length={limit} tokens; raise it")
    return kept


def prompt_length(dataset: PromptDataset, row: dict[str, Any]) -> int:
    """Tokens of a row's prompt. In the chat text each image is one token; its other tokens are arithmetic."""
    vision = dataset.vision
    length = len(vision.tokenizer(vision.chat_text(dataset.prompt_text(row)))["input_ids"])
    for image in dataset.images_of(row):
        width, height = image_size(image, dataset.config.image_dir)
        length += vision.num_image_tokens(width, height) - 1
    return length


def image_size(image: Any, image_dir: str | None) -> tuple[int, int]:
    """(width, height) in pixels, from the file's header. Raises OSError where that is none."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, Image.Image):
        return image.size
    source = io.BytesIO(image) if isinstance(image, bytes) else os.path.join(image_dir or "", image)
    with Image.open(source) as opened:
        return opened.size
