"""What a check says: one line and, where something is wrong, the way out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

GIB = 2**30


class Level(StrEnum):
    """`error`: the run will not work. `warning`: it will, worse than it could, or this could not be made sure."""

    ok = "ok"
    warning = "warning"
    error = "error"


@dataclass(frozen=True)
class Finding:
    """`topic` is a word or two, `text` one line, `fix` what to do, empty where nothing is to do."""

    level: Level
    topic: str
    text: str
    fix: str = ""


def ok(topic: str, text: str) -> Finding:
    return Finding(Level.ok, topic, text)


def warning(topic: str, text: str, fix: str) -> Finding:
    return Finding(Level.warning, topic, text, fix)


def error(topic: str, text: str, fix: str = "") -> Finding:
    return Finding(Level.error, topic, text, fix)


def in_short(reason: BaseException) -> str:
    """An exception in one line."""
    lines = str(reason).strip().splitlines() or ["no message"]
    return f"{type(reason).__name__}: {lines[0][:200]}"


def in_gib(size: float) -> str:
    """Bytes as one reads them."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"
