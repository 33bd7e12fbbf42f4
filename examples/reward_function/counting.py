"""Counting: the number inside \\boxed{} must be the true one; how far it is off is a component of its own."""

from __future__ import annotations

from verl.workers.reward.graders import boxed, number, thinks_and_boxes

REWARD_TYPE = "sequential"


def compute_score(reward_input: dict, format_weight: float = 0.1) -> dict[str, float]:
    """`accuracy`, `format` and `close` (off by one at most) are 0 or 1; `overall` is the weighted sum of the first two.

    Raises:
        ValueError: the ground truth is no number, so that no response to it could be right.
    """
    answer, truth = boxed(reward_input["response"]) or "", reward_input["ground_truth"]
    accuracy, close = number(answer, truth), number(answer, truth, tolerance=1)
    format_score = float(thinks_and_boxes(reward_input["response"]))
    overall = (1 - format_weight) * accuracy + format_weight * format_score
    return {"overall": overall, "accuracy": accuracy, "format": format_score, "close": close}
