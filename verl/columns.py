"""Columns of a training batch, each declared once: shape, dtype, padding, maker and meaning.

B rows (prompts, then prompts x n responses), P padded prompt length, R padded response length, L = P + R.
Prompts are padded on the left and responses on the right, so that column P is where every response begins.

What a run computes, sends to its workers and pads follows from this table and from the columns that its loss terms,
advantages and shapers read (`verl.algorithms.requirements`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        shape: Names of the dimensions.
        dtype: None for a column of Python objects.
        maker: The part of a step that writes it: data, views, rollout, collect, passes, advantages, or update for what
            only the forward of the update computes.
        meaning: One line.
        pad: The side that is padded where rows of different width meet: left, right or none.
    """

    shape: str
    dtype: torch.dtype | None
    maker: str
    meaning: str
    pad: str = ""


INT, FLOAT = torch.int64, torch.float32

COLUMNS: dict[str, Column] = {
    "uid": Column("B", None, "data", "names the prompt: file and row"),
    "problem": Column("B", None, "data", "the prompt's text as the model reads it"),
    "answer": Column("B", None, "data", "the ground truth"),
    "images": Column("B", None, "data", "list of RGB pictures; dropped after the views are made"),
    "view_images": Column("B", None, "data", "pictures of other dataset columns: {column: pictures}"),
    "mm_inputs": Column("B", None, "data", "dict of image tensors and ids, {} without images"),
    "prompt_ids": Column("B P", INT, "data", "prompt tokens", "left"),
    "prompt_mask": Column("B P", INT, "data", "1 on prompt tokens", "left"),
    "prompt_positions": Column("B 3 P", INT, "data", "mRoPE positions; text: three equal rows", "left"),
    "responses": Column("B R", INT, "rollout", "response tokens", "right"),
    "response_mask": Column(
        "B R", INT, "rollout", "1 on response tokens, end token included; 0 after grading failed", "right"
    ),
    "rollout_log_probs": Column("B R", FLOAT, "rollout", "log-probs as the engine sampled", "right"),
    "weight_version": Column("B", INT, "rollout", "number of weight syncs that the engine had received"),
    "epoch": Column("B", INT, "collect", "epoch in which the prompt was drawn, which its masks follow from"),
    "drawn_under_view": Column("B", torch.bool, "collect", "drawn given a view (algorithm.rollout_view)"),
    "baseline_scores": Column("B", FLOAT, "collect", "reward of the prompt's greedy response, or NaN"),
    "outcome": Column("B", None, "collect", "how a response was graded, where a filter had to know"),
    "row": Column("B", INT, "collect", "the row's number in the step"),
    "input_ids": Column("B L", INT, "collect", "prompt and response"),
    "attention_mask": Column("B L", INT, "collect", "1 on prompt and response tokens"),
    "position_ids": Column("B 3 L", INT, "collect", "mRoPE positions"),
    "old_log_probs": Column("B R", FLOAT, "passes", "log-probs of the policy that drew the response"),
    "ref_log_probs": Column("B R", FLOAT, "passes", "log-probs of the frozen reference"),
    "values": Column("B R", FLOAT, "passes", "the critic's expectation before each token"),
    "group": Column("B", INT, "advantages", "number that responses to one prompt share"),
    "rewards": Column("B R", FLOAT, "advantages", "score at the last token, less a KL"),
    "scores": Column("B", FLOAT, "advantages", "sum of a response's rewards"),
    "accuracy": Column("B", FLOAT, "advantages", "the reward's component of that name, 0 where it has none"),
    "returns": Column("B R", FLOAT, "advantages", "targets of the critic"),
    "advantages": Column("B R", FLOAT, "advantages", "advantage of each token"),
    "log_probs": Column("B R", FLOAT, "update", "log-probs of the policy"),
    "full_entropy": Column("B R", FLOAT, "update", "entropy over the whole vocabulary"),
}

# Columns of a view `v`, as v_<name>. `full_kl` is the exact KL of the original view to v; it and the other `full_` ones
# run over the whole vocabulary: in the forward of the update, or, where advantages are made of them, in a pass before.
VIEW_COLUMNS: dict[str, Column] = {
    "mm_inputs": Column("B", None, "views", "image tensors of the corrupted images"),
    "rows": Column("B", torch.bool, "views", "False where a prompt has no image to corrupt"),
    "log_probs": Column("B R", FLOAT, "passes", "log-probs given the corrupted images; of a live view: update"),
    "full_entropy": Column("B R", FLOAT, "update", "entropy given the corrupted images"),
    "full_kl": Column("B R", FLOAT, "update", "KL of the original view to this one"),
    "full_kl_detached": Column("B R", FLOAT, "update", "the same without gradient through this view"),
    "full_jsd": Column("B R", FLOAT, "update", "Jensen-Shannon divergence of the original view and this one"),
}

ORIGINAL = ""  # the name of the view with the real images
TOKENS = ("input_ids", "attention_mask", "position_ids", "response_mask")  # what a forward reads besides images
EXACT = ("full_entropy", "full_kl", "full_kl_detached", "full_jsd")


def made_by(*makers: str) -> tuple[str, ...]:
    """Names of the columns that these parts of a step write."""
    return tuple(name for name, column in COLUMNS.items() if column.maker in makers)


def view_column(view: str, what: str) -> str:
    """The column of `what` under `view`: view_column("masked", "log_probs") is "masked_log_probs"."""
    return f"{view}_{what}" if view else what


def split_exact(name: str) -> tuple[str, str]:
    """(view, one of EXACT) of such a column; the view is empty for the original. Raises ValueError for another."""
    for what in EXACT:
        if name == what or name.endswith(f"_{what}"):
            return name.removesuffix(what).removesuffix("_"), what
    raise ValueError(f"'{name}' is no column over the whole vocabulary")


def is_exact(name: str) -> bool:
    return name.endswith(EXACT)


def is_view_rows(name: str) -> bool:
    """Whether the column says which rows a view covers."""
    return name.endswith("_rows")
