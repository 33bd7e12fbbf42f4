"""Log-probs of given tokens from hidden states, without the logits of all tokens existing at one time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
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
    return _TokenLogProbs.apply(logits, targets, temperature, banned)


class _TokenLogProbs(torch.autograd.Function):
    """The gradient of log softmax(x)[target] by x is onehot(target) - softmax(x): two passes over the logits and one
    copy of them, where autograd's own takes eight passes and three copies."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, temperature: float, banned: torch.Tensor
    ) -> torch.Tensor:
        scaled = torch.div(logits.float(), temperature).index_fill_(-1, banned, float("-inf"))
        normalizer = torch.logsumexp(scaled, dim=-1, keepdim=True)
        ctx.save_for_backward(scaled, targets, normalizer)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return (scaled.gather(-1, targets[:, None]) - normalizer).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        scaled, targets, normalizer = ctx.saved_tensors
        gradient = gradient[:, None] / ctx.temperature
        found = (scaled - normalizer).exp_().mul_(-gradient)
        return found.scatter_add_(-1, targets[:, None], gradient).to(ctx.dtype), None, None, None


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

    return in_chunks(of_chunk, chunk_size, hidden, targets)


def chunked_entropy(
    hidden: torch.Tensor, head: Head, temperature: float, banned: torch.Tensor, chunk_size: int
) -> torch.Tensor:
    """Entropy [N] float32 in nats of softmax(head(hidden) / temperature) over the tokens that are not banned."""

    def of_chunk(hidden_chunk: torch.Tensor) -> torch.Tensor:
        probs, log_probs = _distribution(head(hidden_chunk), temperature, banned)
        return -(probs * log_probs).sum(-1)

    return in_chunks(of_chunk, chunk_size, hidden)


def chunked_kl(
    hidden: torch.Tensor,
    other: torch.Tensor,
    head: Head,
    temperature: float,
    banned: torch.Tensor,
    chunk_size: int,
    detach_other: bool,
) -> torch.Tensor:
    """KL [N] float32 in nats of the distribution after `hidden` to that after `other`, exact over the vocabulary.

    Args:
        hidden, other: [N, H].
        detach_other: keep the gradient from everything behind the second distribution, the head's weights included.
    """

    def of_chunk(hidden_chunk: torch.Tensor, other_chunk: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detach_other):
            _, other_log_probs = _distribution(head(other_chunk), temperature, banned)
        probs, log_probs = _distribution(head(hidden_chunk), temperature, banned)
        return (probs * (log_probs - other_log_probs)).sum(-1)

    return in_chunks(of_chunk, chunk_size, hidden, other)


def chunked_jsd(
    hidden: torch.Tensor,
    other: torch.Tensor,
    head: Head,
    temperature: float,
    banned: torch.Tensor,
    chunk_size: int,
) -> torch.Tensor:
    """Jensen-Shannon divergence [N] float32 in nats, from 0 to log 2, of the distributions after `hidden` and `other`,
    exact over the vocabulary."""

    def of_chunk(hidden_chunk: torch.Tensor, other_chunk: torch.Tensor) -> torch.Tensor:
        probs, log_probs = _distribution(head(hidden_chunk), temperature, banned)
        other_probs, other_log_probs = _distribution(head(other_chunk), temperature, banned)
        mean = (0.5 * (probs + other_probs)).clamp(min=torch.finfo(torch.float32).tiny).log()
        both = probs * (log_probs - mean) + other_probs * (other_log_probs - mean)
        return 0.5 * both.sum(-1)

    return in_chunks(of_chunk, chunk_size, hidden, other)


def _distribution(logits: torch.Tensor, temperature: float, banned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and log-probs [N, V] in float32; both are 0 for banned tokens, so that their product is."""
    log_probs = torch.log_softmax((logits.float() / temperature).index_fill(-1, banned, float("-inf")), dim=-1)
    return log_probs.exp(), log_probs.index_fill(-1, banned, 0.0)


def in_chunks(function: Callable[..., torch.Tensor], chunk_size: int, *tensors: torch.Tensor) -> torch.Tensor:
    """`function` of `chunk_size` rows of the tensors at a time, joined; backward computes each chunk again."""
    chunks = list(zip(*(tensor.split(chunk_size) for tensor in tensors), strict=True))
    if len(chunks) <= 1 or not torch.is_grad_enabled():
        return torch.cat([function(*chunk) for chunk in chunks])
    return torch.cat([checkpoint(function, *c, use_reentrant=False, preserve_rng_state=False) for c in chunks])
