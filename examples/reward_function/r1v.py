"""R1-V's reward: half for the answer inside <answer> </answer>, half for the format."""

from __future__ import annotations

import re

from verl.workers.reward.graders import mathruler, tagged

REWARD_TYPE = "sequential"
BETWEEN = re.compile(r"</think>\s*<answer>")


def well_formed(response: str) -> bool:
    """<think> ... </think><answer> ... </answer> and nothing before, between or behind."""
    opening, closing = "<think>", "</answer>"
    if not (response.startswith(opening) and response.endswith(closing)):
        return False
    return BETWEEN.search(response, len(opening), len(response) - len(closing)) is not None


def compute_score(reward_input: dict, format_weight: float = 0.5) -> dict[str, float]:
    """`accuracy` and `format` are 0 or 1, `overall` is their weighted sum."""
    response = reward_input["response"].strip()
    answer = tagged(response)
    # Without tags the whole response stands for the answer: it may be right, in the wrong format.
    accuracy = mathruler(response if answer is None else answer, reward_input["ground_truth"].strip())
    format_score = float(well_formed(response))
    overall = (1 - format_weight) * accuracy + format_weight * format_score
    return {"overall": overall, "accuracy": accuracy, "format": format_score}
