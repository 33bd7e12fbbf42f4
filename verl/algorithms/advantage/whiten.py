"""Whitening over the tokens of a batch."""

from __future__ import annotations

import torch

EPSILON = 1e-6


def whiten_over_tokens(values: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """(value - mean) / (std + 1e-6), with mean and std over all valid tokens, each of which has its row's value.

    A long response therefore counts as often as it has tokens. std is that of the population: it exists for a
    single token too. Where all tokens agree the result is 0.

    Args:
        values: [B] float64.
        response_mask: [B, T].

    Returns:
        [B, T] float32, 0 at padding.
    """
    lengths = response_mask.sum(-1).double()
    tokens = lengths.sum().clamp(min=1)
    centred = values - (values * lengths).sum() / tokens
    std = torch.sqrt((centred**2 * lengths).sum() / tokens)
    return (centred / (std + EPSILON)).float()[:, None] * response_mask
