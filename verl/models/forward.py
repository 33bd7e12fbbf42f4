"""From rows of a batch to the policy's log-probs, under the original view and others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

from verl.columns import split_exact, view_column
from verl.models.policy import Exact, PolicyModel
from verl.protocol import DataProto

ORIGINAL = ""
TOKENS = ("input_ids", "attention_mask", "position_ids", "response_mask")


def forward_views(
    policy: PolicyModel,
    batch: DataProto,
    views: list[str],
    temperature: float,
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
        images = "mm_inputs" if view == ORIGINAL else view_column(view, "mm_inputs")
        part = batch.select([*TOKENS, images]).rows(rows)
        parts.append(DataProto(part.tensors, {"mm_inputs": part.objects[images]}))
        selected[view] = rows.to(device)
    starts = dict(zip(views, accumulate([0, *map(len, parts)]), strict=False))
    wanted = {name: _exact(name, selected, starts) for name in exact}
    found = policy(**model_inputs(DataProto.concat(parts), device), temperature=temperature, exact=wanted)
    width = batch["response_mask"].shape[1]
    result = {}
    for view, rows in selected.items():
        own = found["log_probs"][starts[view] : starts[view] + len(rows)]
        result[_column(view, "log_probs")] = _all_rows(own, rows, len(batch), width)
    for name in exact:
        view, _ = split_exact(name)
        result[name] = _all_rows(found[name], selected[view], len(batch), width)
    return result


def _column(view: str, what: str) -> str:
    return view_column(view, what) if view else what


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
    """What PolicyModel.forward takes, without the columns that are padding in every row.

    Rows that hold the same `mm_inputs` object (responses to one prompt) share its images.
    """
    num_response = batch["response_mask"].shape[1]
    num_prompt = batch["input_ids"].shape[1] - num_response
    # A row always has a prompt token; an empty response still needs one column for the shapes to work.
    first = int(batch["attention_mask"][:, :num_prompt].argmax(dim=1).min())
    response = max(1, int(batch["response_mask"].sum(dim=1).max()))
    columns = slice(first, num_prompt + response)
    return {
        "input_ids": batch["input_ids"][:, columns].to(device),
        "attention_mask": batch["attention_mask"][:, columns].to(device),
        "position_ids": batch["position_ids"][:, :, columns].to(device),
        "response_mask": batch["response_mask"][:, :response].to(device),
        **join_images(list(batch["mm_inputs"]), device),
    }


def join_images(mm_inputs: list[dict[str, torch.Tensor]], device: torch.device) -> dict[str, Any]:
    """The different images of all rows one behind the other, and which of them each image place is."""
    first_image: dict[int, int] = {}
    pixels, grids, owner = [], [], []
    num_images = 0
    for inputs in mm_inputs:
        if not inputs:
            continue
        grid = inputs["image_grid_thw"]
        if id(inputs) not in first_image:
            first_image[id(inputs)] = num_images
            num_images += len(grid)
            pixels.append(inputs["pixel_values"])
            grids.append(grid)
        start = first_image[id(inputs)]
        owner.extend(range(start, start + len(grid)))
    if not pixels:
        return {"pixel_values": None, "image_grid_thw": None, "image_owner": []}
    return {
        "pixel_values": torch.cat(pixels).to(device),
        "image_grid_thw": torch.cat(grids).to(device),
        "image_owner": owner,
    }
