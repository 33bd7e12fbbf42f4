"""Counting: the number inside \\boxed{} must be the true one; how far it is off is a component of its own."""

from __future__ import annotations

import re

from mathruler.grader import extract_boxed_content

FORMAT = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def number(text: str) -> float | None:
    """The one number in `text`, in digits or as a word up to twelve; None where there is none, or more than one."""
    found = [float(digits.replace(",", "")) for digits in NUMBER.findall(text)]
    found += [float(WORDS.index(word)) for word in re.findall(r"[a-z]+", text.lower()) if word in WORDS]
    return found[0] if len(found) == 1 else None


def compute_score(reward_inputs: list[dict], format_weight: float = 0.1) -> list[dict[str, float]]:
    """One score per response: `accuracy`, `format` and `close` (off by one at most) are 0 or 1; `overall` is the
    weighted sum of the first two.

    Raises:
        ValueError: a ground truth is no number, so that no response to it could be right.
    """
    scores = []
    for reward_input in reward_inputs:
        truth = number(reward_input["ground_truth"])
        if truth is None:
            raise ValueError(f"the ground truth '{reward_input['ground_truth']}' is no number")
        count = number(extract_boxed_content(reward_input["response"]))
        accuracy = float(count == truth)
        close = float(count is not None and abs(count - truth) <= 1)
        format_score = float(FORMAT.fullmatch(reward_input["response"]) is not None)
        overall = (1 - format_weight) * accuracy + format_weight * format_score
        scores.append({"overall": overall, "accuracy": accuracy, "format": format_score, "close": close})
    return scores
