"""`papo data check`: what is wrong with files of prompts, before a run reads them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BadRow:
    """A line of bad_rows.jsonl. `level` is error, where a run would stop, or warning."""

    file: str
    row: int
    level: str
    kind: str
    text: str
