"""A training step behind the generation: `prepare` computes the columns that the updates read, `update` trains."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from verl.algorithms.advantage import ADVANTAGES
from verl.algorithms.losses.compose import coefficients, moving
from verl.algorithms.losses.estimators import k3
from verl.algorithms.requirements import Requirements
from verl.algorithms.rewards import token_rewards, view_reward
from verl.algorithms.shapers import build_shapers
from verl.columns import ORIGINAL, TOKENS, view_column
from verl.config.algorithm import OldLogProbs
from verl.config.worker import RolloutConfig
from verl.metrics.machine import Timings
from verl.protocol import DataProto, check_columns
from verl.tracking.samples import add_pictures, add_tokens, samples
from verl.trainer.collect import Rows, component, graded, overall_scores
from verl.trainer.plan import Plan
from verl.trainer.state import TrainState
from verl.trainer.workers import Workers, size_in_bytes
from verl.workers.reward.base import Outcome, RewardError, component_means
from verl.workers.training.balance import Work, share_rows

logger = logging.getLogger(__name__)

# Nats per token. In float32 it is below 1e-9, in bfloat16 between 1e-4 and 1e-2; stale weights or images give more.
LARGE_MISMATCH = 0.02


@dataclass
class Batch:
    """The rows of a step with every column that the updates read, the columns that the actor holds already, and the
    metrics so far."""

    columns: DataProto
    at_actor: set[str]
    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)


def prepare(plan: Plan, workers: Workers, state: TrainState, rows: Rows, timings: Timings) -> Batch:
    """Log-probs, values and advantages of a step's rows. Raises RewardError where too few could be graded."""
    config, version = plan.config, workers.rollout.version
    check_columns(rows.batch)
    work = hand_out(plan, workers, rows)  # this and the passes go on while the reward scores
    batch, at_actor = run_passes(plan, workers, rows.batch, timings)
    with timings("reward_wait"):
        outcomes = rows.outcomes()
    check_components(plan.requirements, outcomes)
    columns, group, found = add_advantages(plan, state, batch, outcomes)
    metrics = {
        **reward_metrics(outcomes, group),
        **rows.metrics,
        **found,
        **{f"reward/{name}": share for name, share in rows.tally.metrics().items()},
        **rollout_metrics(batch, config.data.max_response_length, version),
    }
    records = samples(batch, rows.inputs, outcomes, config.trainer.samples_per_step)
    add_pictures(records, rows.pictures)
    return Batch(columns, at_actor, metrics | work, records)


def update(
    plan: Plan,
    workers: Workers,
    batch: Batch,
    step: int,
    scale: float,
    timings: Timings,
    meanwhile: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Train the critic, where there is one, and the policy, unless the critic is still ahead of it; returns the
    metrics of the whole step.

    Args:
        scale: Multiplies the coefficients of maximised terms.
        meanwhile: Is called while the policy trains.
    """
    metrics, shown = batch.metrics, {}
    if plan.requirements.critic:
        with timings("update_critic"):
            columns = batch.columns.select(["response_mask", "values", "returns"])
            metrics |= workers.critic.update_critic(columns).result()
    if step > plan.config.trainer.critic_warmup:
        with timings("update"):
            coefs = coefficients(plan.terms, step, plan.total_steps, scale)
            columns = update_columns(plan.requirements, batch)
            metrics["perf/ray_mb"] += size_in_bytes(columns) / 2**20
            metrics |= workers.actor.update_policy(columns, coefs, meanwhile).result()
            shown = workers.actor.shown() if plan.requirements.live_views and batch.samples else {}
        metrics |= moving(plan.terms, coefs)
    add_tokens(batch.samples, batch.columns, plan.vision.tokenizer, plan.requirements.views, shown)
    if not plan.config.trainer.ahead:  # there the policies are a step apart
        warn_of_mismatch(metrics, plan.config.worker.rollout)
    return metrics


def sync(workers: Workers, timings: Timings) -> None:
    """Give the engines the new weights."""
    with timings("weight_sync"):
        workers.rollout.sync_weights(workers.actor)


def hand_out(plan: Plan, workers: Workers, rows: Rows) -> dict[str, float]:
    """Give each rank its rows, with their images; returns metrics of the work."""
    requirements, batch, ranks = plan.requirements, rows.batch, plan.sizes.ranks
    images = [view_column(view, "mm_inputs") for view in (ORIGINAL, *requirements.views)]
    batch = batch.with_columns({"row": torch.arange(len(batch))})
    names = [*TOKENS, "row", "rollout_log_probs", *images, *(view_column(view, "rows") for view in requirements.views)]
    shares = share_rows(batch, rows.mini_batches, ranks, [ORIGINAL, *requirements.live_views])
    size = workers.take_rows(batch.select(names), shares)
    useful = Work(batch, [ORIGINAL, *requirements.live_views]).tokens(range(len(batch)))
    return {"perf/ray_mb": size / 2**20, "perf/tokens_useful": useful * plan.config.worker.actor.ppo_epochs}


def run_passes(plan: Plan, workers: Workers, batch: DataProto, timings: Timings) -> tuple[DataProto, set[str]]:
    """`batch` with `old_log_probs`, `ref_log_probs`, `values` and `<view>_log_probs`, each where it is required; and
    the names of the columns that the actor holds."""
    requirements, found = plan.requirements, {}
    at_actor = {"rollout_log_probs", *(view_column(view, "rows") for view in requirements.views)}
    # Older weights drew the responses that have waited for this step, and only the engine has their log-probs.
    waited = batch["weight_version"] != workers.rollout.version
    keeps = requirements.old and plan.config.algorithm.old_log_probs == OldLogProbs.auto and bool(waited.any())
    # Truncated weights correct for it one step ahead; and the engine's may be log-probs given another image.
    keeps = keeps and not plan.config.trainer.ahead and "drawn_under_view" not in batch
    makes_old = keeps or requirements.old_pass
    views = [ORIGINAL] * (makes_old or bool(requirements.early_exact)) + list(requirements.stored_views)
    if views:
        with timings("log_probs"):
            found = workers.actor.compute_log_probs(*views, exact=requirements.early_exact)
        old = found.pop("log_probs", None)
        at_actor.update(found)
        if makes_old:
            found["old_log_probs"] = torch.where(waited[:, None], batch["rollout_log_probs"], old) if keeps else old
            at_actor.update(() if keeps else ["old_log_probs"])
    if requirements.reference:
        with timings("ref_log_probs"):
            found["ref_log_probs"] = workers.compute_reference_log_probs()
    if requirements.critic:
        with timings("values"):
            found["values"] = workers.critic.compute_values()
    return batch.with_columns(found), at_actor


def update_columns(requirements: Requirements, batch: Batch) -> DataProto:
    """Only what the update reads and the actor does not hold: every other column would cross Ray for nothing."""
    wanted = (name for name in requirements.stored if name not in batch.at_actor)
    return batch.columns.select([name for name in wanted if name != "old_log_probs" or name in batch.columns])


def add_advantages(
    plan: Plan, state: TrainState, batch: DataProto, outcomes: list[Outcome]
) -> tuple[DataProto, torch.Tensor, dict[str, float]]:
    """The batch with `rewards`, `scores`, `accuracy`, `advantages` and, with a critic, `returns`; the group [B] of each
    row; and metrics.

    A response that could not be graded stays as a row without response tokens: no mean, spread, loss term or
    denominator counts it, as if it had not been generated. One whose baseline could not be graded goes with it.
    """
    algorithm, columns, metrics = plan.config.algorithm, {**batch.tensors}, {}
    kept = graded(outcomes)
    if "baseline_scores" in columns:
        kept = kept & columns["baseline_scores"].isfinite()
        columns["baseline_scores"] = columns["baseline_scores"].nan_to_num()
    columns["response_mask"] = mask = batch["response_mask"] * kept[:, None]
    # A row that is left out is a group of its own, so that no other row is compared with it.
    group = torch.arange(len(batch)) // plan.sizes.responses_per_prompt
    group = torch.where(kept, group, -1 - torch.arange(len(batch)))
    overall = overall_scores(plan.config, outcomes, batch["response_mask"])
    if algorithm.overlong_buffer and kept.any():
        change = overall.double() - component(outcomes, "overall")
        metrics["train/overlong_penalty"] = change[kept].mean().item()
    columns.setdefault("old_log_probs", batch["rollout_log_probs"])  # algorithm.old_log_probs=rollout
    if algorithm.view_reward.coef:
        view = algorithm.view_reward.view
        read = (columns["old_log_probs"], columns[view_column(view, "log_probs")], columns[view_column(view, "rows")])
        extra = view_reward(*read, mask, algorithm.view_reward)
        metrics["train/view_reward"] = extra[kept].mean().item() if kept.any() else 0.0
        overall = overall + extra.float()
    rewards = token_rewards(overall, mask)
    if algorithm.reward_kl.coef:
        metrics["train/reward_kl_coef"] = state.reward_kl.coef
        rewards = rewards - state.reward_kl.penalty(columns["old_log_probs"], columns["ref_log_probs"], mask)
        metrics["train/reward_kl"] = state.reward_kl.last_kl
    accuracy = component(outcomes, "accuracy").float()
    made = {"response_mask": mask, "rewards": rewards, "scores": rewards.sum(-1), "accuracy": accuracy}
    estimate = ADVANTAGES[algorithm.adv_estimator]
    made |= estimate({**columns, **made, "group": group}, algorithm.gamma, algorithm.lam)
    for shaper in build_shapers(algorithm.shapers):
        made["advantages"], found = shaper({**columns, **made})
        metrics |= {f"train/{shaper.name}/{name}": value for name, value in found.items()}
    return batch.with_columns(made), group, metrics


def check_components(requirements: Requirements, outcomes: list[Outcome]) -> None:
    """Raise RewardError where something reads whether a response is right, and the reward does not say it."""
    known = next((outcome.score for outcome in outcomes if outcome.score is not None), None)
    if requirements.accuracy and known is not None and "accuracy" not in known:
        raise RewardError(
            f"{', '.join(requirements.accuracy)} read the reward's component 'accuracy', and the reward function "
            f"returns {', '.join(known)}: let it return 'accuracy' too, 0 or 1"
        )


def reward_metrics(outcomes: list[Outcome], group: torch.Tensor) -> dict[str, float]:
    """Means of the reward and its components over the graded responses, the share of groups that teach GRPO nothing,
    and the longest time that grading took.

    Args:
        outcomes: One per response, at least one of them with a score.
        group: [B] integer that responses to one prompt share; whatever it is for those without a score.
    """
    kept = graded(outcomes)
    scores = [outcome.score for outcome in outcomes if outcome.score is not None]
    overall = torch.tensor([score["overall"] for score in scores], dtype=torch.float64)
    metrics = {"train/reward": overall.mean().item(), "train/reward_std": overall.std(unbiased=False).item()}
    metrics |= {f"train/{name}": mean for name, mean in component_means(scores).items() if name != "overall"}
    group = group[kept]
    uniform = [overall[group == g].unique().numel() == 1 for g in group.unique()]
    metrics["train/groups_without_signal"] = sum(uniform) / len(uniform)
    metrics["timing_s/reward_slowest"] = max(outcome.seconds for outcome in outcomes)
    return metrics


def rollout_metrics(batch: DataProto, max_response_length: int, version: int) -> dict[str, float]:
    """Response lengths in tokens, and how far engine and trainer are apart, in nats per token: |difference of their
    log-probs|, and KL(engine || trainer) by the k3 estimate on the engine's own samples. The latter over the responses
    that were drawn from the trainer's own weights, those of `version`; others have waited for this step."""
    mask = batch["response_mask"].bool()
    lengths = mask.sum(dim=1).double()
    metrics = {
        "rollout/response_length_mean": lengths.mean().item(),
        "rollout/response_length_max": lengths.max().item(),
        "rollout/truncated": (lengths >= max_response_length).double().mean().item(),
    }
    metrics["rollout/weight_version"] = batch["weight_version"].double().mean().item()
    metrics["rollout/staleness"] = version - metrics["rollout/weight_version"]
    mask = mask & (batch["weight_version"] == version)[:, None]
    if "drawn_under_view" in batch:
        mask = mask & ~batch["drawn_under_view"][:, None]
    if "old_log_probs" in batch and mask.any():
        rollout, trainer = (batch[name][mask].double() for name in ("rollout_log_probs", "old_log_probs"))
        metrics["rollout/log_prob_diff_mean"] = (trainer - rollout).abs().mean().item()
        metrics["rollout/log_prob_diff_max"] = (trainer - rollout).abs().max().item()
        metrics["rollout/mismatch_kl"] = k3(rollout, trainer).mean().item()
    return metrics


def warn_of_mismatch(metrics: dict[str, float], sampling: RolloutConfig) -> None:
    """Warn where the engine samples from another policy than the trainer trains.

    Top-p alone makes the KL -log of the mass that it keeps, at most -log(top_p). What top-k and `ignore_eos` leave out
    has no such bound, so nothing is said with those.
    """
    mismatch = metrics.get("rollout/mismatch_kl", 0.0)
    bounded = sampling.top_k <= 0 and not sampling.ignore_eos
    if bounded and mismatch > LARGE_MISMATCH - math.log(sampling.top_p):
        logger.warning(
            "rollout engine and trainer disagree: KL %.3g nats per token, |difference of log-probs| up to %.3g "
            "(weights version %d). The gradient is then off-policy",
            mismatch,
            metrics["rollout/log_prob_diff_max"],
            metrics["rollout/weight_version"],
        )


def speed(batch: DataProto, timings: Timings) -> dict[str, float]:
    """Seconds per phase, and tokens per second; every token counts once, however many passes it takes."""
    seconds, tokens = timings.seconds, batch["attention_mask"].sum().item()
    counted = {"": ("step", tokens), "generated_": ("rollout", batch["response_mask"].sum().item())}
    counted["update_"] = ("update", tokens)
    rates = {
        f"perf/{name}tokens_per_second": count / seconds[phase]
        for name, (phase, count) in counted.items()
        if phase in seconds
    }
    return {f"timing_s/{phase}": value for phase, value in seconds.items()} | rates
