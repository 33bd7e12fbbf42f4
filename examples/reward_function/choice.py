"""Multiple choice: the letter inside \\boxed{} against the letter of the ground truth."""

from __future__ import annotations

import re

from mathruler.grader import extract_boxed_content

FORMAT = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)
# A letter alone, or marked off from its text: "B", "(B)", "B.", "B) 45 degrees", "\text{B}". "A triangle" is no choice.
LETTER = re.compile(r"\s*(?:\\text(?:bf)?\{\s*)?\(?\s*([A-Za-z])\s*(?:[).:,}]|$)")


def letter(text: str) -> str | None:
    """The choice that `text` begins with, in upper case; None where it begins with no single letter."""
    found = LETTER.match(text)
    return found.group(1).upper() if found else None


def compute_score(reward_inputs: list[dict], format_weight: float = 0.1) -> list[dict[str, float]]:
    """One score per response: `accuracy` and `format` are 0 or 1, `overall` is their weighted sum.

    Raises:
        ValueError: a ground truth is no letter, so that no response to it could be right.
    """
    scores = []
    for reward_input in reward_inputs:
        truth = letter(reward_input["ground_truth"])
        if truth is None:
            raise ValueError(f"the ground truth '{reward_input['ground_truth']}' begins with no choice's letter")
        accuracy = float(letter(extract_boxed_content(reward_input["response"])) == truth)
        format_score = float(FORMAT.fullmatch(reward_input["response"]) is not None)
        overall = (1 - format_weight) * accuracy + format_weight * format_score
        scores.append({"overall": overall, "accuracy": accuracy, "format": format_score})
    return scores
