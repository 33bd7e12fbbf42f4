"""The loss of a critic."""

from __future__ import annotations

import torch


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """max((v - R)^2, (clip(v) - R)^2) / 2 per token, clip(v) at most `clip_range` from the value before the updates:
    the critic moves no further in a step than its targets were made for (PPO, arXiv 1707.06347, in its released code).

    Args:
        values, old_values, returns: [B, T].

    Returns:
        [B, T] losses, and [B, T] 1 where the clip decides, which gives no gradient.
    """
    clipped = old_values + torch.clamp(values - old_values, -clip_range, clip_range)
    free, bound = (values - returns) ** 2, (clipped - returns) ** 2
    return 0.5 * torch.maximum(free, bound), (bound > free).float()
