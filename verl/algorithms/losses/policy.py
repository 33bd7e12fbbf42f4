"""Policy losses: PPO's clip, GSPO's of whole sequences, CISPO's of weights; and the importance weight they share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from verl.algorithms.losses.estimators import bounded
from verl.algorithms.losses.term import Columns, TermOutput, loss_term
from verl.config.algorithm import LossTermConfig, Truncation
from verl.config.option import option


@dataclass
class ClipTermConfig(LossTermConfig):
    """Clip range of a ratio pi / pi_old. `tis`: see `rollout_weight`."""

    coef: float = option(1.0, "coefficient", least=0)
    tis: Truncation = option(Truncation.off, "truncated importance weights, engine to trainer: off, token, sequence")
    tis_cap: float = option(2.0, "largest such weight", above=0)
    clip_ratio_low: float = option(0.2, "the ratio is clipped below 1 - this", least=0, most=1)
    clip_ratio_high: float | None = option(0.3, "and above 1 + this; null: no bound", least=0)

    @property
    def bounds(self) -> tuple[float, float]:
        """The range of the ratio."""
        high = math.inf if self.clip_ratio_high is None else self.clip_ratio_high
        return 1.0 - self.clip_ratio_low, 1.0 + high


def clip_requires(*columns: str) -> Callable[[ClipTermConfig], tuple[str, ...]]:
    """The columns of a policy loss: these, and those of its importance weight."""

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


@dataclass
class PolicyTermConfig(ClipTermConfig):
    """Clip range [1 - clip_ratio_low, 1 + clip_ratio_high]; `clip_ratio_dual` bounds the loss where A < 0."""

    kind: str = "policy"
    clip_ratio_dual: float = option(3.0, "bound of the loss where the advantage is negative, times it", above=1)


@loss_term(
    "policy", PolicyTermConfig, requires=clip_requires("log_probs", "old_log_probs", "advantages"), metric="pg_loss"
)
def policy(columns: Columns, config: PolicyTermConfig) -> TermOutput:
    """-min(rA, clip(r)A) per token with r = pi/pi_old (PPO, arXiv 1707.06347, eq. 7), clip-higher (DAPO, arXiv
    2503.14476, eq. 10) and, where A < 0, the dual clip max(., cA) (arXiv 1912.09729, eq. 5)."""
    advantages = columns["advantages"]
    log_ratio = bounded(columns["log_probs"] - columns["old_log_probs"])
    ratio = torch.exp(log_ratio)
    low, high = config.bounds
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


@dataclass
class GSPOTermConfig(ClipTermConfig):
    """Clip range of a sequence's ratio. It is a mean over tokens, so it moves far less than theirs do (section 5.1)."""

    kind: str = "gspo"
    clip_ratio_low: float = option(3e-4, "a sequence's ratio is clipped below 1 - this", least=0, most=1)
    clip_ratio_high: float | None = option(4e-4, "and above 1 + this; null: no bound", least=0)


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
    low, high = config.bounds
    values = torch.maximum(-ratio * advantages, -torch.clamp(ratio, low, high) * advantages)
    metrics = {
        "clip_frac_high": ((ratio > high) & (advantages > 0)).float(),
        "clip_frac_low": ((ratio < low) & (advantages < 0)).float(),
        "ppo_kl": -log_ratio,
    }
    return weighted(values, metrics, columns, config)


@dataclass
class CISPOTermConfig(ClipTermConfig):
    """Range of the weight. A low of 1 is no bound, as in the paper; the high of 4 (weights up to 5) is a choice made
    here, as the paper tunes it and we know of no value that it names."""

    kind: str = "cispo"
    clip_ratio_low: float = option(1.0, "the weight is clipped below 1 - this; 1: no bound", least=0, most=1)
    clip_ratio_high: float | None = option(4.0, "and above 1 + this; null: no bound", least=0)


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
    low, high = config.bounds
    values = -torch.clamp(ratio, low, high) * columns["advantages"] * log_probs
    metrics = {
        "clip_frac_high": (ratio > high).float(),
        "clip_frac_low": (ratio < low).float(),
        "ppo_kl": -log_ratio,
    }
    return weighted(values, metrics, columns, config)
