"""Checks of rows: all rows without decoding an image, and a sample with decoding."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import TemplateError

from verl.data.rows import IMAGE_MARKER, VIDEO_COLUMN, PromptRows
from verl.data.vision import VisionProcessor

logger = logging.getLogger(__name__)

SAMPLED_ROWS = 256  # decoded before a run, ...
SAMPLE_SECONDS = 10.0  # ... or fewer, in that time
COUNTED_FAULTS = 1000  # before a run; more are not counted


@dataclass(frozen=True)
class Fault:
    """A fault of the row `index`; `kind` is one word for it."""

    index: int
    kind: str
    text: str


def refuse(rows: PromptRows, faults: Iterator[Fault] | Sequence[Fault]) -> None:
    """Raise ValueError naming the file and row of the first of `faults`, and how many there are; none is fine."""
    found = list(islice(faults, COUNTED_FAULTS + 1))
    if found:
        others = len({fault.index for fault in found}) - 1
        count = others if len(found) <= COUNTED_FAULTS else f"at least {others}"
        more = f" (and {count} more row(s) at fault; `papo data check` lists them)" if others else ""
        raise ValueError(f"{rows.where(found[0].index)}: {found[0].text}{more}")


def row_faults(rows: PromptRows, vision: VisionProcessor | None = None) -> Iterator[Fault]:
    """Texts, answers, markers against images, and what the model cannot read, in the order of rows.

    Args:
        vision: of the model, where there is one.
    """
    config, table = rows.config, rows.table
    videos, images = count_images(table, VIDEO_COLUMN), count_images(table, config.image_key)
    others = {column: count_images(table, column) for column in rows.view_columns}
    texts = zip(table.column(config.prompt_key), table.column(config.answer_key), strict=True)
    for index, (problem, answer) in enumerate((p.as_py(), a.as_py()) for p, a in texts):
        if answer is None or not str(answer).strip():
            yield Fault(index, "answer", f"column '{config.answer_key}' is empty")
        for text in _media_faults(rows, vision, videos[index], images[index]):
            yield Fault(index, "media", text)
        for column, counts in others.items():
            if counts[index] != images[index]:
                text = f"{counts[index]} image(s) in column '{column}', which a view reads, and {images[index]} in "
                yield Fault(index, "markers", f"{text}column '{config.image_key}'; they must agree")
        if text := _no_prompt(problem):
            yield Fault(index, "problem", f"column '{config.prompt_key}' {text}")
        else:
            yield from _text_faults(rows, vision, index, problem, images[index])


def _no_prompt(problem: Any) -> str:
    """The reason why a row's problem is no prompt; empty where it is a text, or messages of which the last is the
    user's."""
    if isinstance(problem, str):
        return "" if problem.strip() else "is empty"
    if not isinstance(problem, list) or not problem:
        return "is empty or no text"
    for message in problem:
        known = isinstance(message, dict) and {"role", "content"} <= message.keys()
        if not known or not all(isinstance(message[name], str) for name in ("role", "content")):
            return "is no text and no list of messages, each with `role` and `content` as texts"
    return "" if problem[-1]["role"] == "user" else "ends with a message that is not the user's"


def _media_faults(rows: PromptRows, vision: VisionProcessor | None, videos: int, images: int) -> Iterator[str]:
    column = rows.config.image_key
    if videos:
        yield (
            f"{videos} video(s) in column '{VIDEO_COLUMN}'; prompts are made of text and images alone: leave such rows "
            f"out, or give frames as images in '{column}'"
        )
    if images and vision is not None and not vision.family.has_vision:
        yield (
            f"{images} image(s) in column '{column}', and worker.actor.model.model_path holds a {vision.family.name} "
            "model, which reads text only: choose a vision model, or leave such rows out"
        )


def _text_faults(
    rows: PromptRows, vision: VisionProcessor | None, index: int, problem: str | list[dict[str, str]], images: int
) -> Iterator[Fault]:
    try:
        text = rows.prompt_text({rows.config.prompt_key: problem})
    except TemplateError as error:
        yield Fault(index, "problem", f"data.format_prompt='{rows.config.format_prompt}' fails on it: {error}")
        return
    markers = text.count(IMAGE_MARKER)
    if markers != images:
        yield Fault(
            index,
            "markers",
            f"the problem has {markers} {IMAGE_MARKER} marker(s) and the row has {images} image(s) in column "
            f"'{rows.config.image_key}'; they must agree",
        )
    for token in () if vision is None else vision.media_tokens:
        if token in text:
            yield Fault(index, "problem", f"the text itself holds an image token, {token}: write {IMAGE_MARKER}")


def count_images(table: pa.Table, column: str) -> list[int]:
    """The number of images of each row in `column`; none where there is no such column."""
    if column not in table.column_names:
        return [0] * len(table)
    images = table.column(column)
    if pa.types.is_list(images.type) or pa.types.is_large_list(images.type):
        return pc.fill_null(pc.list_value_length(images), 0).to_pylist()
    return [int(valid) for valid in pc.is_valid(images).to_pylist()]


def image_fault(rows: PromptRows, vision: VisionProcessor | None, index: int, row: dict) -> Fault | None:
    """The fault of the images of `row`, found by decoding them."""
    try:
        for column in (rows.config.image_key, *rows.view_columns):
            for picture in rows.pictures(row, column):
                if vision is not None and vision.family.has_vision:
                    vision.num_image_tokens(*picture.size)
    except (ValueError, FileNotFoundError) as error:
        return Fault(index, "image", str(error))
    return None


def sampled_image_faults(rows: PromptRows, vision: VisionProcessor) -> Iterator[Fault]:
    """Image faults of a sample of rows: as many as SAMPLE_SECONDS allow, at most SAMPLED_ROWS."""
    started, decoded = time.monotonic(), 0
    for index in random.Random(0).sample(range(len(rows)), min(len(rows), SAMPLED_ROWS)):
        if time.monotonic() - started > SAMPLE_SECONDS:
            break
        decoded += 1
        fault = image_fault(rows, vision, index, rows[index])
        if fault is not None:
            yield fault
    logger.info("decoded the images of %d of %d rows to check them", decoded, len(rows))
