"""The cache of generation: keys and values of prompts, once, and of responses, and states of linear attention."""

from __future__ import annotations

import torch


class ResponseCache:
    """Cache of one batch: G prompts with n responses each, which all have equally many tokens so far.

    Attention is computed in two parts under one softmax, so the n responses read their prompt's keys together and
    nothing is copied when a token is added.
    """

    def __init__(self, ends: torch.Tensor, lengths: torch.Tensor, n: int, steps: int) -> None:
        """
        Args:
            ends: [G] place of each prompt's last token in the packed row of all prompts.
            lengths: [G] tokens of each prompt.
            n: Responses per prompt.
            steps: Tokens of a response at most.
        """
        columns = torch.arange(int(lengths.max()), device=ends.device)
        self.absent = (columns >= lengths[:, None])[:, None, None]  # [G, 1, 1, P]
        self.places = torch.where(self.absent[:, 0, 0], 0, (ends - lengths + 1)[:, None] + columns)
        self.n, self.steps, self.filled = n, steps, 0
        self.prompts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by layer, each [G, K, P, D]
        self.own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by layer, each [G, K, n, steps, D]
        self.ends = ends
        self.states: dict[int, tuple[torch.Tensor, ...]] = {}  # by layer of linear attention, each [G n, ...]

    def add_prompts(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep keys and values [K, T, D] of the packed prompts."""
        kept = tuple(tensor[:, self.places].transpose(0, 1).contiguous() for tensor in (key, value))
        self.prompts[layer] = kept
        groups, heads, _, width = kept[0].shape
        self.own[layer] = tuple(key.new_empty(groups, heads, self.n, self.steps, width) for _ in range(2))

    def add_states(self, layer: int, ends: torch.Tensor, states: tuple[torch.Tensor, ...]) -> None:
        """Give each response the states, [prefixes, ...] each, behind its prompt, whose last token is at `ends`."""
        order = (self.ends[:, None] == ends).int().argmax(dim=1).repeat_interleave(self.n)
        self.states[layer] = tuple(state[order] for state in states)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Add one token to each response, and let it see its prompt and its response.

        Args:
            query: [G n, H, 1, D].
            key, value: [G n, K, 1, D] with H a multiple of K.

        Returns:
            [G n, 1, H, D].
        """
        (prompt_key, prompt_value), own = self.prompts[layer], self.own[layer]
        groups, heads, prompt, width = prompt_key.shape
        for tensor, new in zip(own, (key, value), strict=True):
            tensor[:, :, :, self.filled] = new.view(groups, self.n, heads, width).transpose(1, 2)
        own_key, own_value = (tensor[:, :, :, : self.filled + 1] for tensor in own)
        # [G, K, n, heads that share a key, D]
        query = query.view(groups, self.n, heads, -1, width).transpose(1, 2) * scaling
        on_prompt = query.flatten(2, 3) @ prompt_key.transpose(-1, -2)
        on_own = (query @ own_key.transpose(-1, -2)).flatten(2, 3)
        scores = torch.cat([on_prompt.masked_fill(self.absent, float("-inf")), on_own], dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
        found = weights[..., :prompt] @ prompt_value
        found = found.view(query.shape) + weights[..., prompt:].view(*query.shape[:-1], -1) @ own_value
        return found.transpose(1, 2).reshape(groups * self.n, 1, -1, width)

    def select(self, groups: torch.Tensor, rows: torch.Tensor) -> None:
        """Go on with these prompts [G'], and of each with these of its responses [G', n']."""
        chosen = (groups[:, None] * self.n + rows).flatten()
        self.states = {layer: tuple(state[chosen] for state in states) for layer, states in self.states.items()}
        self.n, self.absent = rows.shape[1], self.absent[groups]
        for layer in self.prompts:
            self.prompts[layer] = tuple(tensor[groups] for tensor in self.prompts[layer])
            self.own[layer] = tuple(
                tensor[groups[:, None], :, rows].transpose(1, 2).contiguous() for tensor in self.own[layer]
            )
