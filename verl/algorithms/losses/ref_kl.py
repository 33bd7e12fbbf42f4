"""KL to the frozen reference policy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from verl.algorithms.losses.estimators import k3
from verl.algorithms.losses.term import Columns, loss_term
from verl.config.algorithm import LossTermConfig
from verl.config.option import option


@dataclass
class RefKLTermConfig(LossTermConfig):
    """Coefficient beta of the KL to the reference."""

    kind: str = "ref_kl"
    coef: float = option(0.01, "coefficient beta", least=0)


@loss_term("ref_kl", RefKLTermConfig, requires=("log_probs", "ref_log_probs"))
def ref_kl(columns: Columns, config: RefKLTermConfig) -> torch.Tensor:
    """k3 estimate of KL(pi || pi_ref) per token (GRPO, arXiv 2402.03300, eq. 4)."""
    return k3(columns["log_probs"], columns["ref_log_probs"])
