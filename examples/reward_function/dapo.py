"""DAPO's reward: +1 for the right answer, -1 otherwise, and less for responses that are too long.

The framework shapes any reward alike with `algorithm.overlong_buffer` and `algorithm.overlong_penalty`; the arguments
here are those of old configs. Use one of the two, or long responses pay twice. Only a line "Answer: ..." counts,
compared by Minerva's rule; `math.py` reads \\boxed{} and compares as mathematics.
"""

from __future__ import annotations

import re

REWARD_TYPE = "sequential"
ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
LAST = 300  # characters of a response that are read

# Minerva's rule (arXiv 2206.14858, appendix D.1), by which EasyR1's and verl's DAPO rewards compare answers.
REPLACED = {
    "an ": "",
    "a ": "",
    ".$": "$",
    "\\$": "",
    "\\ ": "",
    " ": "",
    "mbox": "text",
    ",\\text{and}": ",",
    "\\text{and}": ",",
    "\\text{m}": "\\text{}",
}
REMOVED = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots", "sue", "points"),
    *("feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students"),
    *("childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3"),
    *("\\text{\n}", "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots"),
)
UNWRAPPED = [re.compile(rf"\\{word}\{{(.*?)\}}") for word in ("text", "textbf", "overline")]
BOXED = re.compile(r"\\boxed\{(.*)\}")


def normalized(answer: str) -> str:
    """An answer as it is compared: what stands behind its last "=", without units, words and TeX around it."""
    answer = answer.split("=")[-1]
    for before, after in REPLACED.items():
        answer = answer.replace(before, after)
    for words in REMOVED:
        answer = answer.replace(words, "")
    answer = re.sub(r".*?\$(.*?)\$.*", r"\1", answer)
    for wrapped in (*UNWRAPPED, BOXED):
        answer = wrapped.sub(r"\1", answer)
    answer = re.sub(r"frac([^{])(.)", r"frac{\1}{\2}", answer)
    answer = re.sub(r"sqrt([^{])", r"sqrt{\1}", answer).replace("$", "")
    return (answer.replace(",", "") if answer.replace(",", "").isdigit() else answer).strip()


def is_right(response: str, truth: str) -> float:
    """1 where the last line "Answer: ..." says the truth, letter by letter when both are normalised."""
    said = ANSWER.findall(response[-LAST:])
    return float(bool(said) and normalized(said[-1]) == normalized(truth))


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
    accuracy = is_right(reward_input["response"], reward_input["ground_truth"])
    too_long = 0.0
    if overlong_buffer_length and max_response_length:
        too_long = overlong(reward_input["response_length"], max_response_length, overlong_buffer_length)
    return {
        "overall": 2 * accuracy - 1 + overlong_penalty_factor * too_long,
        "accuracy": accuracy,
        "accuracy_normalized": accuracy,
        "overlong": too_long,
    }
