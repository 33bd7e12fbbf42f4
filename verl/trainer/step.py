"""One training step, as data flows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from verl.columns import view_column
from verl.metrics.machine import Timings, host_memory
from verl.models.forward import TOKENS
from verl.protocol import DataProto, check_columns
from verl.trainer.advantages import add_advantages
from verl.trainer.batch_metrics import reward_metrics, rollout_metrics, warn_of_mismatch
from verl.trainer.collect import Collector
from verl.trainer.passes import run_passes
from verl.trainer.run import Run
from verl.workers.reward.base import Outcome, RewardError, RewardInput

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    metrics: dict[str, float]
    samples: list[dict[str, Any]]


def run_step(
    run: Run, collector: Collector, step: int, scale: float = 1.0, before_update: Callable[[], None] | None = None
) -> StepResult:
    """Generate, score, compute log-probs and advantages, update, and give the engines the new weights. `scale`
    multiplies the coefficients of maximised terms; `before_update` is called before the first weight changes."""
    timings = Timings()
    prompts, per_prompt = run.sizes.prompts_per_step, run.sizes.responses_per_prompt + run.requirements.baseline
    run.workers.reward.begin(step, prompts * per_prompt)
    version = run.workers.rollout.version
    with timings("step"):
        with timings("rollout"):
            rows = collector.collect()
        if rows is None:
            logger.warning("step %d has nothing to train on: every group was all right or all wrong", step)
            return StepResult({"train/empty_step": 1.0}, [])
        check_columns(rows.batch)
        batch = run_passes(rows.batch, run, timings)  # while the reward scores
        with timings("reward_wait"):
            outcomes = rows.outcomes()
        check_components(run, outcomes)
        graded, group, found = add_advantages(run, batch, outcomes)
        if before_update is not None:
            before_update()
        updated = update(run, graded, rows.mini_batches, step, scale, timings)
        with timings("weight_sync"):
            run.workers.rollout.sync_weights(run.workers.actor)
    metrics = {
        **reward_metrics(outcomes, group),
        **rows.metrics,
        **found,
        **{f"reward/{name}": share for name, share in run.workers.reward.failures().items()},
        **rollout_metrics(batch, run.config.data.max_response_length, version),
        **updated,
        **{f"timing_s/{phase}": seconds for phase, seconds in timings.seconds.items()},
        **throughput(batch, timings),
        **host_memory(),
    }
    warn_of_mismatch(metrics, run.config.worker.rollout)
    return StepResult(metrics, samples(batch, rows.inputs, outcomes, run.config.trainer.samples_per_step))


def check_components(run: Run, outcomes: list[Outcome]) -> None:
    """Raise RewardError where something reads whether a response is right, and the reward does not say it."""
    known = next((outcome.score for outcome in outcomes if outcome.score is not None), None)
    if run.requirements.accuracy and known is not None and "accuracy" not in known:
        raise RewardError(
            f"{', '.join(run.requirements.accuracy)} read the reward's component 'accuracy', and the reward function "
            f"returns {', '.join(known)}: let it return 'accuracy' too, 0 or 1"
        )


def update(
    run: Run, batch: DataProto, mini_batches: int, step: int, scale: float, timings: Timings
) -> dict[str, float]:
    """Train the critic, where there is one, and the policy, unless the critic is still ahead of it; returns metrics."""
    metrics: dict[str, float] = {}
    if run.requirements.critic:
        with timings("update_critic"):
            columns = batch.select([*TOKENS, "mm_inputs", "values", "returns"])
            metrics |= run.workers.critic.update_critic(columns, mini_batches).result()
    if step > run.config.trainer.critic_warmup:
        with timings("update"):
            columns = update_columns(run, batch)
            updated = run.workers.actor.update_policy(columns, mini_batches, step, run.total_steps, scale)
            metrics |= updated.result()
    return metrics


def update_columns(run: Run, batch: DataProto) -> DataProto:
    """Only what the update reads: every other column would cross Ray for nothing."""
    names = [*TOKENS, "mm_inputs", "scores", "accuracy", "advantages", "rollout_log_probs"]
    names += [name for name in ("old_log_probs", "ref_log_probs") if name in batch]
    for view in run.requirements.views:
        names.append(view_column(view, "rows"))
        names.append(view_column(view, "mm_inputs" if view in run.requirements.live_views else "log_probs"))
    return batch.select(names)


def samples(batch: DataProto, inputs: list[RewardInput], outcomes: list[Outcome], count: int) -> list[dict[str, Any]]:
    """The first `count` responses as records for samples.jsonl; one that was not graded has no score, and a reason."""
    records = []
    for uid, problem, i, outcome in zip(batch["uid"], batch["problem"], inputs, outcomes, strict=True):
        if len(records) == count:
            break
        found = {"uid": uid, "prompt": problem, "response": i["response"], "answer": i["ground_truth"]}
        found["score"] = dict(outcome.score or {})
        records.append(found | ({"not_graded": outcome.failure.reason} if outcome.failure else {}))
    return records


def throughput(batch: DataProto, timings: Timings) -> dict[str, float]:
    """Tokens per second; every token counts once, however many passes it takes."""
    tokens = batch["attention_mask"].sum().item()
    counted = {"": ("step", tokens), "generated_": ("rollout", batch["response_mask"].sum().item())}
    counted["update_"] = ("update", tokens)
    return {
        f"perf/{name}tokens_per_second": count / timings.seconds[phase]
        for name, (phase, count) in counted.items()
        if phase in timings.seconds
    }
