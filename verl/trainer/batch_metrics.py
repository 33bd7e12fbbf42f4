"""Metrics of a training batch: rewards, groups, lengths, and how far engine and trainer are apart."""

from __future__ import annotations

import logging
import math

import torch

from verl.algorithms.losses.estimators import k3
from verl.config.worker import RolloutConfig
from verl.protocol import DataProto
from verl.workers.reward.base import Outcome

logger = logging.getLogger(__name__)

# Nats per token. In float32 it is below 1e-9, in bfloat16 between 1e-4 and 1e-2; stale weights or images give more.
LARGE_MISMATCH = 0.02


def reward_metrics(outcomes: list[Outcome], group: torch.Tensor) -> dict[str, float]:
    """Means of the reward and its components over the responses that were graded, the share of groups that teach GRPO
    nothing, and the longest time that grading took.

    Args:
        outcomes: one per response, at least one of them with a score.
        group: [B] integer that responses to one prompt share; whatever it is for those without a score.
    """
    kept = torch.tensor([outcome.score is not None for outcome in outcomes])
    scores = [outcome.score for outcome in outcomes if outcome.score is not None]
    overall = torch.tensor([score["overall"] for score in scores], dtype=torch.float64)
    metrics = {"train/reward": overall.mean().item(), "train/reward_std": overall.std(unbiased=False).item()}
    for name in scores[0]:
        if name != "overall":
            metrics[f"train/{name}"] = sum(score[name] for score in scores) / len(scores)
    group = group[kept]
    uniform = [overall[group == g].unique().numel() == 1 for g in group.unique()]
    metrics["train/groups_without_signal"] = sum(uniform) / len(uniform)
    metrics["timing_s/reward_slowest"] = max(outcome.seconds for outcome in outcomes)
    return metrics


def rollout_metrics(batch: DataProto, max_response_length: int, version: int) -> dict[str, float]:
    """Response lengths in tokens, and how far engine and trainer are apart, in nats per token: |difference of their
    log-probs|, and KL(engine || trainer) by the k3 estimate on the engine's own samples. The latter over the responses
    that were drawn from the trainer's own weights, those of `version`; others have waited for this step."""
    mask = batch["response_mask"].bool()
    lengths = mask.sum(dim=1).double()
    metrics = {
        "rollout/response_length_mean": lengths.mean().item(),
        "rollout/response_length_max": lengths.max().item(),
        "rollout/truncated": (lengths >= max_response_length).double().mean().item(),
    }
    metrics["rollout/weight_version"] = batch["weight_version"].double().mean().item()
    mask = mask & (batch["weight_version"] == version)[:, None]
    if "old_log_probs" in batch and mask.any():
        rollout, trainer = (batch[name][mask].double() for name in ("rollout_log_probs", "old_log_probs"))
        metrics["rollout/log_prob_diff_mean"] = (trainer - rollout).abs().mean().item()
        metrics["rollout/log_prob_diff_max"] = (trainer - rollout).abs().max().item()
        metrics["rollout/mismatch_kl"] = k3(rollout, trainer).mean().item()
    return metrics


def warn_of_mismatch(metrics: dict[str, float], sampling: RolloutConfig) -> None:
    """Warn where the engine samples from another policy than the trainer trains.

    Top-p alone makes the KL -log of the mass that it keeps, at most -log(top_p). What top-k and `ignore_eos` leave out
    has no such bound, so nothing is said with those.
    """
    mismatch = metrics.get("rollout/mismatch_kl", 0.0)
    bounded = sampling.top_k <= 0 and not sampling.ignore_eos
    if bounded and mismatch > LARGE_MISMATCH - math.log(sampling.top_p):
        logger.warning(
            "rollout engine and trainer disagree: KL %.3g nats per token, |difference of log-probs| up to %.3g "
            "(weights version %d). The gradient is then off-policy",
            mismatch,
            metrics["rollout/log_prob_diff_max"],
            metrics["rollout/weight_version"],
        )
