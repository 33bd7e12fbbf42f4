"""The policy loss that clips whole sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from verl.algorithms.losses.clip import ClipTermConfig, bounded, clip_requires, weighted
from verl.algorithms.losses.term import Columns, TermOutput, loss_term


@dataclass
class GSPOTermConfig(ClipTermConfig):
    """Clip range of a sequence's ratio. It is a mean over tokens, so it moves far less than theirs do (section 5.1)."""

    kind: str = "gspo"
    clip_ratio_low: float = 3e-4
    clip_ratio_high: float = 4e-4


@loss_term(
    "gspo",
    GSPOTermConfig,
    requires=clip_requires("log_probs", "old_log_probs", "advantages", "response_mask"),
    metric="pg_loss",
)
def gspo(columns: Columns, config: GSPOTermConfig) -> TermOutput:
    """-min(sA, clip(s)A) with s = exp(mean over the sequence's tokens of log pi/pi_old) (GSPO, arXiv 2507.18071,
    section 4.1), as one value per token (GSPO-token, section 4.3).

    A token's ratio is sg[s] pi / sg[pi], sg a stop-gradient: its value is s, its gradient s times that of the
    token's log pi. With one advantage per sequence and `worker.actor.loss_avg_mode=seq` the gradient is GSPO's;
    with `token` a sequence counts as often as it has tokens.

    Returns:
        values [B, T]; the clip fractions count the tokens of clipped sequences.
    """
    log_probs, advantages, mask = columns["log_probs"], columns["advantages"], columns["response_mask"]
    log_ratio = torch.where(mask.bool(), log_probs.detach() - columns["old_log_probs"], 0.0)
    mean = bounded(log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1))
    ratio = torch.exp(mean) * torch.exp(log_probs - log_probs.detach())
    low, high = 1.0 - config.clip_ratio_low, 1.0 + config.clip_ratio_high
    values = torch.maximum(-ratio * advantages, -torch.clamp(ratio, low, high) * advantages)
    metrics = {
        "clip_frac_high": ((ratio > high) & (advantages > 0)).float(),
        "clip_frac_low": ((ratio < low) & (advantages < 0)).float(),
        "ppo_kl": -log_ratio,
    }
    return weighted(values, metrics, columns, config)
