"""PolicyModel: a Hugging Face vision-language model whose forward returns log-probs of responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from verl.models.log_probs import chunked_log_probs


class PolicyModel(nn.Module):
    """Wraps the model so that hidden states, head and log-probs are all inside one forward.

    FSDP gathers the weights of the root module around its forward; a head called from outside would see shards.
    """

    def __init__(self, inner: nn.Module, banned: Sequence[int], logits_chunk_size: int) -> None:
        super().__init__()
        self.inner = inner
        self.logits_chunk_size = logits_chunk_size
        self.register_buffer("banned", torch.tensor(list(banned), dtype=torch.int64), persistent=False)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        response_mask: torch.Tensor,
        pixel_values: torch.Tensor | None,
        image_grid_thw: torch.Tensor | None,
        image_owner: list[int],
        temperature: float,
    ) -> torch.Tensor:
        """Log-probs of the response tokens.

        Args:
            input_ids, attention_mask: [B, L], the last R columns are the response.
            position_ids: [B, 3, L].
            response_mask: [B, R].
            pixel_values, image_grid_thw: of the *different* images only, or None in a batch without images.
            image_owner: which of them each image place is, in the order of rows and of images in a row.
            temperature: divides the logits, as in sampling.

        Returns:
            [B, R] float32, 0 where `response_mask` is 0.
        """
        features, anchor = self._encode_images(pixel_values, image_grid_thw, image_owner)
        hidden = self.inner.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids.transpose(0, 1),
            mm_encoder_outputs=features,
            use_cache=False,
        ).last_hidden_state
        num_response = response_mask.shape[1]
        # The state at position t predicts token t + 1, so the response's states begin one place before it.
        states = hidden[:, -num_response - 1 : -1]
        valid = response_mask.bool()
        targets = input_ids[:, -num_response:][valid]
        log_probs = chunked_log_probs(
            states[valid], targets, self.inner.lm_head, temperature, self.banned, self.logits_chunk_size
        )
        result = log_probs.new_zeros(response_mask.shape)
        result = result.masked_scatter(valid, log_probs)
        return result if anchor is None else result + anchor

    def _encode_images(
        self, pixel_values: torch.Tensor | None, image_grid_thw: torch.Tensor | None, image_owner: list[int]
    ) -> tuple[dict[str, Any] | None, torch.Tensor | None]:
        """(features of every image place, graph anchor). The vision tower sees each different image once.

        Without images the tower still runs, on one black patch that counts 0: on another rank it may have
        images, and FSDP's collectives wait for all ranks.
        """
        if pixel_values is None:
            features = self.inner.model.get_image_features(*self._dummy_image(), return_dict=True)
            return None, 0.0 * torch.cat(list(features.pooler_output)).float().sum()
        features = self.inner.model.get_image_features(pixel_values, image_grid_thw, return_dict=True)
        features.pooler_output = [features.pooler_output[i] for i in image_owner]
        return {"image": features}, None

    def _dummy_image(self) -> tuple[torch.Tensor, torch.Tensor]:
        vision = self.inner.config.vision_config
        merge = vision.spatial_merge_size
        size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        device = self.banned.device
        return torch.zeros(merge * merge, size, device=device), torch.tensor([[1, merge, merge]], device=device)
