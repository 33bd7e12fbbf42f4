"""The clipped policy loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from verl.algorithms.losses.clip import ClipTermConfig, bounded, clip_requires, weighted
from verl.algorithms.losses.term import Columns, TermOutput, loss_term


@dataclass
class PolicyTermConfig(ClipTermConfig):
    """Clip range [1 - clip_ratio_low, 1 + clip_ratio_high]; `clip_ratio_dual` bounds the loss where A < 0."""

    kind: str = "policy"
    clip_ratio_dual: float = 3.0

    def check(self, key: str) -> None:
        super().check(key)
        if self.clip_ratio_dual <= 1:
            raise ValueError(f"{key}.clip_ratio_dual={self.clip_ratio_dual}: a value above 1 is needed")


@loss_term(
    "policy", PolicyTermConfig, requires=clip_requires("log_probs", "old_log_probs", "advantages"), metric="pg_loss"
)
def policy(columns: Columns, config: PolicyTermConfig) -> TermOutput:
    """-min(rA, clip(r)A) per token with r = pi/pi_old (PPO, arXiv 1707.06347, eq. 7), clip-higher (DAPO, arXiv
    2503.14476, eq. 10) and, where A < 0, the dual clip max(., cA) (arXiv 1912.09729, eq. 5)."""
    advantages = columns["advantages"]
    log_ratio = bounded(columns["log_probs"] - columns["old_log_probs"])
    ratio = torch.exp(log_ratio)
    low, high = 1.0 - config.clip_ratio_low, 1.0 + config.clip_ratio_high
    unclipped = -ratio * advantages
    clipped = -torch.clamp(ratio, low, high) * advantages
    pessimistic = torch.maximum(unclipped, clipped)
    bound = -config.clip_ratio_dual * advantages
    values = torch.where(advantages < 0, torch.minimum(pessimistic, bound), pessimistic)
    metrics = {
        "clip_frac_high": ((ratio > high) & (advantages > 0)).float(),
        "clip_frac_low": ((ratio < low) & (advantages < 0)).float(),
        "clip_frac_dual": ((ratio > config.clip_ratio_dual) & (advantages < 0)).float(),
        "ppo_kl": -log_ratio,
    }
    return weighted(values, metrics, columns, config)
