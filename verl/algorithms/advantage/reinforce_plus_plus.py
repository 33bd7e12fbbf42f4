"""REINFORCE with advantages normalised over the whole batch."""

from __future__ import annotations

import torch

from verl.algorithms.advantage.registry import advantage
from verl.algorithms.advantage.whiten import whiten_over_tokens
from verl.algorithms.rewards import reward_to_go


@advantage("reinforce_plus_plus")
def reinforce_plus_plus(rewards: torch.Tensor, response_mask: torch.Tensor, gamma: float) -> torch.Tensor:
    """(reward to come - batch mean) / batch std (REINFORCE++, arXiv 2501.03262, global advantage normalisation).

    Mean and std run over all tokens of the step's batch, not over responses and not over mini-batches. No groups are
    read, so one response per prompt is enough. The paper has its KL in the reward, `algorithm.reward_kl` here.

    Args:
        rewards: [B, T], of each token.
        response_mask: [B, T].
        gamma: discount; 1 in the paper.

    Returns:
        [B, T], 0 at padding.
    """
    return whiten_over_tokens(reward_to_go(rewards, response_mask, gamma), response_mask)
