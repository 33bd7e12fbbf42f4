"""Any of the framework's graders by its name, as in +worker.reward.reward_function_kwargs.grader=number
+worker.reward.reward_function_kwargs.relative=0.05 +worker.reward.reward_function_kwargs.place=tag."""

from __future__ import annotations

from verl.workers.reward.graders import GRADERS, boxed, tagged, thinks_and_boxes

REWARD_TYPE = "sequential"
PLACES = {"box": boxed, "tag": tagged, "all": str}


def compute_score(
    reward_input: dict, grader: str = "mathruler", place: str = "box", format_weight: float = 0.0, **options: float
) -> dict[str, float]:
    """`accuracy`, from 0 to 1, is the grader's; `format` is 0 or 1; `overall` is their weighted sum.

    Args:
        grader: exact, choice, number, iou, mathruler or math_verify, with its own `options`.
        place: where the answer stands: in the last \\boxed{}, the first <answer> </answer>, or `all` of the response.
            Without an answer, the accuracy is 0.

    Raises:
        ValueError: an unknown grader or place, or a ground truth that no answer could match.
    """
    for word, known in ((grader, GRADERS), (place, PLACES)):
        if word not in known:
            raise ValueError(f"'{word}' is none of {', '.join(known)}")
    answer = PLACES[place](reward_input["response"])
    accuracy = GRADERS[grader](answer or "", reward_input["ground_truth"], **options)
    format_score = float(thinks_and_boxes(reward_input["response"]))
    overall = (1 - format_weight) * accuracy + format_weight * format_score
    return {"overall": overall, "accuracy": accuracy, "format": format_score}
