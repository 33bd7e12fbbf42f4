"""REINFORCE with a group baseline, normalised over the whole batch."""

from __future__ import annotations

import torch

from verl.algorithms.advantage.registry import advantage
from verl.algorithms.advantage.whiten import whiten_over_tokens
from verl.algorithms.groups import group_mean


@advantage("reinforce_plus_plus_baseline")
def reinforce_plus_plus_baseline(
    scores: torch.Tensor, group: torch.Tensor, response_mask: torch.Tensor
) -> torch.Tensor:
    """a = score - group mean, then (a - batch mean of a) / batch std of a (REINFORCE++ with baseline, arXiv
    2501.03262).

    Mean and std run over all tokens of the step's batch, as in `reinforce_plus_plus`. A group that agrees, or a
    group of one, has a = 0 and ends near 0, not at it: where lengths differ, the tokens' mean of a is not 0.

    Args:
        scores: [B], reward of each response.
        group: [B], integer that responses to the same prompt share.
        response_mask: [B, T].

    Returns:
        [B, T], 0 at padding.
    """
    return whiten_over_tokens((scores.double() - group_mean(scores, group))[:, None], response_mask)
