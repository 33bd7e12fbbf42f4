"""From prompts to the rows of a step: generation, views, rewards, and DAPO's choice of groups."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from verl.algorithms.groups import group_mean, keep_groups
from verl.data.collate import pad_rows, whole_sequences
from verl.data.views import add_view
from verl.data.vision import VisionProcessor
from verl.protocol import DataProto, object_array
from verl.trainer.advantages import component, graded, overall_scores
from verl.trainer.run import Run
from verl.workers.reward.base import Outcome, RewardError, RewardInput
from verl.workers.rollout.base import train_sampling

logger = logging.getLogger(__name__)


@dataclass
class Rows:
    """What a step trains on: whole groups of responses, side by side.

    `outcomes` waits for those of the rows. `mini_batches` is the number of updates that they make.
    """

    batch: DataProto
    inputs: list[RewardInput]
    outcomes: Callable[[], list[Outcome]]
    mini_batches: int
    metrics: dict[str, float] = field(default_factory=dict)


class Collector:
    """Draws prompts and makes the rows of one step after the other.

    With `algorithm.online_filtering` (DAPO's dynamic sampling, arXiv 2503.14476, section 3.2) it goes on drawing until
    enough groups are neither all right nor all wrong. What is more than a step needs waits for the next one, so that
    nothing that was generated is thrown away; its responses then come from weights that are a step older, as
    `rollout/weight_version` shows. Where too few groups survive, the step trains on those there are.
    """

    def __init__(self, run: Run, prompts: Iterator[tuple[int, DataProto]]) -> None:
        self.run = run
        self.prompts = prompts
        self.waiting: DataProto | None = None

    def collect(self) -> Rows | None:
        """The rows of the next step; None where filtering has left none."""
        run = self.run
        if run.config.algorithm.online_filtering:
            rows, metrics = self._filtered()
            rows, mini_batches = self._cut(rows)
            if rows is None:
                return None
            metrics["train/filter_waiting_groups"] = len(self.waiting or ()) / run.sizes.responses_per_prompt
            inputs = reward_inputs(run.vision, rows)
            outcomes: Callable[[], list[Outcome]] = partial(list, rows["outcome"])
        else:
            rows, metrics, mini_batches = self._generate(), {}, run.sizes.mini_batches
            inputs = reward_inputs(run.vision, rows)
            outcomes = partial(run.workers.reward.result, run.workers.reward.start(inputs))
        run.workers.rollout.sleep()
        return Rows(whole_sequences(rows), inputs, outcomes, mini_batches, metrics)

    def _generate(self) -> DataProto:
        """A row for each response to the next prompts, with every view, and without the pictures."""
        run = self.run
        epoch, prompts = next(self.prompts)
        uids = list(prompts["uid"])
        sampling = train_sampling(run.config.worker.rollout, run.config.data.max_response_length, uids, epoch)
        if run.requirements.baseline:  # further requests of the same batch, so that no engine waits for them
            asked = DataProto.concat([prompts, prompts])
            sampling += [replace(request, n=1, temperature=0.0) for request in sampling]
        else:
            asked = prompts
        rollout = run.workers.rollout.generate(asked, sampling)
        rows = add_views(run, prompts, epoch)  # while the engine generates
        responses = run.workers.rollout.result(rollout)
        if run.requirements.baseline:
            greedy = responses.rows(slice(len(rows), None))
            rows = rows.with_columns({"baseline_scores": self._baseline(prompts, greedy)})
        return rows.with_columns(dict(responses.rows(slice(0, len(rows))).tensors.items()))

    def _baseline(self, prompts: DataProto, greedy: DataProto) -> torch.Tensor:
        """[B] for each row of a step, the reward of its prompt's greedy response; NaN where that was not graded."""
        run = self.run
        inputs = reward_inputs(run.vision, prompts.with_columns(dict(greedy.tensors.items())))
        outcomes = self._graded(inputs)
        scores = overall_scores(run.config, outcomes, greedy["response_mask"])
        scores = scores.masked_fill(~graded(outcomes), float("nan"))
        return scores.repeat_interleave(run.sizes.responses_per_prompt)

    def _graded(self, inputs: list[RewardInput]) -> list[Outcome]:
        reward = self.run.workers.reward
        return reward.result(reward.start(inputs))

    def _filtered(self) -> tuple[DataProto, dict[str, float]]:
        """Groups that teach something, those that waited first, and what the filter saw."""
        run, algorithm = self.run, self.run.config.algorithm
        n, needed = run.sizes.responses_per_prompt, run.sizes.prompts_per_step
        parts = [self.waiting] if self.waiting is not None else []
        seen: list[torch.Tensor] = []
        tries = 0
        while sum(map(len, parts)) < needed * n and tries < run.config.trainer.max_try_make_batch:
            rows = self._generate()
            outcomes = self._graded(reward_inputs(run.vision, rows))
            values, counted = filter_values(outcomes, algorithm.filter_key), graded(outcomes)
            group = torch.arange(len(rows)) // n
            keep = keep_groups(values, group, algorithm.filter_low, algorithm.filter_high, counted)
            parts.append(rows.with_columns(objects={"outcome": object_array(outcomes)}).rows(keep))
            seen.append(group_mean(values, group, counted)[::n])
            tries += 1
        rows = concat_rows([part for part in parts if len(part)], run.vision.special.pad) if any(parts) else parts[0]
        if len(rows) < needed * n:
            logger.warning(
                "only %d of %d groups survived the filter in %d tries (trainer.max_try_make_batch): this step trains "
                "on those",
                len(rows) // n,
                needed,
                tries,
            )
        metrics = {"train/filter_tries": float(tries)}
        means = torch.cat(seen) if seen else torch.empty(0)
        means = means[means.isfinite()]  # of groups without a single graded response nothing is known
        if len(means):
            metrics["train/filter_all_right"] = (means >= algorithm.filter_high).double().mean().item()
            metrics["train/filter_all_wrong"] = (means <= algorithm.filter_low).double().mean().item()
        return rows, metrics

    def _cut(self, rows: DataProto) -> tuple[DataProto | None, int]:
        """(rows of this step, their number of mini-batches); the rest waits. Ranks must share each mini-batch equally,
        so a step that is too small for one ordinary update makes one smaller update."""
        sizes = self.run.sizes
        n = sizes.responses_per_prompt
        groups = len(rows) // n
        mini_batches = min(groups // sizes.prompts_per_update, sizes.mini_batches)
        take = mini_batches * sizes.prompts_per_update
        if not take:
            take = next((g for g in range(groups, 0, -1) if g * n % sizes.ranks == 0), 0)
        self.waiting = rows.rows(slice(take * n, None)) if take < groups else None
        return (rows.rows(slice(0, take * n)), max(mini_batches, 1)) if take else (None, 0)


def filter_values(outcomes: list[Outcome], key: str) -> torch.Tensor:
    """[B] what the filter looks at, 0 without a score. Raises RewardError where the reward has no such component."""
    known = next((outcome.score for outcome in outcomes if outcome.score is not None), {key: 0.0})
    if key not in known:
        raise RewardError(
            f"algorithm.filter_key='{key}': the reward function returns {', '.join(known)}; name one of those"
        )
    return component(outcomes, key)


def concat_rows(parts: list[DataProto], pad: int) -> DataProto:
    """Rows of several generations as one batch, padded to the widest."""
    prompt = max(part["prompt_ids"].shape[1] for part in parts)
    response = max(part["responses"].shape[1] for part in parts)
    return DataProto.concat([pad_rows(part, prompt, response, pad) for part in parts])


def add_views(run: Run, prompts: DataProto, epoch: int) -> DataProto:
    """A row per response, with the image tensors of every view that a loss term reads, and without the pictures."""
    copies = run.sizes.responses_per_prompt
    rows = prompts.repeat_interleave(copies)
    for view in run.requirements.views:
        config = run.config.algorithm.views[view]
        rows = add_view(rows, view, config, run.vision, run.config.trainer.seed, epoch, copies)
    return rows.select([c for c in (*rows.tensors.keys(), *rows.objects) if c not in ("images", "view_images")])


def reward_inputs(vision: VisionProcessor, batch: DataProto) -> list[RewardInput]:
    """What the reward function sees of each response. Where the template opens the model's turn, as with `<think>`,
    that is put before it: a reward sees whole turns, whatever the model."""
    lengths = batch["response_mask"].sum(dim=1).tolist()
    tokens = [ids[:length] for ids, length in zip(batch["responses"].tolist(), lengths, strict=True)]
    texts = vision.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [
        RewardInput(
            response=vision.turn_start + text, response_length=length, ground_truth=answer, uid=uid, problem=problem
        )
        for text, length, answer, uid, problem in zip(
            texts, lengths, batch["answer"], batch["uid"], batch["problem"], strict=True
        )
    ]
