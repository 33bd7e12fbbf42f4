"""Group-relative advantages."""

from __future__ import annotations

import torch

from verl.algorithms.advantage.registry import ADVANTAGES

EPSILON = 1e-6


@ADVANTAGES.register("grpo")
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
    # float64, because in float32 the rounding of a group of equal scores is not small against EPSILON.
    scores = scores.double()
    _, index, counts = torch.unique(group, return_inverse=True, return_counts=True)
    counts = counts.to(scores.dtype)
    sums = torch.zeros_like(counts).index_add_(0, index, scores)
    centred = scores - (sums / counts)[index]
    squares = torch.zeros_like(counts).index_add_(0, index, centred**2)
    std = torch.sqrt(squares / (counts - 1).clamp(min=1))
    return (centred / (std[index] + EPSILON)).float()[:, None] * response_mask
