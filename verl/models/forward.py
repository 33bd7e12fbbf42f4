"""Forward of the policy on rows of a batch, under the original view and others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

from verl.columns import ORIGINAL, TOKENS, split_exact, view_column
from verl.models.families.base import join_images
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
        exact: columns `full_entropy`, `<view>_full_entropy`, `<view>_full_kl` and `<view>_full_kl_detached` to
            compute over the whole vocabulary (see `verl.columns.EXACT`).
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
    wanted = {name: _exact(name, selected, starts) for name in exact}
    found = policy(**model_inputs(DataProto.concat(parts), device), exact=wanted)
    width = batch["response_mask"].shape[1]
    result = {}
    for view, rows in selected.items():
        own = found["log_probs"][starts[view] : starts[view] + len(rows)]
        result[view_column(view, "log_probs")] = _all_rows(own, rows, len(batch), width)
    for name in exact:
        view, _ = split_exact(name)
        result[name] = _all_rows(found[name], selected[view], len(batch), width)
    return result


def _exact(name: str, selected: dict[str, torch.Tensor], starts: dict[str, int]) -> Exact:
    """The rows of the joined forward that the column `name` is made of."""
    view, what = split_exact(name)
    rows = starts[view] + torch.arange(len(selected[view]), device=selected[view].device)
    if what == "full_entropy":
        return Exact(rows)
    return Exact(selected[view], rows, detach_other=what == "full_kl_detached")


def _all_rows(values: torch.Tensor, rows: torch.Tensor, count: int, width: int) -> torch.Tensor:
    """[count, width] with `values` in `rows`. The model saw as many response columns as the longest response has;
    the rest is padding in every row."""
    values = F.pad(values, (0, width - values.shape[1]))
    return values if len(rows) == count else values.new_zeros(count, width).index_copy(0, rows, values)


def model_inputs(batch: DataProto, device: torch.device) -> dict[str, Any]:
    """The arguments of PolicyModel.forward, without the columns that are padding in every row.

    Images that are the same, such as those of all responses to a prompt, are among its images once.
    """
    num_response = batch["response_mask"].shape[1]
    num_prompt = batch["input_ids"].shape[1] - num_response
    # A row always has a prompt token; an empty response still needs one column for the shapes to work.
    first = int(batch["attention_mask"][:, :num_prompt].argmax(dim=1).min())
    response = max(1, int(batch["response_mask"].sum(dim=1).max()))
    columns = slice(first, num_prompt + response)
    images, owner = join_images(batch["mm_inputs"])
    return {
        "input_ids": batch["input_ids"][:, columns].to(device),
        "attention_mask": batch["attention_mask"][:, columns].to(device),
        "position_ids": batch["position_ids"][:, :, columns].to(device),
        "response_mask": batch["response_mask"][:, :response].to(device),
        "images": images and {name: tensor.to(device) for name, tensor in images.items()},
        "image_owner": owner,
    }
