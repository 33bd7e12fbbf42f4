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


def _correct(columns: Columns) -> torch.Tensor:
    return columns["accuracy"] > 0.5


def _counted(config: SFTTermConfig, columns: Columns) -> torch.Tensor:
    return columns["response_mask"].sum(-1) * _correct(columns)


@loss_term("sft", SFTTermConfig, requires=("log_probs", "accuracy"), counted=_counted)
def sft(columns: Columns, config: SFTTermConfig) -> torch.Tensor:
    """-log pi per token of responses whose reward component `accuracy` is above 1/2, minimised.

    The mean is over the tokens of those responses, as in PAPO's released code; without one the term is 0.
    """
    return torch.where(_correct(columns)[:, None], -columns["log_probs"], 0.0)
