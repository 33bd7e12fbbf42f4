"""DAPO's reward: +1 for the right answer, -1 otherwise, and less for responses that are too long.

The framework shapes any reward alike with `algorithm.overlong_buffer` and `algorithm.overlong_penalty`; the arguments
here are those of old configs. Use one of the two, or long responses pay twice.
"""

from __future__ import annotations

import re

from mathruler.grader import extract_boxed_content

from verl.workers.reward.graders import mathruler

REWARD_TYPE = "sequential"
ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)


def answer(response: str) -> str:
    """What the last line "Answer: ..." says, without the mathematics' dollars; else what is boxed."""
    lines = ANSWER.findall(response)
    if not lines:
        return extract_boxed_content(response)
    text = lines[-1].strip().strip("*").strip().strip("$").strip()
    return extract_boxed_content(text) if "\\boxed" in text else text


def overlong(length: int, longest: int, buffer: int) -> float:
    """0 up to `longest` - `buffer` tokens, then down to -1 at `longest` (arXiv 2503.14476, eq. 13)."""
    return max(-1.0, min(0.0, (longest - buffer - length) / buffer))


def compute_score(
    reward_input: dict,
    max_response_length: int | None = None,
    overlong_buffer_length: int = 0,
    overlong_penalty_factor: float = 1.0,
) -> dict[str, float]:
    """`overall` is +1 or -1, plus `overlong` (-1 to 0) times its factor where a buffer is set. `accuracy` is 0 or 1;
    `accuracy_normalized` is the same, under the name that old configs filter by.

    Raises:
        ValueError: a buffer that does not fit into max_response_length.
    """
    if overlong_buffer_length and not 0 < overlong_buffer_length <= (max_response_length or 0):
        raise ValueError(
            f"overlong_buffer_length={overlong_buffer_length}: from 0 (off) to "
            f"max_response_length={max_response_length}"
        )
    accuracy = mathruler(answer(reward_input["response"]), reward_input["ground_truth"])
    too_long = 0.0
    if overlong_buffer_length and max_response_length:
        too_long = overlong(reward_input["response_length"], max_response_length, overlong_buffer_length)
    return {
        "overall": 2 * accuracy - 1 + overlong_penalty_factor * too_long,
        "accuracy": accuracy,
        "accuracy_normalized": accuracy,
        "overlong": too_long,
    }
