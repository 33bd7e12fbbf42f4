"""From tokens and images to the hidden states that responses are read from."""

from __future__ import annotations

import torch
from torch import nn

from verl.models.families import encode_images, forward_arguments


def response_states(
    inner: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor,
    num_response: int,
    pixel_values: torch.Tensor | None,
    image_grid_thw: torch.Tensor | None,
    image_owner: list[int],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The state before each response token, [B, R, H], and an anchor: a 0 that holds the vision tower in the graph
    where the batch has no image. Add it to the result, so that FSDP's collectives run on every rank.

    Args:
        inner: the Hugging Face model.
        num_response: R; the last R columns of the tokens are the response. For the rest see PolicyModel.forward.
    """
    features, anchor = encode_images(inner, pixel_values, image_grid_thw, image_owner, input_ids.device)
    hidden = inner.model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        **forward_arguments(inner.config, position_ids, features),
        use_cache=False,
    ).last_hidden_state
    # The state at position t predicts token t + 1, so the response's states begin one place before it.
    return hidden[:, -num_response - 1 : -1], anchor
