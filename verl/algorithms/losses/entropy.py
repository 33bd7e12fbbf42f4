"""Entropy of the sampled tokens, under the original or another view."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from verl.algorithms.losses.term import Columns, loss_term
from verl.algorithms.losses.view_rows import only_view_rows
from verl.columns import view_column
from verl.config.algorithm import LossTermConfig


@dataclass
class EntropyTermConfig(LossTermConfig):
    """`view`: empty for the policy as it sees the image, else the name of a view."""

    kind: str = "entropy"
    view: str = ""


def _requires(config: EntropyTermConfig) -> tuple[str, ...]:
    if not config.view:
        return ("log_probs",)
    return (view_column(config.view, "log_probs"), view_column(config.view, "rows"))


@loss_term("entropy", EntropyTermConfig, requires=_requires)
def entropy(columns: Columns, config: EntropyTermConfig) -> torch.Tensor:
    """-log pi of the sampled tokens, minimised: PAPO's double entropy (arXiv 2507.06448, section 5.3) is this
    term twice, over the original and the masked view. The paper's H carries the other sign by mistake.

    It is the sampled-token estimate of the entropy's value. Its gradient is not that of the entropy: on-policy
    its expectation is zero, and what it does is to sharpen the policy towards what was sampled.
    """
    if not config.view:
        return -columns["log_probs"]
    return only_view_rows(-columns[view_column(config.view, "log_probs")], columns, config.view)
