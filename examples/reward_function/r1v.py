"""R1-V's reward: half for the answer inside <answer> </answer>, half for the format."""

from __future__ import annotations

import re

from mathruler.grader import grade_answer

FORMAT = re.compile(r"<think>.*?</think>\s*<answer>(.*?)</answer>", re.DOTALL)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def compute_score(reward_inputs: list[dict], format_weight: float = 0.5) -> list[dict[str, float]]:
    """One score per response: `accuracy` and `format` are 0 or 1, `overall` is their weighted sum."""
    scores = []
    for reward_input in reward_inputs:
        response = reward_input["response"].strip()
        found = ANSWER.search(response)
        # Without tags the whole response stands for the answer: it may be right, in the wrong format.
        answer = (found.group(1) if found else response).strip()
        accuracy = float(grade_answer(answer, reward_input["ground_truth"].strip()))
        format_score = float(FORMAT.fullmatch(response) is not None)
        overall = (1 - format_weight) * accuracy + format_weight * format_score
        scores.append({"overall": overall, "accuracy": accuracy, "format": format_score})
    return scores
