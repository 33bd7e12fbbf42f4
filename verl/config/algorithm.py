"""`algorithm.*`: the advantage, the loss terms and the views."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING


class LossAverage(StrEnum):
    """How per-token values become one number: over all valid tokens, or over sequences of token means."""

    token = "token"
    seq = "seq"


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


class ViewStage(StrEnum):
    """When a view changes a picture: as it is in the data, or resized as the model will see it."""

    raw = "raw"
    resized = "resized"


class ViewPer(StrEnum):
    """What has random numbers of its own: a prompt, whose responses then share its images, or each response."""

    prompt = "prompt"
    response = "response"


@dataclass
class ViewConfig:
    """Base of every view's options. `grad: true` makes the view's forward part of the update, so that gradient
    flows through it; otherwise one pass without gradient runs before the updates of a step.

    `stage: resized` aligns patches with those of the vision tower, where the sizes agree; `raw` is what the paper's
    released code does. `per: response` costs as many image tensors as there are responses. `column` names the
    dataset column whose pictures the view changes, as many as the prompt has; null: the prompt's own.
    """

    kind: str = MISSING
    grad: bool = False
    stage: ViewStage = ViewStage.raw
    per: ViewPer = ViewPer.prompt
    column: str | None = None

    def check(self, key: str) -> None:
        """Raise ValueError, naming `key`, where a value has no meaning."""


@dataclass
class AlgorithmConfig:
    """`terms` and `views` are filled by name from the Hydra groups `term` and `view`."""

    adv_estimator: str = "grpo"
    terms: dict[str, LossTermConfig] = field(default_factory=dict)
    views: dict[str, ViewConfig] = field(default_factory=dict)
