"""REINFORCE with a leave-one-out baseline."""

from __future__ import annotations

import torch

from verl.algorithms.advantage.registry import advantage
from verl.algorithms.groups import group_mean, group_size


@advantage("rloo")
def rloo(scores: torch.Tensor, group: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """score - mean of the group's other scores, the same for every token (RLOO, arXiv 2402.14740).

    The baseline does not depend on the response it is subtracted from, so the gradient stays unbiased. With n
    responses it is n / (n - 1) times `dr_grpo`, which is how it is computed. A group of one has no others and
    gets 0, as with `grpo`.

    Args:
        scores: [B], reward of each response.
        group: [B], integer that responses to the same prompt share.
        response_mask: [B, T].

    Returns:
        [B, T], in units of the reward, 0 at padding.
    """
    size = group_size(group)
    centred = scores.double() - group_mean(scores, group)
    return (centred * size / (size - 1).clamp(min=1)).float()[:, None] * response_mask
