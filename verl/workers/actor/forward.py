"""From rows of a batch to the policy's log-probs, under the original view and others."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from verl.columns import view_column
from verl.models.policy import PolicyModel
from verl.protocol import DataProto

ORIGINAL = ""
TOKENS = ("input_ids", "attention_mask", "position_ids", "response_mask")


def forward_views(
    policy: PolicyModel, batch: DataProto, views: list[str], temperature: float, device: torch.device
) -> dict[str, torch.Tensor]:
    """Log-probs [B, R] of `batch` under each view, as column name -> tensor, in one forward of the model.

    ORIGINAL is the policy as it sees the real images. Rows that a view does not cover (no image) are left out
    of its part of the forward and get 0. One forward over both views gathers the sharded weights once.
    """
    parts, selected = [], []
    for view in views:
        rows = torch.arange(len(batch))
        if view != ORIGINAL:
            rows = rows[batch[view_column(view, "rows")]]
        images = "mm_inputs" if view == ORIGINAL else view_column(view, "mm_inputs")
        part = batch.select([*TOKENS, images]).rows(rows)
        parts.append(DataProto(part.tensors, {"mm_inputs": part.objects[images]}))
        selected.append(rows.to(device))
    log_probs = policy(**model_inputs(DataProto.concat(parts), device), temperature=temperature)
    # The model saw as many response columns as the longest response has; the rest is padding in every row.
    log_probs = F.pad(log_probs, (0, batch["response_mask"].shape[1] - log_probs.shape[1]))
    result, at = {}, 0
    for view, rows in zip(views, selected, strict=True):
        part, at = log_probs[at : at + len(rows)], at + len(rows)
        if len(rows) < len(batch):
            part = part.new_zeros(len(batch), part.shape[1]).index_copy(0, rows, part)
        result[view_column(view, "log_probs") if view else "log_probs"] = part
    return result


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
