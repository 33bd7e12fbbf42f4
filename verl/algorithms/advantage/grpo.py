"""Group-relative advantages."""

from __future__ import annotations

import torch

from verl.algorithms.advantage.registry import advantage
from verl.algorithms.groups import group_mean, group_size, group_sum

EPSILON = 1e-6


@advantage("grpo")
def grpo(scores: torch.Tensor, group: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """(score - group mean) / (unbiased group std + 1e-6), the same for every token (arXiv 2402.03300, 4.1.2).

    A group whose scores agree gets 0; so does a group of one, which has nothing to be compared with.

    Args:
        scores: [B], reward of each response.
        group: [B], integer that responses to the same prompt share.
        response_mask: [B, T].

    Returns:
        [B, T], 0 at padding.
    """
    centred = scores.double() - group_mean(scores, group)
    std = torch.sqrt(group_sum(centred**2, group) / (group_size(group) - 1).clamp(min=1))
    return (centred / (std + EPSILON)).float()[:, None] * response_mask
