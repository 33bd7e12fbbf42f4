"""Sampling with a seed per response, as a logits processor for Hugging Face `generate`."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor

from verl.models.families.base import SpecialTokens
from verl.utils.rng import derive_seed
from verl.workers.rollout.base import SamplingParams


class SeededSampler(LogitsProcessor):
    """Chooses each row's next token with that row's own random numbers, and keeps its log-prob.

    `generate` draws from one global generator, so a response would depend on its neighbours. Here every response
    has its own uniform numbers, drawn beforehand, and the token is where the cumulative distribution passes the
    number; all other logits become -inf, which leaves `generate` no choice.

    Args:
        sampling: one per prompt; rows are the prompts, each n times, side by side.
        special: its banned tokens are never sampled.
    """

    def __init__(self, sampling: list[SamplingParams], special: SpecialTokens, device: torch.device) -> None:
        rows = [(params, k) for params in sampling for k in range(params.n)]
        # Temperature 0 is the limit: the likeliest token alone.
        self.temperature = torch.tensor([[p.temperature or 1.0] for p, _ in rows], device=device)
        self.top_p = torch.tensor([[p.top_p] for p, _ in rows], device=device)
        self.top_k = torch.tensor([[p.top_k if p.temperature else 1] for p, _ in rows], device=device)
        self.banned = torch.tensor(special.banned, device=device)
        self.ends = torch.tensor(special.eos, device=device)
        self.endless = torch.tensor([[p.ignore_eos] for p, _ in rows], device=device)
        self.uniform = torch.stack([_uniform(p, k) for p, k in rows]).to(device)
        self.log_probs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        logits = (scores.float() / self.temperature).index_fill(-1, self.banned, float("-inf"))
        if self.endless.any():
            logits[:, self.ends] = logits[:, self.ends].masked_fill(self.endless, float("-inf"))
        log_probs = torch.log_softmax(self._truncate(logits), dim=-1)
        # float64: in float32 the rounding of a sum over 150,000 tokens is as large as rare tokens are likely.
        cumulative = log_probs.double().exp().cumsum(-1)
        drawn = self.uniform[:, len(self.log_probs), None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, drawn, right=True).clamp(max=scores.shape[-1] - 1)
        self.log_probs.append(log_probs.gather(-1, token).squeeze(-1))
        return torch.full_like(scores, float("-inf")).scatter(-1, token, 0.0)

    def _truncate(self, logits: torch.Tensor) -> torch.Tensor:
        """-inf outside the top k tokens and outside the smallest set of tokens with probability top_p."""
        if (self.top_k < 0).all() and (self.top_p >= 1).all():
            return logits
        ordered, order = logits.sort(dim=-1, descending=True)
        rank = torch.arange(logits.shape[-1], device=logits.device)[None, :]
        dropped = (self.top_k > 0) & (rank >= self.top_k)
        ordered = ordered.masked_fill(dropped, float("-inf"))
        probs = torch.softmax(ordered, dim=-1)
        # A token goes when those before it reach top_p already; the most likely one always stays.
        dropped = (probs.cumsum(-1) - probs >= self.top_p) & (rank > 0)
        ordered = ordered.masked_fill(dropped & (self.top_p < 1), float("-inf"))
        return torch.empty_like(logits).scatter(-1, order, ordered)


def _uniform(params: SamplingParams, k: int) -> torch.Tensor:
    """The random numbers in [0, 1) of response `k`, one per token."""
    generator = torch.Generator().manual_seed(derive_seed(params.seed, k))
    return torch.rand(params.max_tokens, generator=generator, dtype=torch.float64)
