"""The policy loss that clips importance weights and keeps every token's gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from verl.algorithms.losses.clip import ClipTermConfig, bounded, clip_requires, weighted
from verl.algorithms.losses.term import Columns, TermOutput, loss_term


@dataclass
class CISPOTermConfig(ClipTermConfig):
    """Range of the weight. A low of 1 is no bound, as in the paper; the high of 4 (weights up to 5) is a choice made
    here, as the paper tunes it and we know of no value that it names."""

    kind: str = "cispo"
    clip_ratio_low: float = 1.0
    clip_ratio_high: float = 4.0


@loss_term(
    "cispo", CISPOTermConfig, requires=clip_requires("log_probs", "old_log_probs", "advantages"), metric="pg_loss"
)
def cispo(columns: Columns, config: CISPOTermConfig) -> TermOutput:
    """-sg[clip(r)] A log pi per token with r = pi/pi_old, sg a stop-gradient (CISPO, arXiv 2506.13585, eq. 4-5).

    No token's gradient is cut off: the clip bounds its weight alone. The fractions count every token whose weight
    is clipped, whatever the sign of its advantage. The paper averages over tokens (`loss_avg_mode=token`).
    """
    log_probs = columns["log_probs"]
    log_ratio = bounded(log_probs.detach() - columns["old_log_probs"])
    ratio = torch.exp(log_ratio)
    low, high = 1.0 - config.clip_ratio_low, 1.0 + config.clip_ratio_high
    values = -torch.clamp(ratio, low, high) * columns["advantages"] * log_probs
    metrics = {
        "clip_frac_high": (ratio > high).float(),
        "clip_frac_low": (ratio < low).float(),
        "ppo_kl": -log_ratio,
    }
    return weighted(values, metrics, columns, config)
