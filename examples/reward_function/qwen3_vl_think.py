"""The mathematics reward for Thinking models, whose chat template has written the opening <think> already."""

from __future__ import annotations

import os

from verl.utils.imports import import_function

REWARD_TYPE = "sequential"
MATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "math.py")
math_score = import_function(f"{MATH}:compute_score", "examples/reward_function/qwen3_vl_think.py")


def compute_score(reward_input: dict, format_weight: float = 0.1) -> dict[str, float]:
    """As math.py's, where a response may begin inside its thoughts."""
    response = reward_input["response"]
    # Behind its own </think> an opening tag is part of an answer and no beginning.
    if "<think>" not in response.partition("</think>")[0]:
        reward_input = {**reward_input, "response": f"<think>{response}"}
    return math_score(reward_input, format_weight)
