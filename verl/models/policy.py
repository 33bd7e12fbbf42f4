"""PolicyModel: a Hugging Face model whose forward returns log-probs of responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from verl.models.cache import ResponseCache
from verl.models.families import family_of
from verl.models.log_probs import chunked_entropy, chunked_jsd, chunked_kl, chunked_log_probs
from verl.models.packing import Packed, take


@dataclass(frozen=True)
class Exact:
    """A quantity of the whole next-token distribution: the entropy in `rows`, or, with `other_rows`, the KL from there
    to other rows that have the same responses, or the Jensen-Shannon divergence of both."""

    rows: torch.Tensor
    other_rows: torch.Tensor | None = None
    detach_other: bool = False
    jsd: bool = False


def response_states(
    inner: nn.Module, packed: Packed, images: dict[str, torch.Tensor] | None, cache: ResponseCache | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The state that predicts each valid response token, [N, H], and an anchor: a 0 that holds the vision tower in the
    graph where the batch has no image. Add it to the result, so that FSDP's collectives run on every rank.

    Args:
        inner: The Hugging Face model.
        images: As in PolicyModel.forward.
        cache: Takes the keys and values of the prompts.
    """
    family = family_of(inner.config)
    features, anchor = family.image_features(inner, images, packed.owner, packed.ids.device)
    hidden = inner.model(
        input_ids=packed.ids,
        attention_mask=None,
        **family.forward_arguments(packed.positions, features),
        use_cache=False,
        segments=packed.segments,
        cache=cache,
    ).last_hidden_state
    return take(hidden[0], 0, packed.states), anchor


class PolicyModel(nn.Module):
    """Wraps the model so that hidden states, head and log-probs are all inside one forward.

    FSDP gathers the weights of the root module around its forward; a head called from outside would see shards.
    """

    def __init__(self, inner: nn.Module, banned: Sequence[int], temperature: float, logits_chunk_size: int) -> None:
        """
        Args:
            inner: A model that `use_segments` has prepared.
            banned: Token ids that have probability 0.
            temperature: Divides the logits, as in sampling.
            logits_chunk_size: Tokens whose logits exist at one time.
        """
        super().__init__()
        self.inner = inner
        self.temperature = temperature
        self.logits_chunk_size = logits_chunk_size
        self.register_buffer("banned", torch.tensor(list(banned), dtype=torch.int64), persistent=False)

    def forward(
        self,
        packed: Packed,
        images: dict[str, torch.Tensor] | None,
        exact: Mapping[str, Exact] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Log-probs of the response tokens, and what is asked for of their whole distributions.

        Args:
            images: `packed.images`, an argument of its own so that FSDP casts it to the compute dtype.
            exact: By name; the rows are those that were packed.

        Returns:
            `log_probs` [B, R] and, for each name in `exact`, [rows, R]; float32, 0 outside `packed.valid`.
        """
        valid = packed.valid
        states, anchor = response_states(self.inner, packed, images)
        head = (self.inner.lm_head, self.temperature, self.banned, self.logits_chunk_size)
        log_probs = chunked_log_probs(states, packed.targets, *head)
        log_probs = log_probs.new_zeros(valid.shape).masked_scatter(valid, log_probs)
        result = {"log_probs": log_probs if anchor is None else log_probs + anchor}
        place = torch.cumsum(valid.flatten(), 0).view(valid.shape) - 1  # of each valid token among the states
        for name, wanted in (exact or {}).items():
            rows = valid[wanted.rows]
            own = states[place[wanted.rows][rows]]
            if wanted.other_rows is None:
                values = chunked_entropy(own, *head)
            else:
                other = states[place[wanted.other_rows][valid[wanted.other_rows]]]
            if wanted.jsd:
                values = chunked_jsd(own, other, *head)
            elif wanted.other_rows is not None:
                values = chunked_kl(own, other.detach() if wanted.detach_other else other, *head, wanted.detach_other)
            result[name] = values.new_zeros(rows.shape).masked_scatter(rows, values)
        return result
