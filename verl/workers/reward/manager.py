"""The rule-based reward manager: a user's batch function, checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypedDict

from verl.config.worker import RewardConfig
from verl.utils.imports import import_function


class RewardInput(TypedDict):
    """What a reward function sees of one response."""

    response: str  # decoded, without special tokens
    response_length: int  # tokens, end token included
    ground_truth: str  # column `data.answer_key`


class RewardScore(TypedDict, total=False):
    """What it returns for it: `overall` trains; every other entry is a component that is logged by its name."""

    overall: float
    accuracy: float
    format: float


RewardFunction = Callable[..., list[RewardScore]]


class RewardManager:
    """Calls the function in `worker.reward.reward_function` and does not trust what it returns."""

    def __init__(self, config: RewardConfig) -> None:
        self.name = config.reward_function
        self.kwargs: dict[str, Any] = config.reward_function_kwargs
        self.function: RewardFunction = import_function(config.reward_function, "worker.reward.reward_function")

    def score(self, inputs: list[RewardInput]) -> list[RewardScore]:
        """One score per input.

        Raises:
            RuntimeError: the function raised.
            ValueError: it returned another number of scores, a score without `overall`, components that differ
                between responses, or a value that is no finite number; the message shows the response.
        """
        try:
            scores = self.function(inputs, **self.kwargs)
        except Exception as error:
            raise RuntimeError(
                f"the reward function {self.name} raised {type(error).__name__}: {error}\nfirst input: {inputs[:1]}"
            ) from error
        if not isinstance(scores, list) or len(scores) != len(inputs):
            count = len(scores) if isinstance(scores, list) else f"a {type(scores).__name__}, not a list"
            raise ValueError(f"the reward function {self.name} returned {count} for {len(inputs)} inputs")
        for reward_input, score in zip(inputs, scores, strict=True):
            self._check(reward_input, score, set(scores[0]) if isinstance(scores[0], dict) else set())
        # Scores of responses that wait are part of a checkpoint, and numpy's floats are no plain ones.
        return [{name: float(v) if isinstance(v, float) else v for name, v in score.items()} for score in scores]

    def _check(self, reward_input: RewardInput, score: Any, keys: set[str]) -> None:
        problem = None
        if not isinstance(score, dict) or "overall" not in score:
            problem = "a score is a dict with at least 'overall'"
        elif set(score) != keys:
            problem = f"components differ: {sorted(score)} here and {sorted(keys)} for the first response"
        elif not all(isinstance(v, (int, float)) and math.isfinite(v) for v in score.values()):
            problem = "every component is a finite number"
        if problem:
            raise ValueError(f"the reward function {self.name} returned {score!r} ({problem}) for {reward_input}")
