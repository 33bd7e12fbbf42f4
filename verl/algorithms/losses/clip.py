"""What the policy losses share: a clip range, and the log-ratio to the policy that the responses came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from verl.algorithms.losses.term import Columns, TermOutput
from verl.config.algorithm import LossTermConfig, Truncation

# exp(20) is the largest ratio that a float32 sum of a batch survives; a policy that far away is clipped anyway.
MAX_LOG_RATIO = 20.0


@dataclass
class ClipTermConfig(LossTermConfig):
    """Clip range [1 - clip_ratio_low, 1 + clip_ratio_high] of a ratio pi / pi_old.

    `tis`: truncated importance sampling, see `rollout_weight`.
    """

    coef: float = 1.0
    tis: Truncation = Truncation.off
    tis_cap: float = 2.0
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.3

    def check(self, key: str) -> None:
        super().check(key)
        if not 0 <= self.clip_ratio_low <= 1:
            raise ValueError(f"{key}.clip_ratio_low={self.clip_ratio_low}: a value from 0 to 1 is needed")
        if self.clip_ratio_high < 0:
            raise ValueError(f"{key}.clip_ratio_high={self.clip_ratio_high}: a value of 0 or more is needed")
        if self.tis_cap <= 0:
            raise ValueError(f"{key}.tis_cap={self.tis_cap}: a value above 0 is needed")


def clip_requires(*columns: str) -> Callable[[ClipTermConfig], tuple[str, ...]]:
    """What a policy loss reads: these, and what its importance weight takes."""

    def requires(config: ClipTermConfig) -> tuple[str, ...]:
        extra = {
            Truncation.off: (),
            Truncation.token: ("rollout_log_probs",),
            Truncation.sequence: ("rollout_log_probs", "response_mask"),
        }[config.tis]
        return tuple(dict.fromkeys((*columns, *extra)))

    return requires


def rollout_weight(columns: Columns, config: ClipTermConfig) -> torch.Tensor | float:
    """min(pi_old / pi_rollout, cap), which multiplies the loss of a token: where engine and trainer compute different
    probabilities for one policy, it takes the bias out that this would bring, and the cap bounds its variance
    (truncated importance sampling, https://fengyao.notion.site/off-policy-rl).

    `token` weighs each token by its own ratio, `sequence` all tokens of a response by the product of its ratios.

    Returns:
        [B, T] or [B, 1] without gradient; 1.0 where it is off.
    """
    if config.tis == Truncation.off:
        return 1.0
    log_ratio = (columns["old_log_probs"] - columns["rollout_log_probs"]).detach()
    if config.tis == Truncation.sequence:
        log_ratio = torch.where(columns["response_mask"].bool(), log_ratio, 0.0).sum(-1, keepdim=True)
    return torch.exp(bounded(log_ratio)).clamp(max=config.tis_cap)


def weighted(
    values: torch.Tensor, metrics: dict[str, torch.Tensor], columns: Columns, config: ClipTermConfig
) -> TermOutput:
    """The loss with its importance weight, and metrics that show it."""
    weight = rollout_weight(columns, config)
    if config.tis != Truncation.off:
        shown = weight.expand_as(values)
        metrics = {**metrics, "tis_weight": shown, "tis_capped": (shown >= config.tis_cap).float()}
    return TermOutput(values * weight, metrics)


def bounded(log_ratio: torch.Tensor) -> torch.Tensor:
    """`log_ratio`, at most 20 either way; beyond that its gradient is 0."""
    return torch.clamp(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)
