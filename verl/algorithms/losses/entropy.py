"""Entropy of the policy, under the original or another view."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from verl.algorithms.losses.term import Columns, loss_term, only_view_rows
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


def _column(config: EntropyTermConfig) -> str:
    what = "log_probs" if config.estimator == EntropyEstimator.sampled else "full_entropy"
    return view_column(config.view, what) if config.view else what


def _requires(config: EntropyTermConfig) -> tuple[str, ...]:
    return (_column(config), *([view_column(config.view, "rows")] if config.view else []))


@loss_term("entropy", EntropyTermConfig, requires=_requires)
def entropy(columns: Columns, config: EntropyTermConfig) -> torch.Tensor:
    """The entropy per token, minimised: PAPO's double entropy (arXiv 2507.06448, section 5.3) is this term twice,
    over the original and the masked view. The paper's H carries the other sign by mistake.

    `sampled`, as in the released code, is -log pi of the sampled tokens. It estimates the entropy's value, and its
    gradient is not that of the entropy: on-policy its expectation is zero, and what it does is to sharpen the policy
    towards what was sampled. `full` has the entropy's own gradient.
    """
    values = columns[_column(config)]
    values = -values if config.estimator == EntropyEstimator.sampled else values
    return only_view_rows(values, columns, config.view) if config.view else values
