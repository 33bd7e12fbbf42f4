"""The look of `papo data check` at each row: images, tokens, and answers that no rule can grade."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from verl.data.checks import Fault, image_fault
from verl.data.images import image_size
from verl.data.overlong import count_prompts
from verl.data.rows import PromptRows
from verl.data.vision import VisionProcessor

LONGEST = 200  # characters


def doubt(answer: str) -> str:
    """The reason why a rule that compares the content of \\boxed{} may never find `answer` right; empty where nothing
    says so."""
    depth = 0
    for character in answer.replace("\\{", "").replace("\\}", ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            break
    if depth:
        return "the braces of the answer do not balance, so no \\boxed{} can hold it"
    if "\\boxed" in answer:
        return "the answer holds \\boxed{} itself; rewards compare what is inside"
    if answer.replace("\\$", "").count("$") % 2:
        return "the answer has a dollar sign without its partner"
    if len(answer) > LONGEST:
        return f"the answer has {len(answer)} characters; rules compare short answers"
    return ""


@dataclass(frozen=True)
class Look:
    """`tokens` and `sizes` (width, height of each image) are None where they cannot be known; `content` is a digest of
    problem, answer and images; `doubt` of the answer, where there is one."""

    index: int
    content: bytes
    doubt: str
    fault: Fault | None = None
    tokens: int | None = None
    sizes: tuple[tuple[int, int], ...] | None = None


def look_at(
    rows: PromptRows,
    vision: VisionProcessor | None,
    decode: bool,
    faulty: Set[int],
    start: int,
    batch: list[dict[str, Any]],
) -> list[Look]:
    """A Look for each row of `batch`, the first of which has the index `start`.

    Args:
        decode: whether to decode the images, and not only to read their headers.
        faulty: rows whose texts are at fault already; their tokens are not counted.
    """
    looks = []
    for index, row in enumerate(batch, start):
        answer = row[rows.config.answer_key]
        found: dict[str, Any] = {"content": digest(rows, row), "doubt": "" if answer is None else doubt(str(answer))}
        fault = image_fault(rows, vision, index, row) if decode else None
        try:
            images = rows.images_of(row)
            found["sizes"] = tuple(image_size(image, rows.config.image_dir) for image in images)
        except (ValueError, FileNotFoundError) as error:
            fault = fault or Fault(index, "image", str(error))
        if fault is None and vision is not None and index not in faulty:
            (counted,) = count_prompts(rows, vision, index, [row])
            fault = counted if isinstance(counted, Fault) else None
            found["tokens"] = counted if fault is None else None
        looks.append(Look(index, fault=fault, **found))
    return looks


def digest(rows: PromptRows, row: dict[str, Any]) -> bytes:
    """Equal for rows of equal problem, answer and images."""
    config = rows.config
    found = hashlib.blake2b(f"{row[config.prompt_key]}\0{row[config.answer_key]}".encode(), digest_size=16)
    for image in rows.images_of(row):
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path") or ""
        found.update(b"\0" + (image if isinstance(image, bytes) else json.dumps(image, default=str).encode()))
    return found.digest()
