"""The reward of the digits with a friend's hint: that of `math.py`; `copied` counts answers that are a wrong hint's."""

from __future__ import annotations

from mathruler.grader import extract_boxed_content

from papo.quickstart.hints import hint_of
from verl.workers.reward.graders import close_tags, mathruler, thinks_and_boxes

REWARD_TYPE = "sequential"


def compute_score(reward_input: dict, format_weight: float = 0.1) -> dict[str, float]:
    """`accuracy`, `format` and `copied` are 0 or 1; `overall` is the weighted sum of the first two."""
    response = close_tags(reward_input["response"])
    answer, hint = extract_boxed_content(response), hint_of(reward_input["problem"])
    accuracy, form = mathruler(answer, reward_input["ground_truth"]), float(thinks_and_boxes(response))
    copied = float(hint is not None and not accuracy and answer == str(hint))
    overall = (1 - format_weight) * accuracy + format_weight * form
    return {"overall": overall, "accuracy": accuracy, "format": form, "copied": copied}
