"""Attention by segments, for transformers' `AttentionInterface`: over packed rows (`verl.models.packing`) in the
language model, over images and their windows in vision towers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from verl.models.cache import ResponseCache
from verl.models.families import family_of
from verl.models.packing import Segments, take

LANGUAGE = "segments"
VISION = "flash_segments"  # transformers hands the segments of a tower only to a function with "flash" in its name


def use_segments(inner: nn.Module) -> None:
    """Let the Hugging Face model `inner` attend by segments; a vision tower only where it would by SDPA."""
    family = family_of(inner.config)
    inner.config.get_text_config()._attn_implementation = LANGUAGE
    family.prepare(inner)
    if family.packs_images and inner.config.vision_config._attn_implementation == "sdpa":
        inner.config.vision_config._attn_implementation = VISION


def segment_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    segments: Segments | None,
    scaling: float,
    cache: ResponseCache | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a packed row of T tokens; or, without segments, of one more token of each response in `cache`.

    Args:
        query: [1, H, T, D].
        key, value: [1, K, T, D] with H a multiple of K.
        cache: Keeps keys and values of the prompts in the packed row.

    Returns:
        [1, T, H, D].
    """
    if sliding_window is not None:
        raise ValueError(
            f"{type(module).__name__} has a sliding window of {sliding_window} tokens, which is not supported"
        )
    if segments is None:
        return cache.attend(module.layer_idx, query, key, value, scaling), None
    if cache is not None:
        cache.add_prompts(module.layer_idx, key[0], value[0])
    attend = _by_length if has_varlen(query) else _by_bucket
    return attend(query[0], key[0], value[0], segments, scaling)[None], None


def window_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of patches, each over all of its segment.

    Args:
        query, key, value: [1, H, S, D].
        cu_seq_lens_q: [segments + 1], where each begins and ends.
        max_length_q: Patches of the longest one.

    Returns:
        [1, S, H, D].
    """
    if has_varlen(query):
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
        return varlen_attn(q, k, v, *(cu_seq_lens_q,) * 2, *(max_length_q,) * 2, scale=scaling)[None], None
    starts, lengths, found = cu_seq_lens_q[:-1], cu_seq_lens_q.diff(), []
    place = torch.arange(max_length_q, device=query.device)
    places = [starts[lengths == length, None] + place[:length] for length in lengths.unique().tolist()]
    alike = len(places) == 1  # then the segments are the row itself, cut evenly, and nothing is copied
    for rows in places:  # segments of one length at a time: [G, length]
        q, k, v = (
            (tensor[0].unflatten(1, rows.shape) if alike else take(tensor[0], 1, rows)).transpose(0, 1)
            for tensor in (query, key, value)
        )
        found.append(F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2).flatten(0, 1))
    if alike:
        return found[0][None], None
    order = torch.cat([rows.flatten() for rows in places]).argsort()
    return take(torch.cat(found), 0, order)[None], None


def has_varlen(query: torch.Tensor) -> bool:
    """Whether torch has attention over variable lengths for this tensor: on GPUs, in 16 bits."""
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)


AttentionInterface.register(LANGUAGE, segment_attention)
AttentionInterface.register(VISION, window_attention)


def _by_bucket(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scaling: float
) -> torch.Tensor:
    """[T, H, D] by SDPA over equal shapes, for want of attention over variable lengths: on CPU and in float32."""
    heads, repeats = key.shape[0], query.shape[0] // key.shape[0]
    found = []
    for bucket in segments.buckets:
        q, k, v = (take(each, 1, bucket.prefixes).transpose(0, 1) for each in (query, key, value))  # [G, ., P, D]
        each_k, each_v = (tensor.repeat_interleave(repeats, dim=1) if repeats > 1 else tensor for tensor in (k, v))
        prefix = F.scaled_dot_product_attention(q, each_k, each_v, is_causal=True, scale=scaling)
        found.append(prefix.transpose(1, 2).flatten(0, 1))
        if not len(bucket.responses):
            continue
        own_q, own_k, own_v = (take(each, 1, bucket.responses).transpose(0, 1) for each in (query, key, value))
        seen_k, seen_v = (torch.cat([take(p, 0, bucket.owner), own], dim=2) for p, own in ((k, own_k), (v, own_v)))
        # Heads that share keys stand behind each other as further queries, so that nothing is copied for them.
        folded = own_q.unflatten(1, (heads, repeats)).flatten(2, 3)  # [M, K, repeats W, D]
        mask = bucket.mask.repeat(repeats, 1)
        answer = F.scaled_dot_product_attention(folded, seen_k, seen_v, attn_mask=mask, scale=scaling)
        answer = answer.unflatten(2, (repeats, -1)).flatten(1, 2)
        found.append(answer.transpose(1, 2).flatten(0, 1))
    return take(torch.cat(found), 0, segments.order)


def _by_length(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scaling: float
) -> torch.Tensor:
    """[T, H, D] in one call for all segments: causal, aligned to the end of the keys."""
    from torch.nn.attention.varlen import varlen_attn

    q = query.transpose(0, 1)
    k, v = (tensor[:, segments.keys].transpose(0, 1) for tensor in (key, value))
    longest = segments.longest
    return varlen_attn(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        segments.query_ends,
        segments.key_ends,
        *longest,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
