"""Imitation of the policy's own correct responses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from verl.algorithms.losses.term import Columns, loss_term
from verl.config.algorithm import LossTermConfig


@dataclass
class SFTTermConfig(LossTermConfig):
    """Coefficient of the imitation; it has no default that a paper names."""

    kind: str = "sft"


@loss_term("sft", SFTTermConfig, requires=("log_probs", "accuracy"))
def sft(columns: Columns, config: SFTTermConfig) -> torch.Tensor:
    """-log pi per token of responses whose reward component `accuracy` is above 1/2, 0 elsewhere, minimised.

    The mean is over all tokens, so that a batch with few correct responses pulls less and not more on each.
    """
    return torch.where(columns["accuracy"][:, None] > 0.5, -columns["log_probs"], 0.0)
