"""`algorithm.*`: the advantage, the loss terms and the views."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING


class LossAverage(StrEnum):
    """How per-token values become one number: over all valid tokens, over sequences of token means, or over
    sequences of token sums divided by data.max_response_length."""

    token = "token"
    seq = "seq"
    seq_sum = "seq_sum"


@dataclass
class LossTermConfig:
    """Base of every loss term's options. A term that is listed is computed; with coefficient 0 it is a metric.

    A term with a new set of options subclasses this, sets `kind` to its registered name, and may extend `check`.
    """

    kind: str = MISSING
    coef: float = 0.0

    def check(self, key: str) -> None:
        """Raise ValueError, naming `key`, where a value has no meaning."""
        if not math.isfinite(self.coef) or self.coef < 0:
            raise ValueError(
                f"{key}.coef={self.coef}: a finite value of 0 or more is needed; whether a term is minimised or "
                "maximised belongs to the term, not to its sign here"
            )


@dataclass
class ViewConfig:
    """Base of every view's options. `grad: true` makes the view's forward part of the update, so that gradient
    flows through it; otherwise one pass without gradient runs before the updates of a step."""

    kind: str = MISSING
    grad: bool = False

    def check(self, key: str) -> None:
        """Raise ValueError, naming `key`, where a value has no meaning."""


@dataclass
class AlgorithmConfig:
    """`terms` and `views` are filled by name from the Hydra groups `term` and `view`."""

    adv_estimator: str = "grpo"
    terms: dict[str, LossTermConfig] = field(default_factory=dict)
    views: dict[str, ViewConfig] = field(default_factory=dict)
