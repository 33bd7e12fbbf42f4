"""Forward of the policy on rows of a batch, under the original view and others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from verl.columns import ORIGINAL, TOKENS, split_exact, view_column
from verl.models.packing import pack
from verl.models.policy import Exact, PolicyModel
from verl.protocol import DataProto


def forward_views(
    policy: PolicyModel,
    batch: DataProto,
    views: list[str],
    device: torch.device,
    exact: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """Log-probs [B, R] of `batch` under each view, as column name -> tensor, in one forward of the model.

    ORIGINAL is the policy as it sees the real images; it comes first where `exact` asks for a divergence from it.
    Rows that a view does not cover (no image) are left out of its part of the forward and get 0. One forward over
    both views gathers the sharded weights once.

    Args:
        exact: columns `full_entropy` and `<view>_full_...` to compute over the whole vocabulary (`verl.columns.EXACT`).
    """
    parts, selected = [], {}
    for view in views:
        rows = torch.arange(len(batch))
        if view != ORIGINAL:
            rows = rows[batch[view_column(view, "rows")]]
        images = view_column(view, "mm_inputs")
        part = batch.select([*TOKENS, images]).rows(rows)
        parts.append(DataProto(part.tensors, {"mm_inputs": part.objects[images]}))
        selected[view] = rows.to(device)
    starts = dict(zip(views, accumulate([0, *map(len, parts)]), strict=False))
    if not any(map(len, parts)):  # nothing to see, but FSDP's collectives on other ranks wait for this one
        one = batch.select([*TOKENS, "mm_inputs"]).rows(slice(0, 1))
        parts.append(one.with_columns({"response_mask": torch.zeros_like(one["response_mask"])}))
    wanted = {name: _exact(name, selected, starts) for name in exact}
    found = policy(**model_inputs(DataProto.concat(parts), device), exact=wanted)
    result = {}
    for view, rows in selected.items():
        own = found["log_probs"][starts[view] : starts[view] + len(rows)]
        result[view_column(view, "log_probs")] = _all_rows(own, rows, len(batch))
    for name in exact:
        view, _ = split_exact(name)
        result[name] = _all_rows(found[name], selected[view], len(batch))
    return result


def _exact(name: str, selected: dict[str, torch.Tensor], starts: dict[str, int]) -> Exact:
    """The rows of the joined forward that the column `name` is made of."""
    view, what = split_exact(name)
    rows = starts[view] + torch.arange(len(selected[view]), device=selected[view].device)
    if what == "full_entropy":
        return Exact(rows)
    return Exact(selected[view], rows, detach_other=what == "full_kl_detached", jsd=what == "full_jsd")


def _all_rows(values: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """[count, R] with `values` in `rows`."""
    return values if len(rows) == count else values.new_zeros(count, values.shape[1]).index_copy(0, rows, values)


def model_inputs(batch: DataProto, device: torch.device) -> dict[str, Any]:
    """The arguments of PolicyModel.forward: the rows, packed, and their different images."""
    names = ("input_ids", "attention_mask", "position_ids", "response_mask", "mm_inputs")
    packed = pack(*(batch[name] for name in names), device)
    return {"packed": packed, "images": packed.images}
