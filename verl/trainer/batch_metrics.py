"""Metrics of a training batch: rewards, groups, lengths, and how far engine and trainer are apart."""

from __future__ import annotations

import torch

from verl.protocol import DataProto
from verl.workers.reward.manager import RewardScore


def reward_metrics(scores: list[RewardScore], group: torch.Tensor) -> dict[str, float]:
    """Means of the reward and its components, and the share of groups that teach GRPO nothing.

    Args:
        scores: one per response.
        group: [B] integer that responses to one prompt share.
    """
    overall = torch.tensor([score["overall"] for score in scores], dtype=torch.float64)
    metrics = {"train/reward": overall.mean().item(), "train/reward_std": overall.std(unbiased=False).item()}
    for name in scores[0]:
        if name != "overall":
            metrics[f"train/{name}"] = sum(score[name] for score in scores) / len(scores)
    uniform = [overall[group == g].unique().numel() == 1 for g in group.unique()]
    metrics["train/groups_without_signal"] = sum(uniform) / len(uniform)
    return metrics


def rollout_metrics(batch: DataProto, max_response_length: int) -> dict[str, float]:
    """Response lengths in tokens, and |log-prob of the engine - log-prob of the trainer| in nats per token."""
    mask = batch["response_mask"].bool()
    lengths = mask.sum(dim=1).double()
    metrics = {
        "rollout/response_length_mean": lengths.mean().item(),
        "rollout/response_length_max": lengths.max().item(),
        "rollout/truncated": (lengths >= max_response_length).double().mean().item(),
    }
    if "old_log_probs" in batch:
        difference = (batch["rollout_log_probs"] - batch["old_log_probs"])[mask].abs().double()
        metrics["rollout/log_prob_diff_mean"] = difference.mean().item()
        metrics["rollout/log_prob_diff_max"] = difference.max().item()
    return metrics
