"""Changes to the reward."""

from __future__ import annotations

import torch


def overlong_penalty(lengths: torch.Tensor, max_length: int, cache: int) -> torch.Tensor:
    """What is added to the reward of a long response (DAPO's soft overlong punishment, arXiv 2503.14476, eq. 13).

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
