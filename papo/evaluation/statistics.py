"""Statistics of answers that are right or wrong, several to a question.

Questions are drawn independently, and answers to one question are not: every interval is that of a mean over questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and half the width of its 95 % interval, by Student's t; None for a single value."""
    from scipy.stats import t as student

    if len(values) < 2:
        return float(np.mean(values)), None
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(student.ppf(0.975, len(values) - 1) * error)


def percent(value: float, interval: float | None = None, sign: str = "") -> str:
    """A share in percent, with its interval where there is one."""
    return f"{100 * value:{sign}.1f}" + (f" ± {100 * interval:.1f}" if interval is not None else "")


def accuracy(scores: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Mean accuracy over questions, its interval, and the share of questions with at least one right answer.

    Args:
        scores: By question the accuracies of its k answers, each from 0 to 1. One that could not be graded is left out;
            a question without any counts as wrong.
    """
    values = [_mean(found) for found in scores.values()]
    mean, interval = mean_and_interval(values)
    passed = float(np.mean([max(found, default=0.0) >= 1 for found in scores.values()]))
    return {"accuracy": mean, "interval": interval, "pass": passed, "questions": len(values)}


def paired(scores: Mapping[str, Sequence[float]], others: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The difference of two accuracies on the questions that both have: its mean and interval over questions, and the
    two-sided p of the sign test, which asks whether questions change for the better as often as for the worse.

    Raises ValueError where they share no question.
    """
    from scipy.stats import binomtest

    shared = [question for question in scores if question in others]
    if not shared:
        raise ValueError("no question was asked of both")
    differences = [_mean(scores[question]) - _mean(others[question]) for question in shared]
    mean, interval = mean_and_interval(differences)
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    p = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    return {
        "difference": mean,
        "interval": interval,
        "better": better,
        "worse": worse,
        "sign_test_p": p,
        "questions": len(shared),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
