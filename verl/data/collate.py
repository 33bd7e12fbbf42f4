"""Prompts to a padded batch, and prompts with responses to what the trainer reads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from verl.columns import COLUMNS, made_by
from verl.models.families.base import positions_of_response
from verl.protocol import DataProto

OBJECTS = tuple(name for name in made_by("data") if COLUMNS[name].dtype is None)


class PromptCollator:
    """Joins items of a PromptDataset into one batch, prompts padded on the left to the longest."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, items: list[dict[str, Any]]) -> DataProto:
        longest = max(len(item["prompt_ids"]) for item in items)
        ids = torch.full((len(items), longest), self.pad_token_id, dtype=torch.int64)
        mask = torch.zeros(len(items), longest, dtype=torch.int64)
        positions = torch.zeros(len(items), 3, longest, dtype=torch.int64)
        for row, item in enumerate(items):
            length = len(item["prompt_ids"])
            ids[row, longest - length :] = item["prompt_ids"]
            mask[row, longest - length :] = 1
            positions[row, :, longest - length :] = item["prompt_positions"]
        return DataProto.from_dict(
            {"prompt_ids": ids, "prompt_mask": mask, "prompt_positions": positions},
            {name: [item[name] for item in items] for name in OBJECTS},
        )


def pad_rows(rows: DataProto, prompt_width: int, response_width: int, pad_token_id: int) -> DataProto:
    """Rows whose prompts are `prompt_width` wide, padded on the left, and whose responses `response_width`, padded on
    the right; other columns stay."""
    padded = {}
    for name, tensor in rows.tensors.items():
        value = pad_token_id if name in ("prompt_ids", "responses") else 0
        side = COLUMNS[name].pad if name in COLUMNS else ""
        if side == "left":
            padded[name] = F.pad(tensor, (prompt_width - tensor.shape[-1], 0), value=value)
        elif side == "right":
            padded[name] = F.pad(tensor, (0, response_width - tensor.shape[-1]), value=value)
    return rows.with_columns(padded)


def join_responses(prompts: DataProto, rollout: DataProto, num_responses: int = 1) -> DataProto:
    """Prompts, each repeated `num_responses` times, with the engine's responses behind them.

    Args:
        prompts: B rows as the collator makes them.
        rollout: B x num_responses rows with `responses`, `response_mask` and `rollout_log_probs`, in order.
    """
    return whole_sequences(prompts.repeat_interleave(num_responses).with_columns(rollout.tensors))


def whole_sequences(rows: DataProto) -> DataProto:
    """Rows of prompts and responses with `input_ids`, `attention_mask` and `position_ids` of both, one behind the
    other."""
    tail = positions_of_response(rows["prompt_positions"], rows["responses"].shape[1])
    return rows.with_columns(
        {
            "input_ids": torch.cat([rows["prompt_ids"], rows["responses"]], dim=1),
            "attention_mask": torch.cat([rows["prompt_mask"], rows["response_mask"]], dim=1),
            "position_ids": torch.cat([rows["prompt_positions"], tail], dim=2),
        }
    )
