"""The implicit perception loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from verl.algorithms.losses.estimators import k3
from verl.algorithms.losses.term import Columns, loss_term
from verl.algorithms.losses.view_rows import only_view_rows
from verl.columns import view_column
from verl.config.algorithm import LossTermConfig


@dataclass
class PerceptionKLConfig(LossTermConfig):
    """Coefficient gamma; `view` names the corrupted view."""

    kind: str = "perception_kl"
    coef: float = 0.01
    view: str = "masked"


def _requires(config: PerceptionKLConfig) -> tuple[str, ...]:
    return ("log_probs", view_column(config.view, "log_probs"), view_column(config.view, "rows"))


@loss_term("perception_kl", PerceptionKLConfig, requires=_requires, maximize=True)
def perception_kl(columns: Columns, config: PerceptionKLConfig) -> torch.Tensor:
    """k3 estimate of KL(pi_theta || pi_mask) per token (arXiv 2507.06448, eq. 2), maximised.

    The ratio is pi_mask / pi_theta, as in the released code: for tokens drawn from pi_theta it makes k3 an
    unbiased estimate of that KL. The paper prints the inverse, which estimates chi-squared minus KL.
    """
    values = k3(columns["log_probs"], columns[view_column(config.view, "log_probs")])
    return only_view_rows(values, columns, config.view)
