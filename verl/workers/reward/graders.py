"""Graders: pure functions (answer, truth) -> 0 to 1, and what finds the answer and checks the format of a response.

Reward functions are made of them; examples/reward_function/answer.py offers each by its name. All read a response in
time that grows with its length alone, but for the two symbolic graders: those parse no answer of more than
LONGEST_ANSWER characters, which then counts only if it is the truth letter by letter.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable

LONGEST_ANSWER = 1000  # characters; sympy's time can grow with the length of an expression without bound
MOST_BOXES = 200

# A letter alone, or marked off from its text: "B", "(B)", "B.", "B) 45 degrees", "\text{B}". "A triangle" is no choice.
LETTER = re.compile(r"\s*(?:\\text(?:bf)?\{\s*)?\(?\s*([A-Za-z])\s*(?:[).:,}]|$)")
NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
FOUR = r",\s*".join([r"(-?\d+(?:\.\d+)?)\s*"] * 4)
BOX = re.compile(rf"[\[(]\s*{FOUR}[\])]")


def boxed(response: str) -> str | None:
    """The content of the last \\boxed{}, with its own braces in pairs; None where there is none, or it does not end."""
    _, found, rest = response.rpartition("\\boxed{")
    depth = 0
    for end, character in enumerate(rest if found else ""):
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return rest[:end].strip()
    return None


def tagged(response: str, tag: str = "answer") -> str | None:
    """The content of the first <tag> </tag>; None where there is none, or it does not end."""
    _, _, rest = response.partition(f"<{tag}>")
    content, found, _ = rest.partition(f"</{tag}>")
    return content.strip() if found else None


def thinks_and_boxes(response: str) -> bool:
    """Whether a response is <think> ... </think> ... \\boxed{ ... } ..., from its beginning on and in this order."""
    thought = response.find("</think>", len("<think>")) if response.startswith("<think>") else -1
    box = response.find("\\boxed{", thought + len("</think>")) if thought >= 0 else -1
    return box >= 0 and response.find("}", box + len("\\boxed{")) >= 0


def close_tags(text: str) -> str:
    """`text` without the spaces around < > and /, which models like to put there."""
    parts = re.split(r"([<>/])", text)  # texts at even places
    last = len(parts) - 1
    for place in range(0, len(parts), 2):
        parts[place] = parts[place].lstrip() if place else parts[place]
        parts[place] = parts[place].rstrip() if place < last else parts[place]
    return "".join(parts)


def exact(answer: str, truth: str) -> float:
    """The same words, whatever the case and the spaces between them."""
    return float(answer.casefold().split() == truth.casefold().split())


def choice_letter(text: str) -> str | None:
    """The choice that `text` begins with, in upper case; None where it begins with no single letter."""
    found = LETTER.match(text)
    return found.group(1).upper() if found else None


def choice(answer: str, truth: str) -> float:
    """The same letter. Raises ValueError where the truth begins with none, so that no answer could be right."""
    letter = choice_letter(truth)
    if letter is None:
        raise ValueError(f"the ground truth '{truth}' begins with no choice's letter")
    return float(choice_letter(answer) == letter)


def the_number(text: str) -> float | None:
    """The one number in `text`, in digits or as a word up to twelve; None where there is none, or more than one."""
    found = [float(digits.replace(",", "")) for digits in NUMBER.findall(text)]
    found += [float(WORDS.index(word)) for word in re.findall(r"[a-z]+", text.lower()) if word in WORDS]
    return found[0] if len(found) == 1 else None


def number(answer: str, truth: str, tolerance: float = 0.0, relative: float = 0.0) -> float:
    """A number at most `tolerance` away from the true one, or the share `relative` of that.

    Counting is this with a tolerance of 0. Raises ValueError where the truth is no number.
    """
    expected, found = the_number(truth), the_number(answer)
    if expected is None or not math.isfinite(expected):
        raise ValueError(f"the ground truth '{truth}' is no number")
    if found is None:
        return 0.0
    return float(found == expected or abs(found - expected) <= max(tolerance, relative * abs(expected)))


def boxes(text: str) -> list[tuple[float, ...]]:
    """Every [x1, y1, x2, y2] or (x1, y1, x2, y2) in `text`, also inside JSON; at most MOST_BOXES of them."""
    found = []
    for match in BOX.finditer(text):
        found.append(tuple(map(float, match.groups())))
        if len(found) == MOST_BOXES:
            break
    return found


def box_iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union of two boxes; 0 where one has no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) if box[2] > box[0] and box[3] > box[1] else 0.0 for box in (a, b)]
    if width <= 0 or height <= 0 or not min(areas) > 0:
        return 0.0
    union = sum(areas) - width * height
    return width * height / union if math.isfinite(union) else 0.0


def iou(answer: str, truth: str, threshold: float | None = None) -> float:
    """Mean intersection over union of the boxes, each with the one it is matched to so that the sum is the largest; a
    box too many or too few counts 0. With a `threshold`, the share of boxes whose overlap reaches it.

    Raises ValueError where the truth has no box.
    """
    from scipy.optimize import linear_sum_assignment

    expected, found = boxes(truth), boxes(answer)
    if not expected:
        raise ValueError(f"the ground truth '{truth}' has no box [x1, y1, x2, y2]")
    if not found:
        return 0.0
    overlaps = [[box_iou(a, b) for b in expected] for a in found]
    values = [
        overlaps[row][column] for row, column in zip(*linear_sum_assignment(overlaps, maximize=True), strict=True)
    ]
    if threshold is not None:
        values = [float(value >= threshold) for value in values]
    return sum(values) / max(len(expected), len(found))


def mathruler(answer: str, truth: str) -> float:
    """Equal as text after normalisation, or by sympy: mathruler's rule, which PAPO's reward is made of."""
    from mathruler.grader import grade_answer

    if len(answer) > LONGEST_ANSWER:
        return float(answer.strip() == truth.strip())
    return float(grade_answer(answer, truth))


def math_verify(answer: str, truth: str) -> float:
    """Equal by math-verify, with both read as LaTeX. Its own timers are off: they are signals, and the grader process
    has a limit anyway.

    Raises ValueError where the truth cannot be parsed.
    """
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timers are off
    if len(answer) > LONGEST_ANSWER:
        return float(answer.strip() == truth.strip())
    expected = parse(f"\\boxed{{{truth}}}", parsing_timeout=None)
    if not expected:
        raise ValueError(f"math-verify cannot parse the ground truth '{truth}'")
    return float(verify(expected, parse(f"\\boxed{{{answer}}}", parsing_timeout=None), timeout_seconds=None))


GRADERS: dict[str, Callable[..., float]] = {
    grader.__name__: grader for grader in (exact, choice, number, iou, mathruler, math_verify)
}
