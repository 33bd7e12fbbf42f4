"""Which responses are worth training on."""

from __future__ import annotations

import torch

from verl.algorithms.groups import group_mean


def keep_groups(
    metric: torch.Tensor, group: torch.Tensor, low: float, high: float, graded: torch.Tensor | None = None
) -> torch.Tensor:
    """Whether a response's group has its mean strictly between `low` and `high` (DAPO's dynamic sampling, arXiv
    2503.14476, eq. 11: neither all responses to a prompt are right nor all wrong). PAPO takes 0.01 and 0.99.

    A group is kept or dropped as a whole; a mean that is not finite drops it.

    Args:
        metric: [B], such as the accuracy of each response.
        group: [B], integer that responses to the same prompt share.
        graded: [B] bool, responses that the means are taken over; by default all.

    Returns:
        [B] bool.
    """
    if not low < high:
        raise ValueError(f"low={low}, high={high}: no mean lies strictly between them")
    mean = group_mean(metric, group, graded)
    return (mean > low) & (mean < high)
