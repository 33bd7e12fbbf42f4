"""Data sets of conversations, as PAPO-Eval's (ShareGPT), turned into rows of problems and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from verl.data.files import open_rows
from verl.data.rows import IMAGE_MARKER
from verl.utils.files import atomic_path

IMAGES = "images"
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's own words


def write_rows(reference: str, column: str, path: Path) -> None:
    """Write the conversations in `column` of what `reference` names as a parquet file of `problem`, `answer` and
    `images`: the one question of the user, and the assistant's answer to it.

    Raises ValueError or FileNotFoundError naming the file and row.
    """
    opened = open_rows(reference, "data", {column: "which the suite's `messages` names"}, (IMAGES,))
    table = opened.dataset.data.table
    problems, answers = [], []
    for index, turns in enumerate(table.column(column).to_pylist()):
        try:
            problem, answer = question_of(turns)
        except ValueError as error:
            name, number = opened.origin(index)
            raise ValueError(f"'{name}', row {number}, column '{column}': {error}") from error
        problems.append(problem)
        answers.append(answer)
    columns = {"problem": pa.array(problems), "answer": pa.array(answers)}
    if IMAGES in table.column_names:
        columns[IMAGES] = table.column(IMAGES)
    with atomic_path(str(path)) as temporary:
        pq.write_table(pa.table(columns), temporary)


def question_of(turns: Any) -> tuple[str, str]:
    """(problem, answer) of a conversation with one question; parts of a message that are images become `<image>`.
    Raises ValueError."""
    found: dict[str, str] = {}
    for turn in turns or []:
        role = turn.get("role") or turn.get("from")
        role = ROLES.get(role, role)
        if role not in ("user", "assistant") or role in found:
            raise ValueError(f"expected one question of the user and one answer, found the turns {_roles(turns)}")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        found[role] = content if isinstance(content, str) else "".join(map(_part, content or []))
    if list(found) != ["user", "assistant"]:
        raise ValueError(f"expected one question of the user and one answer, found the turns {_roles(turns)}")
    return found["user"], found["assistant"]


def _roles(turns: Any) -> str:
    return ", ".join(str(turn.get("role") or turn.get("from")) for turn in turns or []) or "none"


def _part(part: dict[str, Any]) -> str:
    return IMAGE_MARKER if part.get("type") == "image" else part.get("text") or ""
