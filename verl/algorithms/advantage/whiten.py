"""Whitening over the tokens of a batch."""

from __future__ import annotations

import torch

EPSILON = 1e-6


def whiten_over_tokens(values: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """(value - mean) / (std + 1e-6), with mean and std over all valid tokens.

    A long response therefore counts as often as it has tokens. std is that of the population: it exists for a
    single token too. Where all tokens agree the result is 0.

    Args:
        values: [B, T], or [B, 1] where the tokens of a row agree.
        response_mask: [B, T].

    Returns:
        [B, T] float32, 0 at padding.
    """
    valid = response_mask.bool()
    values = torch.where(valid, values.double(), 0.0)
    tokens = valid.sum().clamp(min=1)
    centred = torch.where(valid, values - values.sum() / tokens, 0.0)
    return (centred / (torch.sqrt((centred**2).sum() / tokens) + EPSILON)).float()
