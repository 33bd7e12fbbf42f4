"""Entropy of the policy, under the original or another view."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from verl.algorithms.losses.term import Columns, TermOutput, loss_term, only_view_rows
from verl.columns import view_column
from verl.config.algorithm import LossTermConfig
from verl.config.option import option


class EntropyEstimator(StrEnum):
    """`sampled`: -log pi of the sampled tokens; `full`: the entropy itself, over the whole vocabulary."""

    sampled = "sampled"
    full = "full"


@dataclass
class EntropyTermConfig(LossTermConfig):
    """Coefficient eta."""

    kind: str = "entropy"
    view: str = option("", "name of a view; empty: the policy given the image")
    estimator: EntropyEstimator = option(EntropyEstimator.sampled, "sampled (-log pi of the tokens) or full")
    low: float | None = option(None, "keep it in a band: how far it is below this, nats, is what is minimised", least=0)
    high: float | None = option(None, "and how far it is above this; inside the band there is no gradient", least=0)

    def check(self, key: str) -> None:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"{key}.low={self.low} is above {key}.high={self.high}")
        if self.banded and self.estimator == EntropyEstimator.sampled:
            raise ValueError(f"{key}.low and .high are bounds of the entropy itself: set {key}.estimator=full")

    @property
    def banded(self) -> bool:
        return self.low is not None or self.high is not None


def _column(config: EntropyTermConfig) -> str:
    what = "log_probs" if config.estimator == EntropyEstimator.sampled else "full_entropy"
    return view_column(config.view, what) if config.view else what


def _requires(config: EntropyTermConfig) -> tuple[str, ...]:
    return (_column(config), *([view_column(config.view, "rows")] if config.view else []))


@loss_term("entropy", EntropyTermConfig, requires=_requires)
def entropy(columns: Columns, config: EntropyTermConfig) -> TermOutput | torch.Tensor:
    """The entropy per token, minimised: PAPO's double entropy (arXiv 2507.06448, section 5.3) is this term twice,
    over the original and the masked view. The paper's H carries the other sign by mistake.

    `sampled`, as in the released code, is -log pi of the sampled tokens. It estimates the entropy's value, and its
    gradient is not that of the entropy: on-policy its expectation is zero, and what it does is to sharpen the policy
    towards what was sampled. `full` has the entropy's own gradient.

    With `low` or `high` the values are max(low - H, 0) + max(H - high, 0), and H itself is logged as
    `actor/<view>_full_entropy`.
    """
    values = columns[_column(config)]
    values = -values if config.estimator == EntropyEstimator.sampled else values
    if not config.banded:
        return only_view_rows(values, columns, config.view) if config.view else values
    below = values.new_zeros(()) if config.low is None else (config.low - values).clamp(min=0)
    above = values.new_zeros(()) if config.high is None else (values - config.high).clamp(min=0)
    outside = below + above
    outside = only_view_rows(outside, columns, config.view) if config.view else outside
    return TermOutput(outside, {_column(config): values})
