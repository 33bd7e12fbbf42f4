"""Digits with a shortcut: the problem also says what a friend reads, and the friend is not always right.

A model can read the picture or copy the friend. Validation has four files: `no_hint`, `hint_right`, `hint_wrong` (the
friend's sum is not the answer) and `blank_hint_right`, where the picture is white and only the friend knows.
"""

from __future__ import annotations

import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from papo.quickstart.artifacts import is_current
from papo.quickstart.digits import DEFAULT_SETTINGS, DIGIT_PIXELS, PROBLEM, DigitsSettings, compose, png, write_data

logger = logging.getLogger(__name__)

FRIEND = re.compile(r"A friend reads ([0-9+]+)\.")


@dataclass(frozen=True)
class HintSettings:
    """The share of digits that the friend reads right, in the warm start's rows and in those of reinforcement
    learning."""

    sft_right: float
    train_right: float
    target_loss: float  # of the warm start; lower than without hints, which make the rows easier to guess
    sft_without: float = 0.2  # share of rows without a hint
    train_without: float = 0.2


TASKS = {
    # The start learns to trust the friend, who then reads worse than before.
    "misled": HintSettings(sft_right=0.95, train_right=0.6, target_loss=0.24),
    # The friend stays a better reader than the start: to copy is the better policy.
    "mild": HintSettings(sft_right=0.85, train_right=0.85, target_loss=0.27),
}


def hint_of(problem: str) -> int | None:
    """The sum of the digits that the friend reads, or None where the problem has no hint."""
    found = FRIEND.search(problem)
    return sum(map(int, found[1].split("+"))) if found else None


def build_hinted_data(
    out_dir: Path, hints: HintSettings, seed: int = 0, settings: DigitsSettings = DEFAULT_SETTINGS
) -> Path:
    """Write `sft`, `train` and the four validation files into `out_dir`, or reuse them; columns as in `build_data`."""
    recipe = {"kind": "hints", "version": 1, "seed": seed, **asdict(settings), **asdict(hints)}
    if is_current(out_dir, recipe):
        logger.info("Reusing the data in %s.", out_dir)
        return out_dir
    rng = np.random.default_rng([seed, 3])
    plain = compose(settings, seed)
    val = plain["val"]
    right = [_with_hint(row, row["digits"]) for row in val]
    files = {
        "sft": [_draw(row, hints.sft_right, hints.sft_without, rng) for row in plain["sft"]],
        "train": [_draw(row, hints.train_right, hints.train_without, rng) for row in plain["train"]],
        "no_hint": val,
        "hint_right": right,
        "hint_wrong": [_with_hint(row, _wrong(row["digits"], hints.train_right, rng)) for row in val],
        "blank_hint_right": [_blank(row) for row in right],
    }
    write_data(out_dir, recipe, files)
    return out_dir


def _draw(row: dict[str, Any], right: float, without: float, rng: np.random.Generator) -> dict[str, Any]:
    return row if rng.random() < without else _with_hint(row, _reading(row["digits"], right, rng))


def _reading(digits: list[int], right: float, rng: np.random.Generator) -> list[int]:
    """The friend's reading: each digit right with probability `right`, else any other one."""
    wrong = rng.random(len(digits)) >= right
    return ((np.array(digits) + wrong * rng.integers(1, 10, len(digits))) % 10).tolist()


def _wrong(digits: list[int], right: float, rng: np.random.Generator) -> list[int]:
    """The same, drawn until the sum is not that of `digits`."""
    while sum(found := _reading(digits, right, rng)) == sum(digits):
        pass
    return found


def _with_hint(row: dict[str, Any], reading: list[int]) -> dict[str, Any]:
    return {**row, "problem": f"{PROBLEM} A friend reads {'+'.join(map(str, reading))}."}


def _blank(row: dict[str, Any]) -> dict[str, Any]:
    white = np.full((len(row["digits"]), DIGIT_PIXELS, DIGIT_PIXELS), 255, dtype=np.uint8)
    return {**row, "images": [{"bytes": png(white), "path": "blank.png"}]}
