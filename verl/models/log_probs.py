"""Log-probs of given tokens from hidden states, without the logits of all tokens existing at one time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

Head = Callable[[torch.Tensor], torch.Tensor]


def token_log_probs(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float, banned: torch.Tensor
) -> torch.Tensor:
    """log softmax(logits / temperature)[target], over the tokens that are not banned, in float32.

    The policy is a distribution over the tokens it may emit. The engine never samples a banned token, so the
    trainer leaves those out of its softmax too, and both give the same number.

    Args:
        logits: [N, V].
        targets: [N] token ids.
        banned: token ids that have probability 0.

    Returns:
        [N] in nats.
    """
    logits = logits.float() / temperature
    logits = logits.index_fill(-1, banned, float("-inf"))
    return logits.gather(-1, targets[:, None]).squeeze(-1) - torch.logsumexp(logits, dim=-1)


def chunked_log_probs(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Head,
    temperature: float,
    banned: torch.Tensor,
    chunk_size: int,
) -> torch.Tensor:
    """`token_log_probs` of `head(hidden)`, `chunk_size` tokens at a time; backward makes each chunk's logits again.

    A float32 logit row of a 152k vocabulary takes 0.6 MB, and plain autograd holds about three of them per token.

    Args:
        hidden: [N, H].
        targets: [N].

    Returns:
        [N] float32.
    """

    def of_chunk(hidden_chunk: torch.Tensor, targets_chunk: torch.Tensor) -> torch.Tensor:
        return token_log_probs(head(hidden_chunk), targets_chunk, temperature, banned)

    if len(hidden) <= chunk_size or not torch.is_grad_enabled():
        chunks = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
        return torch.cat([of_chunk(h, t) for h, t in chunks])
    return torch.cat(
        [
            checkpoint(of_chunk, h, t, use_reentrant=False, preserve_rng_state=False)
            for h, t in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
        ]
    )
