"""Sampling with a seed per response."""

from __future__ import annotations

import torch

from verl.models.families.base import SpecialTokens
from verl.utils.rng import derive_seed
from verl.workers.rollout.base import SamplingParams


class SeededSampler:
    """Chooses each row's next token with that row's own random numbers.

    With one generator for all, a response would depend on its neighbours. Here every response has its own uniform
    numbers, drawn beforehand, and the token is where the cumulative distribution passes the number.

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

    def __call__(self, logits: torch.Tensor, rows: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token `step` [R] of responses `rows` [R], and its log-prob [R], from logits [R, vocabulary]."""
        logits = (logits.float() / self.temperature[rows]).index_fill(-1, self.banned, float("-inf"))
        if self.endless.any():
            logits[:, self.ends] = logits[:, self.ends].masked_fill(self.endless[rows], float("-inf"))
        log_probs = torch.log_softmax(self._truncate(logits, rows), dim=-1)
        # float64: in float32 the rounding of a sum over 150,000 tokens is as large as rare tokens are likely.
        cumulative = log_probs.double().exp().cumsum(-1)
        drawn = self.uniform[rows, step, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, drawn, right=True).clamp(max=logits.shape[-1] - 1)
        return token.squeeze(-1), log_probs.gather(-1, token).squeeze(-1)

    def _truncate(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """-inf outside the top k tokens and outside the smallest set of tokens with probability top_p."""
        if (self.top_k < 0).all() and (self.top_p >= 1).all():
            return logits
        ordered, order = logits.sort(dim=-1, descending=True)
        rank = torch.arange(logits.shape[-1], device=logits.device)[None, :]
        top_k, top_p = self.top_k[rows], self.top_p[rows]
        dropped = (top_k > 0) & (rank >= top_k)
        ordered = ordered.masked_fill(dropped, float("-inf"))
        probs = torch.softmax(ordered, dim=-1)
        # A token goes when those before it reach top_p already; the most likely one always stays.
        dropped = (probs.cumsum(-1) - probs >= top_p) & (rank > 0)
        ordered = ordered.masked_fill(dropped & (top_p < 1), float("-inf"))
        return torch.empty_like(logits).scatter(-1, order, ordered)


def _uniform(params: SamplingParams, k: int) -> torch.Tensor:
    """The random numbers in [0, 1) of response `k`, one per token."""
    generator = torch.Generator().manual_seed(derive_seed(params.seed, k))
    return torch.rand(params.max_tokens, generator=generator, dtype=torch.float64)
