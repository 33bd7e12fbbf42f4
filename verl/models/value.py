"""ValueModel: a Hugging Face model whose forward returns the value of each state of a response."""

from __future__ import annotations

import torch
from torch import nn

from verl.models.packing import Packed
from verl.models.policy import response_states


class ValueModel(nn.Module):
    """The critic's model: a policy's, with a linear head of one output, in float32, in place of the one for tokens.

    The head begins at 0, and so do all values: random ones would be taken for an expectation.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.inner.lm_head = nn.Identity()  # not used; a tied one lives on in the embeddings
        hidden = inner.config.get_text_config().hidden_size
        self.value_head = nn.Linear(hidden, 1, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, packed: Packed, images: dict[str, torch.Tensor] | None) -> torch.Tensor:
        """Values [B, R] float32: what the critic expects before each response token, 0 outside `packed.valid`.

        Args as in PolicyModel.forward.
        """
        states, anchor = response_states(self.inner, packed, images)
        values = self.value_head(states.float()).squeeze(-1)
        values = values.new_zeros(packed.valid.shape).masked_scatter(packed.valid, values)
        return values if anchor is None else values + anchor
