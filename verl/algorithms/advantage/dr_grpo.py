"""Group-relative advantages without the division by the group's spread."""

from __future__ import annotations

import torch

from verl.algorithms.advantage.registry import advantage
from verl.algorithms.groups import group_mean


@advantage("dr_grpo")
def dr_grpo(scores: torch.Tensor, group: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """score - group mean, the same for every token (Dr. GRPO, arXiv 2503.20783, section 3.2).

    Dividing by the std, as GRPO does, gives prompts that are almost always or almost never solved more weight
    than the others. The paper's other half, no division by a response's own length, is
    `worker.actor.loss_avg_mode=seq_sum`. A group of one gets 0.

    Args:
        scores: [B], reward of each response.
        group: [B], integer that responses to the same prompt share.
        response_mask: [B, T].

    Returns:
        [B, T], in units of the reward, 0 at padding.
    """
    return (scores.double() - group_mean(scores, group)).float()[:, None] * response_mask
