"""Means over groups: responses to the same prompt share an integer."""

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
