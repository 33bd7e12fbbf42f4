"""Groups: responses to the same prompt share an integer. Their means, and which of them are worth training on."""

from __future__ import annotations

import torch


def group_sum(values: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """For each row the sum of `values` [B] over all rows of its group [B]. Returns [B], in the type of `values`."""
    numbers, index = torch.unique(group, return_inverse=True)
    return torch.zeros_like(numbers, dtype=values.dtype).index_add_(0, index, values)[index]


def group_mean(values: torch.Tensor, group: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
    """For each row the mean of `values` [B] over its group [B]: over those of its rows that are `counted` [B] bool, by
    default all, and NaN where none is. Returns [B] float64.

    float64, because in float32 the rounding of a group of equal values is not small against the epsilons that
    a spread is compared with.
    """
    counted = torch.ones_like(group, dtype=torch.bool) if counted is None else counted
    return group_sum(torch.where(counted, values.double(), 0.0), group) / group_sum(counted.double(), group)


def group_size(group: torch.Tensor) -> torch.Tensor:
    """For each row the number of rows in its group. Returns [B] float64."""
    return group_sum(torch.ones_like(group, dtype=torch.float64), group)


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
