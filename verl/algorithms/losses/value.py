"""The loss of a critic, and how much of the returns it explains."""

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


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    """Numerator and denominator of 1 - Var(returns - values) / Var(returns) over valid tokens.

    1: the values are the returns, up to a constant. 0: they say no more than a constant would. Below: less than that.

    Args:
        values, returns, mask: [B, T].

    Returns:
        (0, 0) where there is no variance to explain.
    """
    valid = mask.bool()
    values, returns = values[valid].double(), returns[valid].double()
    if len(returns.unique()) < 2:
        return 0.0, 0.0
    total, left = (((x - x.mean()) ** 2).sum().item() for x in (returns, returns - values))
    return total - left, total
