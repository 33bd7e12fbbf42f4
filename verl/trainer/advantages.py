"""From the scores of a step's responses to the advantage of each token."""

from __future__ import annotations

import torch

from verl.algorithms.advantage import ADVANTAGES, build_shapers
from verl.algorithms.rewards import token_rewards
from verl.algorithms.shaping import overlong_penalty
from verl.config.config import Config
from verl.protocol import DataProto
from verl.trainer.run import Run
from verl.workers.reward.manager import RewardScore


def overall_scores(config: Config, scores: list[RewardScore], response_mask: torch.Tensor) -> torch.Tensor:
    """[B] float32: the overall reward of each response, less what one that is too long costs."""
    overall = torch.tensor([score["overall"] for score in scores], dtype=torch.float32)
    algorithm = config.algorithm
    if algorithm.overlong_buffer:
        lengths = response_mask.sum(dim=1)
        penalty = overlong_penalty(lengths, config.data.max_response_length, algorithm.overlong_buffer)
        overall = overall + algorithm.overlong_penalty * penalty
    return overall


def add_advantages(
    run: Run, batch: DataProto, scores: list[RewardScore]
) -> tuple[DataProto, torch.Tensor, dict[str, float]]:
    """The batch with `rewards`, `scores` (their sum over a response), `accuracy` (0 where the reward has no such
    component), `advantages` and, with a critic, `returns`; the group [B] of each row, the responses to one prompt; and
    metrics."""
    algorithm, mask = run.config.algorithm, batch["response_mask"]
    group = torch.arange(len(batch)) // run.sizes.responses_per_prompt
    overall = overall_scores(run.config, scores, mask)
    metrics = {}
    if algorithm.overlong_buffer:
        raw = sum(score["overall"] for score in scores) / len(scores)
        metrics["train/overlong_penalty"] = overall.double().mean().item() - raw
    columns = dict(batch.tensors.items())
    columns.setdefault("old_log_probs", batch["rollout_log_probs"])  # algorithm.old_log_probs=rollout
    rewards = token_rewards(overall, mask)
    if algorithm.reward_kl.coef:
        metrics["train/reward_kl_coef"] = run.reward_kl.coef
        rewards = rewards - run.reward_kl.penalty(columns["old_log_probs"], columns["ref_log_probs"], mask)
        metrics["train/reward_kl"] = run.reward_kl.last_kl
    accuracy = torch.tensor([score.get("accuracy", 0.0) for score in scores], dtype=torch.float32)
    made = {"rewards": rewards, "scores": rewards.sum(-1), "accuracy": accuracy}
    estimate = ADVANTAGES[algorithm.adv_estimator]
    made |= estimate({**columns, **made, "group": group}, algorithm.gamma, algorithm.lam)
    for shaper in build_shapers(algorithm.shapers):
        made["advantages"], found = shaper({**columns, **made})
        metrics |= {f"train/{shaper.name}/{name}": value for name, value in found.items()}
    return batch.with_columns(made), group, metrics
