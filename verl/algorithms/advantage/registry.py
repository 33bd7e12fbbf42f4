"""The table of advantage estimators."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from verl.registry import Registry

# Parameters of an estimator that are settings, `algorithm.gamma` and `algorithm.lam`, not columns.
OPTIONS = ("gamma", "lam")

AdvantageFunction = Callable[..., "torch.Tensor | tuple[torch.Tensor, torch.Tensor]"]


@dataclass(frozen=True)
class AdvantageEstimator:
    """A registered estimator: `function` is pure, and the columns that it `requires` are its parameters' names.

    What no estimator needs is not made: one that reads `ref_log_probs` brings the reference, `values` the critic, and
    `baseline_scores` a greedy response to each prompt. It returns `advantages` [B, T], or (advantages, returns).
    """

    name: str
    function: AdvantageFunction
    requires: tuple[str, ...]
    options: tuple[str, ...]

    def __call__(self, columns: Mapping[str, torch.Tensor], gamma: float, lam: float) -> dict[str, torch.Tensor]:
        """The columns `advantages` and, from an estimator with a critic, `returns`."""
        settings = {"gamma": gamma, "lam": lam}
        found = self.function(*(columns[c] for c in self.requires), **{name: settings[name] for name in self.options})
        return {"advantages": found} if isinstance(found, torch.Tensor) else dict(zip(RESULTS, found, strict=True))


RESULTS = ("advantages", "returns")
ADVANTAGES: Registry[AdvantageEstimator] = Registry("advantage estimator (algorithm.adv_estimator)")


def advantage(name: str) -> Callable[[AdvantageFunction], AdvantageFunction]:
    """Decorator: register a pure function of columns as `algorithm.adv_estimator=name`.

    Its parameters are named after the columns that it reads (`scores` [B], `group` [B], `rewards` [B, T],
    `response_mask` [B, T], `accuracy` [B], `values` [B, T], `baseline_scores` [B], log-probs [B, T]); `gamma` and `lam`
    come from the config.
    """

    def add(function: AdvantageFunction) -> AdvantageFunction:
        parameters = tuple(inspect.signature(function).parameters)
        requires = tuple(p for p in parameters if p not in OPTIONS)
        options = tuple(p for p in parameters if p in OPTIONS)
        ADVANTAGES.register(name)(AdvantageEstimator(name, function, requires, options))
        return function

    return add
