"""Every column of a training batch: its shape, who writes it and who reads it. Start here to find your way.

B rows (prompts, then prompts x n responses), P padded prompt length, R padded response length, L = P + R.
Prompts are padded on the left and responses on the right, so that column P is where every response begins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Column:
    """`shape` names dimensions, `dtype` is None for object columns."""

    shape: str
    dtype: torch.dtype | None
    writer: str
    reader: str
    meaning: str


COLUMNS: dict[str, Column] = {
    "uid": Column("B", None, "data", "advantage, views", "names the prompt: file and row"),
    "problem": Column("B", None, "data", "samples.jsonl", "the prompt's text as the model reads it"),
    "answer": Column("B", None, "data", "reward", "the ground truth"),
    "images": Column("B", None, "data", "views", "list of RGB pictures; dropped after the views are made"),
    "view_images": Column("B", None, "data", "views", "the same from other dataset columns: {column: pictures}"),
    "mm_inputs": Column(
        "B", None, "data", "rollout, passes, actor", "dict of image tensors and ids, {} without images"
    ),
    "prompt_ids": Column("B P", torch.int64, "data", "rollout", "prompt tokens, left padded"),
    "prompt_mask": Column("B P", torch.int64, "data", "rollout", "1 on prompt tokens"),
    "prompt_positions": Column("B 3 P", torch.int64, "data", "trainer", "mRoPE positions; text: three equal rows"),
    "responses": Column("B R", torch.int64, "rollout", "reward", "response tokens, right padded"),
    "response_mask": Column(
        "B R", torch.int64, "rollout", "all losses", "1 on response tokens, end token included; update: of graded rows"
    ),
    "rollout_log_probs": Column("B R", torch.float32, "rollout", "metrics", "log-probs as the engine sampled"),
    "weight_version": Column("B", torch.int64, "rollout", "metrics", "how many weight syncs the engine had taken"),
    "input_ids": Column("B L", torch.int64, "trainer", "passes, actor", "prompt and response"),
    "attention_mask": Column("B L", torch.int64, "trainer", "passes, actor", "1 on every real token"),
    "position_ids": Column("B 3 L", torch.int64, "trainer", "passes, actor", "mRoPE positions"),
    "old_log_probs": Column("B R", torch.float32, "passes", "policy term", "of the policy that drew the response"),
    "ref_log_probs": Column("B R", torch.float32, "passes", "ref_kl term, reward", "of the frozen reference"),
    "baseline_scores": Column("B", torch.float32, "collect", "remax", "reward of the prompt's greedy response, or NaN"),
    "rewards": Column("B R", torch.float32, "advantages", "advantage", "score at the last token, less a KL"),
    "scores": Column("B", torch.float32, "advantages", "advantage", "sum of a response's rewards"),
    "accuracy": Column("B", torch.float32, "reward", "terms", "its component accuracy, 0 where it has none"),
    "values": Column("B R", torch.float32, "passes", "gae, critic", "critic's expectation before each token"),
    "returns": Column("B R", torch.float32, "advantages", "critic", "what the critic is trained on"),
    "advantages": Column("B R", torch.float32, "advantage", "policy term", "advantage of each token"),
    # One pair per view, here for the view `masked`:
    "masked_mm_inputs": Column("B", None, "views", "passes, actor", "image tensors of the corrupted images"),
    "masked_log_probs": Column("B R", torch.float32, "passes or actor", "papo terms", "given corrupted images"),
    "masked_rows": Column("B", torch.bool, "views", "view terms", "False where a prompt has no image to corrupt"),
}


# Columns over the whole vocabulary, which only the forward of the update makes: under the original view the first
# one, under a view `v` each as v_<name>. The KL is that of the original view to the view.
EXACT = ("full_entropy", "full_kl", "full_kl_detached")


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


def view_column(view: str, what: str) -> str:
    """The column of `what` under `view`: view_column("masked", "log_probs") is "masked_log_probs"."""
    return f"{view}_{what}"
