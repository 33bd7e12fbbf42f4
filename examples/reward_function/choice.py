"""Multiple choice: the letter inside \\boxed{} against the letter of the ground truth."""

from __future__ import annotations

from verl.workers.reward.graders import boxed, choice, thinks_and_boxes

REWARD_TYPE = "sequential"


def compute_score(reward_input: dict, format_weight: float = 0.1) -> dict[str, float]:
    """`accuracy` and `format` are 0 or 1, `overall` is their weighted sum.

    Raises:
        ValueError: the ground truth is no letter, so that no response to it could be right.
    """
    accuracy = choice(boxed(reward_input["response"]) or "", reward_input["ground_truth"])
    format_score = float(thinks_and_boxes(reward_input["response"]))
    overall = (1 - format_weight) * accuracy + format_weight * format_score
    return {"overall": overall, "accuracy": accuracy, "format": format_score}
