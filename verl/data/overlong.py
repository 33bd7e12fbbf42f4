"""The prompts that are too long, counted by arithmetic on image headers; no image is decoded and no processor
called."""

from __future__ import annotations

import logging
from bisect import bisect_left
from functools import partial
from typing import Any

import numpy as np
from jinja2 import TemplateError

from verl.config.data import PromptTruncation
from verl.data.checks import Fault, refuse
from verl.data.images import image_size
from verl.data.length_cache import cache_path, load_lengths, save_lengths
from verl.data.rows import IMAGE_MARKER, PromptRows
from verl.data.scan import scan
from verl.data.vision import VisionProcessor

logger = logging.getLogger(__name__)


def filter_overlong(rows: PromptRows, vision: VisionProcessor) -> list[int]:
    """Indices of the rows to train on: those whose prompt has at most `data.max_prompt_length` tokens, and with
    `data.truncation=left` those that will be cut. What is dropped or cut is logged.

    Raises:
        ValueError: naming file and row of an image that cannot be read, or of a prompt that is too long and may
            neither be dropped nor be cut; or no row is left.
    """
    limit, fate = rows.config.max_prompt_length, rows.config.overlong
    lengths = prompt_lengths(rows, vision)
    long = np.flatnonzero(lengths > limit).tolist()
    if not long:
        return list(range(len(rows)))
    if fate == PromptTruncation.error:
        way_out = "raise it, lower data.max_pixels, or set data.truncation to drop or left"
        refuse(rows, [Fault(i, "length", too_long(int(lengths[i]), limit, way_out)) for i in long])
    if fate == PromptTruncation.left:
        faults = ((index, uncuttable(rows, vision, rows[index])) for index in long)
        refuse(rows, [Fault(index, "length", text) for index, text in faults if text])
    logger.warning(
        "%d of %d prompts are longer than data.max_prompt_length=%d tokens (the longest has %d) and are %s, the first: "
        "%s",
        len(long),
        len(rows),
        limit,
        lengths.max(),
        "cut at the left end of their text" if fate == PromptTruncation.left else "dropped",
        "; ".join(rows.where(index) for index in long[:3]),
    )
    if fate == PromptTruncation.left:
        return list(range(len(rows)))
    if len(long) == len(rows):
        raise ValueError(f"every prompt is longer than data.max_prompt_length={limit} tokens; raise it")
    return np.flatnonzero(lengths <= limit).tolist()


def too_long(length: int, limit: int, way_out: str) -> str:
    return f"the prompt has {length} tokens, more than data.max_prompt_length={limit}; {way_out}"


def prompt_lengths(rows: PromptRows, vision: VisionProcessor) -> np.ndarray:
    """[rows] int32, the tokens of each prompt; from a cache where nothing that they depend on has changed.

    Raises ValueError for images that cannot be read, naming file and row.
    """
    path = cache_path(rows, vision)
    lengths = load_lengths(path, len(rows))
    if lengths is None:
        workers = rows.config.filter_overlong_prompts_workers
        found = list(scan(rows, partial(count_prompts, rows, vision), "counting prompt tokens", workers))
        refuse(rows, [fault for fault in found if isinstance(fault, Fault)])
        lengths = np.array(found, dtype=np.int32)
        save_lengths(path, lengths)
    return lengths


def count_prompts(
    rows: PromptRows, vision: VisionProcessor, start: int, batch: list[dict[str, Any]]
) -> list[int | Fault]:
    """The tokens of each row's prompt, or what is wrong with its images. In the chat text each image is one token; its
    other tokens are arithmetic."""
    found: list[int | Fault] = []
    counts = vision.count_tokens([vision.chat_text(rows.prompt_text(row)) for row in batch])
    for offset, (row, count) in enumerate(zip(batch, counts, strict=True)):
        try:
            sizes = [image_size(image, rows.config.image_dir) for image in rows.images_of(row)]
            found.append(count + sum(vision.num_image_tokens(*size) - 1 for size in sizes))
        except (ValueError, FileNotFoundError) as error:
            found.append(Fault(start + offset, "image", str(error)))
    return found


def cut_left(rows: PromptRows, vision: VisionProcessor, row: dict[str, Any], image_tokens: int) -> str:
    """The row's prompt text, without as many characters at the left end of its problem as keep the prompt from
    fitting. Its images, `image_tokens` in all, and the template stay whole.

    Raises ValueError where those alone are too long.
    """
    limit, problem = rows.config.max_prompt_length, row[rows.config.prompt_key]
    if not isinstance(problem, str):
        raise ValueError("data.truncation=left cuts texts, and this prompt is messages: set data.truncation=drop")
    extra = image_tokens - len(rows.images_of(row))

    def text_without(count: int) -> str:
        return rows.prompt_text({**row, rows.config.prompt_key: without_characters(problem, count)})

    def fits(count: int) -> bool:
        return vision.count_tokens([vision.chat_text(text_without(count))])[0] + extra <= limit

    if fits(0):
        return text_without(0)
    candidates = range(max(1, len(problem.replace(IMAGE_MARKER, ""))))  # one character at least stays
    count = bisect_left(candidates, True, key=fits)
    if count == len(candidates):
        raise ValueError(
            f"its images take {image_tokens} tokens and leave no room for text in data.max_prompt_length={limit}; "
            "raise it, lower data.max_pixels, or drop such rows with data.truncation=drop"
        )
    return text_without(count)


def without_characters(problem: str, count: int) -> str:
    """`problem` without its first `count` characters that are not part of an image marker."""
    pieces = []
    for piece in problem.split(IMAGE_MARKER):
        pieces.append(piece[count:])
        count -= min(count, len(piece))
    return IMAGE_MARKER.join(pieces)


def uncuttable(rows: PromptRows, vision: VisionProcessor, row: dict[str, Any]) -> str:
    """The reason why cutting its text does not make the row's prompt fit; empty where it does."""
    sizes = [image_size(image, rows.config.image_dir) for image in rows.images_of(row)]
    try:
        cut_left(rows, vision, row, sum(vision.num_image_tokens(*size) for size in sizes))
    except (ValueError, TemplateError) as error:
        return str(error)
    return ""
