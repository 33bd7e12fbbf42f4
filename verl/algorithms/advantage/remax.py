"""REINFORCE with the reward of the likeliest response as baseline."""

from __future__ import annotations

import torch

from verl.algorithms.advantage.registry import advantage
from verl.algorithms.rewards import reward_to_go


@advantage("remax")
def remax(rewards: torch.Tensor, baseline_scores: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Reward to come - reward of the greedy response to the same prompt (ReMax, arXiv 2310.10505, algorithm 1).

    The baseline is independent of the response, so the gradient stays unbiased, with one response per prompt too. It
    costs one greedy response per prompt and step.

    Args:
        rewards: [B, T], of each token.
        baseline_scores: [B], reward of the greedy response to the row's prompt.
        response_mask: [B, T].

    Returns:
        [B, T], in units of the reward, 0 at padding.
    """
    return ((reward_to_go(rewards, response_mask) - baseline_scores[:, None]) * response_mask).float()
