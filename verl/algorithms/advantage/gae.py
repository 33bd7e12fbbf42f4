"""Generalised advantage estimation, for policies that are trained with a critic."""

from __future__ import annotations

import torch

from verl.algorithms.advantage.registry import advantage
from verl.algorithms.advantage.whiten import whiten_over_tokens


@torch.no_grad()
def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t (arXiv 1506.02438, eq. 16).

    The value behind the last valid token is 0: a response ends there. Tokens outside the mask are stepped over
    as if they were not there.

    Args:
        rewards, values: [B, T], reward for and critic's value before each token.
        mask: [B, T], 1 on valid tokens.
        gamma, lam: discount and the weight of longer sums, each from 0 to 1.

    Returns:
        advantages and returns (advantage + value, what the critic is trained on), each [B, T] float32, 0 outside
        the mask.
    """
    valid = mask.bool()
    rewards, values = rewards.double(), values.double()
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    columns = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(valid[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(valid[:, t], values[:, t], next_value)
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    returns = torch.where(valid, advantages + values, 0.0)
    return torch.where(valid, advantages, 0.0).float(), returns.float()


@advantage("gae")
def whitened_gae(
    rewards: torch.Tensor, values: torch.Tensor, response_mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's advantages: those of `gae`, whitened over all tokens of the step's batch, so that the size of the rewards
    does not set that of the update; the returns are not.

    Args and returns as in `gae`.
    """
    advantages, returns = gae(rewards, values, response_mask, gamma, lam)
    return whiten_over_tokens(advantages, response_mask), returns
