"""Packed rows: all sequences of a micro-batch one behind the other in one row, each prompt once.

Responses to one prompt under one view share it as their prefix:

    prefix A | response A1 | response A2 | prefix B | response B1 | ...

Linear layers see every token once and no padding. Attention (`verl.models.attention`) runs by segment: a prefix is
causal, a response sees its prefix and itself. The last token of a response predicts nothing that is trained on and is
left out; the state at the end of a prefix is read by all of its responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from verl.columns import view_column
from verl.models.families.base import Images, join_images
from verl.protocol import DataProto


@dataclass(frozen=True)
class Bucket:
    """Prefixes of equal length P, and their responses as rows of width W, the longest.

    Attributes:
        prefixes: [G, P] places in the packed row.
        responses: [M, W] places in the packed row; 0 behind a response's end.
        owner: [M] which of the prefixes a response belongs to.
        mask: [W, P + W] bool, what a response's token sees of its prefix and of its own.
    """

    prefixes: torch.Tensor
    responses: torch.Tensor
    owner: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Segments:
    """Attention's view of a packed row of T tokens.

    Attributes:
        buckets: The same segments as equal shapes, for attention without variable lengths.
        order: [T] for each place of the row, its place among the outputs of the buckets: of each first all prefixes,
            then all rows of responses.
        query_ends: [S + 1] int32, where each segment begins and ends among the queries, which are in the row's order.
        key_ends: [S + 1] int32, the same among the gathered keys.
        keys: [K] places of the gathered keys: a prefix's own, or prefix and response.
        longest: Tokens of the longest segment, as (queries, keys).
    """

    buckets: tuple[Bucket, ...]
    order: torch.Tensor
    query_ends: torch.Tensor
    key_ends: torch.Tensor
    keys: torch.Tensor
    longest: tuple[int, int]


@dataclass
class Packed:
    """A packed micro-batch.

    Attributes:
        ids: [1, T] tokens.
        positions: [1, 3, T].
        states: [N] place of the state that predicts each valid response token, in the order of rows and tokens.
        targets: [N] those tokens.
        valid: [B, R] bool, which tokens of the rows they are.
        images, owner: As `join_images` returns them, for the image places of the packed row.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    segments: Segments
    states: torch.Tensor
    targets: torch.Tensor
    valid: torch.Tensor
    images: dict[str, torch.Tensor] | None
    owner: list[int]


@dataclass
class _Group:
    """A prefix, its first place in the packed row, and the rows that share it, each with its response's places."""

    row: int
    length: int
    start: int = 0
    rows: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)


def take(tensor: torch.Tensor, dim: int, places: torch.Tensor) -> torch.Tensor:
    """`tensor` at `places`, [N] or [N, M], of a dimension; a place may come several times.

    The gradients of such a place are added up in the same order each time. Indexing sorts them for that on GPUs; on a
    CPU with several threads it adds them as they come, and the same step gives other numbers.
    """
    if tensor.is_cuda:
        return tensor[(slice(None),) * dim + (places,)]
    return tensor.index_select(dim, places.flatten()).unflatten(dim, places.shape)


PrefixKey = tuple[bytes, tuple[str, ...]]


def _prefix_key(prompt: torch.Tensor, images: Images) -> PrefixKey:
    return prompt.numpy().tobytes(), images.digests


def prefix_keys(batch: DataProto, view: str) -> list[PrefixKey]:
    """The prefix of each row under `view`: rows with equal keys share it where they are packed together."""
    ids, images = batch["input_ids"], batch[view_column(view, "mm_inputs")]
    prompt_end = ids.shape[1] - batch["response_mask"].shape[1]
    starts = (prompt_end - batch["attention_mask"][:, :prompt_end].sum(dim=1)).tolist()
    return [_prefix_key(row[start:prompt_end], own) for row, start, own in zip(ids, starts, images, strict=True)]


def pack(
    ids: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    response_mask: torch.Tensor,
    images: Sequence[Images],
    device: torch.device,
) -> Packed:
    """Pack rows of prompts (padded on the left) and responses (padded on the right).

    Args:
        ids, mask: [B, L] tokens, and 1 on those that are no padding.
        positions: [B, 3, L].
        response_mask: [B, R], R last columns of the tokens; a row whose mask is empty has no response here.
        images: Of each row.
        device: Where the result goes; the arguments are on CPU.
    """
    valid = response_mask.bool()
    lengths = valid.sum(dim=1).tolist()
    prompt_end = ids.shape[1] - valid.shape[1]
    starts = (prompt_end - mask[:, :prompt_end].sum(dim=1)).tolist()
    groups: dict[PrefixKey, _Group] = {}
    for row, (start, own) in enumerate(zip(starts, images, strict=True)):
        key = _prefix_key(ids[row, start:prompt_end], own)
        groups.setdefault(key, _Group(row, prompt_end - start)).rows.append(row)
    # Places in the flattened [B, L] arguments, in the packed order; and the places of states in the packed row.
    width, pieces, states, at = ids.shape[1], [], [torch.empty(0, dtype=torch.int64)] * len(lengths), 0
    for group in groups.values():
        pieces.append(torch.arange(group.length) + group.row * width + prompt_end - group.length)
        group.start, at = at, at + group.length
        for row in group.rows:
            kept = max(lengths[row] - 1, 0)  # without its last token
            pieces.append(torch.arange(kept) + row * width + prompt_end)
            group.spans.append((at, kept))
            if lengths[row]:
                first = torch.tensor([group.start + group.length - 1])
                states[row] = torch.cat([first, torch.arange(at, at + kept)])
            at += kept
    order = torch.cat(pieces)
    tensors, owner = join_images([images[group.row] for group in groups.values()])
    return Packed(
        ids=ids.flatten()[order][None].to(device),
        positions=positions.transpose(0, 1).flatten(1)[:, order][None].to(device),
        segments=_segments(list(groups.values()), at, device),
        states=torch.cat(states).to(device),
        targets=ids[:, prompt_end:][valid].to(device),
        valid=valid.to(device),
        images=tensors and {name: tensor.to(device) for name, tensor in tensors.items()},
        owner=owner,
    )


def _segments(groups: list[_Group], total: int, device: torch.device) -> Segments:
    by_length: dict[int, list[_Group]] = {}
    for group in groups:
        by_length.setdefault(group.length, []).append(group)
    buckets, order, at = [], torch.empty(total, dtype=torch.int64), 0
    for length, members in by_length.items():
        spans = [(start, kept, number) for number, g in enumerate(members) for start, kept in g.spans if kept]
        width = max((kept for _, kept, _ in spans), default=0)
        columns = torch.arange(width)
        first, kept, owner = (
            (torch.tensor(list(column), dtype=torch.int64) for column in zip(*spans, strict=True))
            if (spans)
            else (torch.empty(0, dtype=torch.int64),) * 3
        )
        valid = columns < kept[:, None]
        prefixes = torch.tensor([g.start for g in members])[:, None] + torch.arange(length)
        responses = torch.where(valid, first[:, None] + columns, 0)
        mask = torch.ones(width, length + width, dtype=torch.bool).tril(length)
        order[prefixes.flatten()] = torch.arange(prefixes.numel()) + at
        at += prefixes.numel()
        order[responses[valid]] = valid.flatten().nonzero().flatten() + at
        at += valid.numel()
        buckets.append(Bucket(*(t.to(device) for t in (prefixes, responses, owner, mask))))
    queries, keys = [], []
    for group in groups:
        own = torch.arange(group.start, group.start + group.length)
        queries.append(group.length)
        keys.append(own)
        for start, kept in group.spans:
            if kept:
                queries.append(kept)
                keys.append(torch.cat([own, torch.arange(start, start + kept)]))
    counts = [len(piece) for piece in keys]
    return Segments(
        tuple(buckets),
        order.to(device),
        _ends(queries).to(device),
        _ends(counts).to(device),
        torch.cat(keys).to(device),
        (max(queries), max(counts)),
    )


def _ends(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
