"""Rows without an image have no other view: they contribute nothing to a view's terms."""

from __future__ import annotations

import torch

from verl.algorithms.losses.term import Columns
from verl.columns import view_column


def only_view_rows(values: torch.Tensor, columns: Columns, view: str) -> torch.Tensor:
    """`values` [B, T] with zeros in the rows that the view does not cover (text-only prompts)."""
    return torch.where(columns[view_column(view, "rows")][:, None], values, 0.0)
