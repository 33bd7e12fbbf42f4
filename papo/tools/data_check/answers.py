"""Answers that no response could match, as far as their text shows it."""

from __future__ import annotations

LONGEST = 200  # characters


def doubt(answer: str) -> str:
    """Why a rule that compares the content of \\boxed{} may never find `answer` right; empty where nothing says so."""
    depth = 0
    for character in answer.replace("\\{", "").replace("\\}", ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            break
    if depth:
        return "the braces of the answer do not balance, so no \\boxed{} can hold it"
    if "\\boxed" in answer:
        return "the answer holds \\boxed{} itself; rewards compare what is inside"
    if answer.replace("\\$", "").count("$") % 2:
        return "the answer has a dollar sign without its partner"
    if len(answer) > LONGEST:
        return f"the answer has {len(answer)} characters; rules compare short answers"
    return ""
