"""Records of a few responses, for samples.jsonl and those who look at them: text, score, and token by token what the
policy thought of it, with and without the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from verl.algorithms.losses.estimators import k3
from verl.columns import view_column
from verl.protocol import DataProto
from verl.workers.reward.base import Outcome, RewardInput

Pictures = Mapping[str, Image.Image]

DIGITS = 4  # of what is written for each token
BROKEN = "\ufffd"  # stands for bytes that are no character yet


def samples(batch: DataProto, inputs: list[RewardInput], outcomes: list[Outcome], count: int) -> list[dict[str, Any]]:
    """The first `count` responses as records; one that was not graded has no score, and a reason."""
    records = []
    for uid, problem, i, outcome in zip(batch["uid"], batch["problem"], inputs, outcomes, strict=True):
        if len(records) == count:
            break
        found = {"uid": uid, "prompt": problem, "response": i["response"], "answer": i["ground_truth"]}
        found["score"] = dict(outcome.score or {})
        if "drawn_under_view" in batch and bool(batch["drawn_under_view"][len(records)]):
            found["drawn_under_view"] = True
        records.append(found | ({"not_graded": outcome.failure.reason} if outcome.failure else {}))
    return records


def add_tokens(
    records: list[dict[str, Any]],
    batch: DataProto,
    tokenizer: PreTrainedTokenizerBase,
    views: tuple[str, ...] = (),
    shown: Mapping[int, Mapping[str, torch.Tensor]] | None = None,
) -> None:
    """Give the records of the first rows of `batch` their `tokens` and, for each token, `log_prob`, `advantage`, and of
    each of the `views` the log-prob and the perception KL in nats: exact where the update has computed it, else k3.

    Args:
        shown: By row, columns [R] that only the forward of the update has made (see DataParallelActor.shown).
    """
    for row, record in enumerate(records):
        length = int(batch["response_mask"][row].sum()) or int((batch["rollout_log_probs"][row] != 0).sum())
        columns = {name: column[row] for name, column in batch.tensors.items()} | dict((shown or {}).get(row, {}))
        log_probs = next(columns[n] for n in ("old_log_probs", "log_probs", "rollout_log_probs") if n in columns)
        record["tokens"] = pieces(tokenizer, batch["responses"][row][:length].tolist())
        record["log_prob"] = written(log_probs[:length])
        if "advantages" in columns:
            record["advantage"] = written(columns["advantages"][:length])
        for view in views:
            masked = columns.get(view_column(view, "log_probs"))
            if masked is None or not bool(columns.get(view_column(view, "rows"), True)):
                continue
            exact = columns.get(view_column(view, "full_kl"))
            kl = k3(log_probs.double(), masked.double()) if exact is None else exact
            found = {"log_prob": written(masked[:length]), "kl": written(kl[:length])}
            record.setdefault("views", {})[view] = found


def written(values: torch.Tensor) -> list[float]:
    return [round(value, DIGITS) for value in values.tolist()]


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text of each token; of tokens that are a character only together, the last has it."""
    found, waiting = [], []
    for i in ids:
        waiting.append(i)
        text = tokenizer.decode(waiting)
        if text.endswith(BROKEN) and len(waiting) < 4:
            found.append("")
        else:
            found.append(text)
            waiting = []
    return found


def add_pictures(records: list[dict[str, Any]], pictures: list[Pictures]) -> None:
    """Give the records their pictures: `image`, and one by the name of each view. RunDir makes files of them."""
    for record, found in zip(records, pictures, strict=False):
        if found:
            record["pictures"] = dict(found)
