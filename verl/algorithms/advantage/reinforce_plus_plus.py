"""REINFORCE with advantages normalised over the whole batch."""

from __future__ import annotations

import torch

from verl.algorithms.advantage.registry import ADVANTAGES
from verl.algorithms.advantage.whiten import whiten_over_tokens


@ADVANTAGES.register("reinforce_plus_plus")
def reinforce_plus_plus(scores: torch.Tensor, group: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """(score - batch mean) / batch std (REINFORCE++, arXiv 2501.03262, global advantage normalisation).

    The form: discount 1 and no KL inside the reward (a KL is a loss term here), so that every token's return is
    its response's score; mean and std run over all tokens of the step's batch, not over responses and not over
    mini-batches. `group` is not read, so one response per prompt is enough.

    Args:
        scores: [B], reward of each response.
        group: [B], integer that responses to the same prompt share.
        response_mask: [B, T].

    Returns:
        [B, T], 0 at padding.
    """
    return whiten_over_tokens(scores.double(), response_mask)
