"""Datasets of the API: rows in TRL's form, as folders that the trainer and the reward processes open."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from papo.api.rewards import ANSWER, PROMPT
from verl.data.checks import count_images
from verl.data.rows import IMAGE_MARKER
from verl.utils.files import atomic_path

IMAGES = ("images", "image")  # the first that there is has the pictures
ANSWERS = ("answer", "solution", "ground_truth")  # the first that there is, is the ground truth
NO_ANSWER = "-"  # a reward reads what it needs from columns of its own
FINGERPRINT = "papo_source.json"


def store(rows: Dataset | Sequence[dict[str, Any]], folder: str, name: str) -> tuple[str, str | None]:
    """Write the dataset called `name` (train_dataset, eval_dataset) to `folder`, unless it lies there already.

    Its columns stay, for the rewards; PROMPT, with `<image>` where pictures stand, and ANSWER are added.

    Returns:
        The folder and the column with the pictures.

    Raises:
        ValueError: naming the dataset and the row: no prompt, or one that cannot be read.
    """
    if isinstance(rows, IterableDataset):
        raise ValueError(
            f"{name} is an IterableDataset, and the trainer draws rows by number: give a Dataset or a list"
        )
    rows = rows if isinstance(rows, Dataset) else Dataset.from_list([dict(row) for row in rows])
    if "prompt" not in rows.column_names or not len(rows):
        raise ValueError(f"{name} has {len(rows)} rows with the columns {rows.column_names}: `prompt` is needed")
    images = next((n for n in IMAGES if n in rows.column_names), None)
    state = {"fingerprint": rows._fingerprint, "rows": len(rows)}
    about = os.path.join(folder, FINGERPRINT)
    if os.path.isfile(about):
        with open(about, encoding="utf-8") as file:
            if json.load(file) == state:
                return folder, images
    counts = count_images(rows.with_format("arrow")[:], images) if images else [0] * len(rows)
    prompts = rows.select_columns(["prompt"])["prompt"]
    answer = next((n for n in ANSWERS if n in rows.column_names), None)
    answers = rows.select_columns([answer])[answer] if answer else [None] * len(rows)
    texts = []
    for number, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        try:
            texts.append(marked(prompt, count))
        except ValueError as error:
            raise ValueError(f"{name}, row {number}: {error}") from error
    if any(isinstance(text, list) for text in texts):  # a column has one type
        texts = [text if isinstance(text, list) else [{"role": "user", "content": text}] for text in texts]
    rows = rows.add_column(PROMPT, texts)
    rows = rows.add_column(ANSWER, [str(a) if a is not None and str(a).strip() else NO_ANSWER for a in answers])
    with atomic_path(folder) as temporary:
        rows.save_to_disk(temporary)
        with open(os.path.join(temporary, FINGERPRINT), "w", encoding="utf-8") as file:
            json.dump(state, file)
    return folder, images


def marked(prompt: Any, images: int) -> str | list[dict[str, str]]:
    """A prompt, text or messages, with a marker for each of its `images`: where its parts of the type `image` stand,
    or, where it has none, before the first text of the user."""
    if isinstance(prompt, str):
        return with_markers(prompt, images)
    if not isinstance(prompt, list) or not all(isinstance(m, dict) and "role" in m for m in prompt):
        raise ValueError("`prompt` is a text, or a list of messages with `role` and `content`")
    messages = [{"role": m["role"], "content": text_of(m.get("content"))} for m in prompt]
    if not any(IMAGE_MARKER in m["content"] for m in messages):
        first = next((m for m in messages if m["role"] == "user"), None)
        if first is None:
            raise ValueError("no message of `prompt` is the user's")
        first["content"] = with_markers(first["content"], images)
    return messages


def with_markers(text: str, images: int) -> str:
    return text if IMAGE_MARKER in text else IMAGE_MARKER * images + text


def text_of(content: Any) -> str:
    """A message's content as text, with markers for its pictures."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError("a message's `content` is a text, or a list of parts with a `type`")
    pieces = []
    for part in content:
        if part["type"] == "image":
            if part.get("image") is not None:
                raise ValueError("pictures belong into the column `image` or `images`, not into the prompt's messages")
            pieces.append(IMAGE_MARKER)
        elif part["type"] == "text":
            pieces.append(part["text"])
        else:
            raise ValueError(f"a part of the type '{part['type']}': text and image are known")
    return "".join(pieces)
