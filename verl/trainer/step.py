"""One training step, as data flows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
import torch

from verl.algorithms.advantage import ADVANTAGES
from verl.algorithms.requirements import Requirements
from verl.columns import view_column
from verl.config.config import Config
from verl.config.sizes import Sizes
from verl.data.collate import join_responses
from verl.data.views import add_view
from verl.data.vision import VisionProcessor
from verl.metrics.timing import Timings
from verl.protocol import DataProto, check_columns
from verl.trainer.batch_metrics import reward_metrics, rollout_metrics, warn_of_mismatch
from verl.trainer.passes import run_passes
from verl.trainer.workers import Workers
from verl.workers.actor.forward import TOKENS
from verl.workers.reward.manager import RewardInput, RewardScore
from verl.workers.rollout.base import train_sampling


@dataclass(frozen=True)
class Run:
    """What stays the same over a run."""

    config: Config
    sizes: Sizes
    requirements: Requirements
    vision: VisionProcessor
    workers: Workers
    total_steps: int


@dataclass(frozen=True)
class StepResult:
    metrics: dict[str, float]
    samples: list[dict[str, Any]]


def run_step(run: Run, prompts: DataProto, epoch: int, step: int) -> StepResult:
    """Generate, score, compute log-probs and advantages, update, and give the engine the new weights."""
    timings = Timings()
    with timings("step"):
        with timings("rollout"):
            sampling = train_sampling(
                run.config.worker.rollout, run.config.data.max_response_length, list(prompts["uid"]), epoch
            )
            rollout = run.workers.rollout.generate(prompts, sampling)
            rows = add_views(run, prompts, epoch)  # while the engine generates
            batch = join_responses(rows, run.workers.rollout.result(rollout))
            run.workers.rollout.sleep()
        check_columns(batch)
        inputs = reward_inputs(run.vision, batch)
        scoring = run.workers.start_reward(inputs)
        batch = run_passes(batch, run.workers, run.requirements, timings)  # while the reward scores
        with timings("reward_wait"):
            scores = ray.get(scoring)
        batch, group = add_advantages(run, batch, scores)
        with timings("update"):
            columns = update_columns(run, batch)
            updated = run.workers.actor.update_policy(columns, run.sizes.mini_batches, step, run.total_steps)
        with timings("weight_sync"):
            run.workers.rollout.sync_weights(run.workers.actor)
    metrics = {
        **reward_metrics(scores, group),
        **updated.result(),
        **rollout_metrics(batch, run.config.data.max_response_length),
        **{f"timing_s/{phase}": seconds for phase, seconds in timings.seconds.items()},
        **throughput(batch, timings),
    }
    sampling = run.config.worker.rollout
    warn_of_mismatch(metrics, truncated_sampling=sampling.top_p < 1 or sampling.top_k > 0)
    return StepResult(metrics, samples(batch, inputs, scores, run.config.trainer.samples_per_step))


def add_views(run: Run, prompts: DataProto, epoch: int) -> DataProto:
    """A row per response, with the image tensors of every view that a loss term reads, and without the pictures."""
    copies = run.sizes.responses_per_prompt
    rows = prompts.repeat_interleave(copies)
    for view in run.requirements.views:
        config = run.config.algorithm.views[view]
        rows = add_view(rows, view, config, run.vision, run.config.trainer.seed, epoch, copies)
    return rows.select([c for c in (*rows.tensors.keys(), *rows.objects) if c not in ("images", "view_images")])


def add_advantages(run: Run, batch: DataProto, scores: list[RewardScore]) -> tuple[DataProto, torch.Tensor]:
    """The batch with `scores`, `accuracy` (0 where the reward has no such component) and `advantages`, and the group
    [B] of each row: rows of one prompt share it."""
    number = {uid: i for i, uid in enumerate(dict.fromkeys(batch["uid"]))}
    group = torch.tensor([number[uid] for uid in batch["uid"]])
    overall = torch.tensor([score["overall"] for score in scores], dtype=torch.float32)
    estimate = ADVANTAGES[run.config.algorithm.adv_estimator]
    advantages = estimate(overall, group, batch["response_mask"])
    accuracy = torch.tensor([score.get("accuracy", 0.0) for score in scores], dtype=torch.float32)
    return batch.with_columns({"scores": overall, "accuracy": accuracy, "advantages": advantages}), group


def update_columns(run: Run, batch: DataProto) -> DataProto:
    """Only what the update reads: every other column would cross Ray for nothing."""
    names = [*TOKENS, "mm_inputs", "scores", "accuracy", "advantages", "rollout_log_probs"]
    names += [name for name in ("old_log_probs", "ref_log_probs") if name in batch]
    for view in run.requirements.views:
        names.append(view_column(view, "rows"))
        names.append(view_column(view, "mm_inputs" if view in run.requirements.live_views else "log_probs"))
    return batch.select(names)


def reward_inputs(vision: VisionProcessor, batch: DataProto) -> list[RewardInput]:
    """What the reward function sees of each response."""
    lengths = batch["response_mask"].sum(dim=1).tolist()
    tokens = [ids[:length] for ids, length in zip(batch["responses"].tolist(), lengths, strict=True)]
    texts = vision.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [
        RewardInput(response=text, response_length=length, ground_truth=answer)
        for text, length, answer in zip(texts, lengths, batch["answer"], strict=True)
    ]


def samples(batch: DataProto, inputs: list[RewardInput], scores: list[RewardScore], count: int) -> list[dict[str, Any]]:
    """The first `count` responses as records for samples.jsonl."""
    records = zip(batch["uid"][:count], batch["problem"][:count], inputs[:count], scores[:count], strict=True)
    return [
        {
            "uid": uid,
            "prompt": problem,
            "response": i["response"],
            "answer": i["ground_truth"],
            "score": dict(score),
        }
        for uid, problem, i, score in records
    ]


def throughput(batch: DataProto, timings: Timings) -> dict[str, float]:
    """Tokens per second; every token counts once, however many passes it takes."""
    tokens = batch["attention_mask"].sum().item()
    generated = batch["response_mask"].sum().item()
    return {
        "perf/tokens_per_second": tokens / timings.seconds["step"],
        "perf/generated_tokens_per_second": generated / timings.seconds["rollout"],
        "perf/update_tokens_per_second": tokens / timings.seconds["update"],
    }
