"""The mathematics reward of PAPO: 0.9 for the right answer, 0.1 for the format."""

from __future__ import annotations

import re

from mathruler.grader import extract_boxed_content, grade_answer

FORMAT = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)


def compute_score(reward_inputs: list[dict], format_weight: float = 0.1) -> list[dict[str, float]]:
    """One score per response: `accuracy` and `format` are 0 or 1, `overall` is their weighted sum."""
    scores = []
    for reward_input in reward_inputs:
        # Models put spaces around the tags' brackets; they are no reason to fail the format.
        response = re.sub(r"\s*(<|>|/)\s*", r"\1", reward_input["response"])
        accuracy = float(grade_answer(extract_boxed_content(response), reward_input["ground_truth"]))
        format_score = float(FORMAT.fullmatch(response) is not None)
        overall = (1 - format_weight) * accuracy + format_weight * format_score
        scores.append({"overall": overall, "accuracy": accuracy, "format": format_score})
    return scores
