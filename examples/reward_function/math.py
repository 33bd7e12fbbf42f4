"""The mathematics reward of PAPO: 0.9 for the right answer, 0.1 for the format."""

from __future__ import annotations

from mathruler.grader import extract_boxed_content

from verl.workers.reward.graders import close_tags, mathruler, thinks_and_boxes

REWARD_TYPE = "sequential"


def compute_score(reward_input: dict, format_weight: float = 0.1) -> dict[str, float]:
    """`accuracy` and `format` are 0 or 1, `overall` is their weighted sum."""
    # Models put spaces around the tags' brackets; they are no reason to fail the format.
    response = close_tags(reward_input["response"])
    accuracy = mathruler(extract_boxed_content(response), reward_input["ground_truth"])
    format_score = float(thinks_and_boxes(response))
    overall = (1 - format_weight) * accuracy + format_weight * format_score
    return {"overall": overall, "accuracy": accuracy, "format": format_score}
