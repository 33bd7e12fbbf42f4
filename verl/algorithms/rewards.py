"""Rewards: the score of a response at its last token, a KL to the reference, and a penalty for length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from verl.algorithms.losses.estimators import SAMPLED, k3

if TYPE_CHECKING:
    from verl.config.algorithm import RewardKLConfig, ViewRewardConfig


def token_rewards(scores: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """[B, T] float32: the score [B] of each response at its last valid token, 0 elsewhere."""
    places = torch.arange(1, response_mask.shape[1] + 1, device=response_mask.device) * response_mask
    last = (places == places.amax(dim=1, keepdim=True)) & response_mask.bool()
    return torch.where(last, scores.float()[:, None], 0.0)


def reward_to_go(rewards: torch.Tensor, response_mask: torch.Tensor, gamma: float = 1.0) -> torch.Tensor:
    """[B, T] float64: the sum over l >= 0 of gamma^l r_{t+l} over a response's valid tokens, 0 at padding."""
    rewards = torch.where(response_mask.bool(), rewards.double(), 0.0)
    coming = torch.zeros_like(rewards[:, 0])
    columns = []
    for t in reversed(range(rewards.shape[1])):
        coming = torch.where(response_mask[:, t].bool(), rewards[:, t] + gamma * coming, coming)
        columns.append(coming)
    return torch.stack(columns[::-1], dim=1) * response_mask


class RewardKL:
    """A KL to the reference as part of the reward: each token loses coef * KL(pi_old || pi_ref), by an estimate from
    the token itself (arXiv 1909.08593, section 2).

    Where `controller` is adaptive, `coef` follows the KL: it grows by up to 20 % per `horizon` responses while the KL
    is above `target` nats per token, and shrinks below (section 2.2 there).
    """

    def __init__(self, config: RewardKLConfig) -> None:
        self.config = config
        self.coef = config.coef

    def penalty(
        self, log_probs: torch.Tensor, ref_log_probs: torch.Tensor, response_mask: torch.Tensor
    ) -> torch.Tensor:
        """coef * KL [B, T], 0 at padding, from log-probs [B, T]; then the coefficient moves on to the next batch."""
        kl = torch.where(response_mask.bool(), SAMPLED[self.config.estimator](log_probs, ref_log_probs), 0.0)
        self.last_kl = kl.double().sum().item() / max(response_mask.sum().item(), 1)
        penalty = self.coef * kl
        if self.config.controller == "adaptive":
            error = max(-0.2, min(0.2, self.last_kl / self.config.target - 1))
            self.coef *= 1 + error * len(kl) / self.config.horizon
        return penalty


def view_reward(
    log_probs: torch.Tensor,
    view_log_probs: torch.Tensor,
    rows: torch.Tensor,
    response_mask: torch.Tensor,
    config: ViewRewardConfig,
) -> torch.Tensor:
    """[B] float64: min(coef * mean over a response's tokens of KL(pi || pi_view), cap), by the k3 estimate; 0 in rows
    that the view does not cover. It pays for depending on the image whether the answer is right or not; the cap keeps
    it from outweighing the answer, under estimators that do not divide by a group's std (`dr_grpo`): where all answers
    of a group are equally right, that makes it the whole advantage.

    Args:
        log_probs, view_log_probs, response_mask: [B, T].
        rows: [B], those that the view covers.
    """
    kl = torch.where(response_mask.bool(), k3(log_probs.double(), view_log_probs.double()), 0.0)
    mean = kl.sum(-1) / response_mask.sum(-1).clamp(min=1)
    return torch.where(rows, (config.coef * mean).clamp(max=config.cap), 0.0)


def overlong_penalty(lengths: torch.Tensor, max_length: int, cache: int) -> torch.Tensor:
    """The penalty of a long response (DAPO's soft overlong punishment, arXiv 2503.14476, eq. 13).

    0 up to max_length - cache tokens, then falling linearly to -1 at max_length, and -1 beyond.

    Args:
        lengths: [B], tokens of each response.
        max_length: longest response that is not fully punished, in tokens.
        cache: length of the slope, in tokens.

    Returns:
        [B] float32, from -1 to 0.
    """
    if not 0 < cache <= max_length:
        raise ValueError(f"cache={cache}: a number of tokens from 1 to max_length={max_length} is needed")
    return ((max_length - cache - lengths.double()) / cache).clamp(-1, 0).float()
