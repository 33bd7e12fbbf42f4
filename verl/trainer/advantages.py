"""From the scores of a step's responses to the advantage of each token."""

from __future__ import annotations

import torch

from verl.algorithms.advantage import ADVANTAGES
from verl.algorithms.rewards import overlong_penalty, token_rewards
from verl.algorithms.shapers import build_shapers
from verl.config.config import Config
from verl.protocol import DataProto
from verl.trainer.run import Run
from verl.workers.reward.base import Outcome


def graded(outcomes: list[Outcome]) -> torch.Tensor:
    """[B] bool: which responses have a score."""
    return torch.tensor([outcome.score is not None for outcome in outcomes])


def component(outcomes: list[Outcome], name: str) -> torch.Tensor:
    """[B] float64: a component of each score, 0 where there is none."""
    return torch.tensor([(outcome.score or {}).get(name, 0.0) for outcome in outcomes], dtype=torch.float64)


def overall_scores(config: Config, outcomes: list[Outcome], response_mask: torch.Tensor) -> torch.Tensor:
    """[B] float32: the overall reward of each response, less what one that is too long costs."""
    overall = component(outcomes, "overall").float()
    algorithm = config.algorithm
    if algorithm.overlong_buffer:
        lengths = response_mask.sum(dim=1)
        penalty = overlong_penalty(lengths, config.data.max_response_length, algorithm.overlong_buffer)
        overall = overall + algorithm.overlong_penalty * penalty
    return overall


def add_advantages(
    run: Run, batch: DataProto, outcomes: list[Outcome]
) -> tuple[DataProto, torch.Tensor, dict[str, float]]:
    """The batch with `rewards`, `scores` (their sum over a response), `accuracy` (0 where the reward has no such
    component), `advantages` and, with a critic, `returns`; the group [B] of each row, the responses to one prompt; and
    metrics.

    A response that could not be graded stays as a row without response tokens: no mean, spread, loss term or
    denominator counts it, as if it had not been generated. One whose baseline could not be graded goes with it.
    """
    algorithm, columns, metrics = run.config.algorithm, dict(batch.tensors.items()), {}
    kept = graded(outcomes)
    if "baseline_scores" in columns:
        kept = kept & columns["baseline_scores"].isfinite()
        columns["baseline_scores"] = columns["baseline_scores"].nan_to_num()
    columns["response_mask"] = mask = batch["response_mask"] * kept[:, None]
    # A row that is left out is a group of its own, so that no other row is compared with it.
    group = torch.arange(len(batch)) // run.sizes.responses_per_prompt
    group = torch.where(kept, group, -1 - torch.arange(len(batch)))
    overall = overall_scores(run.config, outcomes, batch["response_mask"])
    if algorithm.overlong_buffer and kept.any():
        change = overall.double() - component(outcomes, "overall")
        metrics["train/overlong_penalty"] = change[kept].mean().item()
    columns.setdefault("old_log_probs", batch["rollout_log_probs"])  # algorithm.old_log_probs=rollout
    rewards = token_rewards(overall, mask)
    if algorithm.reward_kl.coef:
        metrics["train/reward_kl_coef"] = run.reward_kl.coef
        rewards = rewards - run.reward_kl.penalty(columns["old_log_probs"], columns["ref_log_probs"], mask)
        metrics["train/reward_kl"] = run.reward_kl.last_kl
    accuracy = component(outcomes, "accuracy").float()
    made = {"response_mask": mask, "rewards": rewards, "scores": rewards.sum(-1), "accuracy": accuracy}
    estimate = ADVANTAGES[algorithm.adv_estimator]
    made |= estimate({**columns, **made, "group": group}, algorithm.gamma, algorithm.lam)
    for shaper in build_shapers(algorithm.shapers):
        made["advantages"], found = shaper({**columns, **made})
        metrics |= {f"train/{shaper.name}/{name}": value for name, value in found.items()}
    return batch.with_columns(made), group, metrics
