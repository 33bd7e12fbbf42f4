"""Inputs and results of reward functions, and the outcome of grading a response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict


class RewardInput(TypedDict):
    """Input of a reward function for one response."""

    response: str  # decoded, without special tokens
    response_length: int  # tokens, end token included
    ground_truth: str  # column `data.answer_key`
    uid: NotRequired[str]  # the prompt: file and row
    problem: NotRequired[str]  # the prompt's text as the model reads it, for judges
    response_ids: NotRequired[list[int]]  # its tokens
    step: NotRequired[int]  # training steps that were done when it was drawn


class RewardScore(TypedDict, total=False):
    """Result for one response: `overall` trains; every other entry is a component that is logged by its name. A
    component that is None does not apply to this response, and its means leave that out."""

    overall: float
    accuracy: float | None
    format: float | None


@dataclass(frozen=True)
class Failure:
    """The reason why a response has no score: `reason` is timeout, memory, died, raised or not_finite, `detail` is for
    people.

    `shared` failures are those of a call for several responses: any of them may be the guilty one.
    """

    reason: str
    detail: str
    shared: bool = False


@dataclass(frozen=True)
class Outcome:
    """A score, which may well say that the response is wrong, or a failure of the grader, which says nothing about the
    response. `seconds` is what grading took."""

    score: RewardScore | None
    failure: Failure | None
    seconds: float


class RewardError(Exception):
    """A reward function that cannot be used; the message shows the sample. `failures` are records of samples that were
    not graded, for the run's files."""

    def __init__(self, message: str, failures: list[dict] | None = None) -> None:
        super().__init__(message)
        self.failures = failures or []


def readable(reward_input: RewardInput) -> dict[str, Any]:
    """A sample as a person reads it: without token ids and step."""
    return {name: value for name, value in reward_input.items() if name not in ("response_ids", "step")}


def shown(reward_input: RewardInput) -> str:
    """A sample for an error message."""
    return "\n".join(f"  {name}: {cut(str(value))!r}" for name, value in readable(reward_input).items())


def component_means(scores: Sequence[RewardScore]) -> dict[str, float]:
    """The mean of each component over the scores to which it applies; of one that applies to none there is no mean."""
    values: dict[str, list[float]] = {}
    for score in scores:
        for name, value in score.items():
            if value is not None:
                values.setdefault(name, []).append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}


def cut(text: str, longest: int = 2000) -> str:
    """The two ends of a long text."""
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} [...] {text[-half:]}"
