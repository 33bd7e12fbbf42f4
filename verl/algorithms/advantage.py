"""Advantage estimators: pure functions of columns, registered by name (`algorithm.adv_estimator`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from verl.algorithms.groups import group_mean, group_size, group_sum
from verl.algorithms.rewards import reward_to_go
from verl.registry import Registry

EPSILON = 1e-6  # added to a standard deviation before it divides
# Parameters of an estimator that are settings, `algorithm.gamma` and `algorithm.lam`, not columns.
OPTIONS = ("gamma", "lam")
RESULTS = ("advantages", "returns")

AdvantageFunction = Callable[..., "torch.Tensor | tuple[torch.Tensor, torch.Tensor]"]


@dataclass(frozen=True)
class AdvantageEstimator:
    """A registered estimator: `function` is pure, and the columns that it `requires` are its parameters' names.

    What no estimator needs is not made: one that reads `ref_log_probs` brings the reference, `values` the critic, and
    `baseline_scores` a greedy response to each prompt. It returns `advantages` [B, T], or (advantages, returns).
    """

    name: str
    function: AdvantageFunction
    requires: tuple[str, ...]
    options: tuple[str, ...]

    def __call__(self, columns: Mapping[str, torch.Tensor], gamma: float, lam: float) -> dict[str, torch.Tensor]:
        """The columns `advantages` and, from an estimator with a critic, `returns`."""
        settings = {"gamma": gamma, "lam": lam}
        found = self.function(*(columns[c] for c in self.requires), **{name: settings[name] for name in self.options})
        return {"advantages": found} if isinstance(found, torch.Tensor) else dict(zip(RESULTS, found, strict=True))


ADVANTAGES: Registry[AdvantageEstimator] = Registry("advantage estimator (algorithm.adv_estimator)")


def advantage(name: str) -> Callable[[AdvantageFunction], AdvantageFunction]:
    """Decorator: register a pure function of columns as `algorithm.adv_estimator=name`.

    Its parameters are named after the columns that it reads (`scores` [B], `group` [B], `rewards` [B, T],
    `response_mask` [B, T], `accuracy` [B], `values` [B, T], `baseline_scores` [B], log-probs [B, T]); `gamma` and `lam`
    come from the config.
    """

    def add(function: AdvantageFunction) -> AdvantageFunction:
        parameters = tuple(inspect.signature(function).parameters)
        requires = tuple(p for p in parameters if p not in OPTIONS)
        options = tuple(p for p in parameters if p in OPTIONS)
        ADVANTAGES.register(name)(AdvantageEstimator(name, function, requires, options))
        return function

    return add


@advantage("grpo")
def grpo(scores: torch.Tensor, group: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """(score - group mean) / (unbiased group std + 1e-6), the same for every token (arXiv 2402.03300, 4.1.2).

    A group whose scores agree gets 0; so does a group of one, which has nothing to be compared with.

    Args:
        scores: [B], reward of each response.
        group: [B], integer that responses to the same prompt share.
        response_mask: [B, T].

    Returns:
        [B, T], 0 at padding.
    """
    centred = scores.double() - group_mean(scores, group)
    std = torch.sqrt(group_sum(centred**2, group) / (group_size(group) - 1).clamp(min=1))
    return (centred / (std + EPSILON)).float()[:, None] * response_mask


@advantage("dr_grpo")
def dr_grpo(scores: torch.Tensor, group: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """score - group mean, the same for every token (Dr. GRPO, arXiv 2503.20783, section 3.2).

    Dividing by the std, as GRPO does, gives prompts that are almost always or almost never solved more weight
    than the others. The paper's other half, no division by a response's own length, is
    `worker.actor.loss_avg_mode=seq_sum`. A group of one gets 0.

    Args:
        scores: [B], reward of each response.
        group: [B], integer that responses to the same prompt share.
        response_mask: [B, T].

    Returns:
        [B, T], in units of the reward, 0 at padding.
    """
    return (scores.double() - group_mean(scores, group)).float()[:, None] * response_mask


@advantage("rloo")
def rloo(scores: torch.Tensor, group: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """score - mean of the group's other scores, the same for every token (RLOO, arXiv 2402.14740).

    The baseline does not depend on the response it is subtracted from, so the gradient stays unbiased. With n
    responses it is n / (n - 1) times `dr_grpo`, which is how it is computed. A group of one has no others and
    gets 0, as with `grpo`.

    Args:
        scores: [B], reward of each response.
        group: [B], integer that responses to the same prompt share.
        response_mask: [B, T].

    Returns:
        [B, T], in units of the reward, 0 at padding.
    """
    size = group_size(group)
    centred = scores.double() - group_mean(scores, group)
    return (centred * size / (size - 1).clamp(min=1)).float()[:, None] * response_mask


def whiten_over_tokens(values: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """(value - mean) / (std + 1e-6), with mean and std over all valid tokens.

    A long response therefore counts as often as it has tokens. std is that of the population: it exists for a
    single token too. Where all tokens agree the result is 0.

    Args:
        values: [B, T], or [B, 1] where the tokens of a row agree.
        response_mask: [B, T].

    Returns:
        [B, T] float32, 0 at padding.
    """
    valid = response_mask.bool()
    values = torch.where(valid, values.double(), 0.0)
    tokens = valid.sum().clamp(min=1)
    centred = torch.where(valid, values - values.sum() / tokens, 0.0)
    return (centred / (torch.sqrt((centred**2).sum() / tokens) + EPSILON)).float()


@advantage("reinforce_plus_plus")
def reinforce_plus_plus(rewards: torch.Tensor, response_mask: torch.Tensor, gamma: float) -> torch.Tensor:
    """(reward to come - batch mean) / batch std (REINFORCE++, arXiv 2501.03262, global advantage normalisation).

    Mean and std run over all tokens of the step's batch, not over responses and not over mini-batches. No groups are
    read, so one response per prompt is enough. The paper has its KL in the reward, `algorithm.reward_kl` here.

    Args:
        rewards: [B, T], of each token.
        response_mask: [B, T].
        gamma: discount; 1 in the paper.

    Returns:
        [B, T], 0 at padding.
    """
    return whiten_over_tokens(reward_to_go(rewards, response_mask, gamma), response_mask)


@advantage("reinforce_plus_plus_baseline")
def reinforce_plus_plus_baseline(
    scores: torch.Tensor, group: torch.Tensor, response_mask: torch.Tensor
) -> torch.Tensor:
    """a = score - group mean, then (a - batch mean of a) / batch std of a (REINFORCE++ with baseline, arXiv
    2501.03262).

    Mean and std run over all tokens of the step's batch, as in `reinforce_plus_plus`. A group that agrees, or a
    group of one, has a = 0 and ends near 0, not at it: where lengths differ, the tokens' mean of a is not 0.

    Args:
        scores: [B], reward of each response.
        group: [B], integer that responses to the same prompt share.
        response_mask: [B, T].

    Returns:
        [B, T], 0 at padding.
    """
    return whiten_over_tokens((scores.double() - group_mean(scores, group))[:, None], response_mask)


@advantage("remax")
def remax(rewards: torch.Tensor, baseline_scores: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Reward to come - reward of the greedy response to the same prompt (ReMax, arXiv 2310.10505, algorithm 1).

    The baseline is independent of the response, so the gradient stays unbiased, with one response per prompt too. It
    costs one greedy response per prompt and step.

    Args:
        rewards: [B, T], of each token.
        baseline_scores: [B], reward of the greedy response to the row's prompt.
        response_mask: [B, T].

    Returns:
        [B, T], in units of the reward, 0 at padding.
    """
    return ((reward_to_go(rewards, response_mask) - baseline_scores[:, None]) * response_mask).float()


@torch.no_grad()
def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t (arXiv 1506.02438, eq. 16).

    The value behind the last valid token is 0: a response ends there. Tokens outside the mask are stepped over
    as if they were not there.

    Args:
        rewards, values: [B, T], reward for and critic's value before each token.
        mask: [B, T], 1 on valid tokens.
        gamma, lam: discount and the weight of longer sums, each from 0 to 1.

    Returns:
        advantages and returns (advantage + value, what the critic is trained on), each [B, T] float32, 0 outside
        the mask.
    """
    valid = mask.bool()
    rewards, values = rewards.double(), values.double()
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    columns = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(valid[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(valid[:, t], values[:, t], next_value)
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    returns = torch.where(valid, advantages + values, 0.0)
    return torch.where(valid, advantages, 0.0).float(), returns.float()


@advantage("gae")
def whitened_gae(
    rewards: torch.Tensor, values: torch.Tensor, response_mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's advantages: those of `gae`, whitened over all tokens of the step's batch, so that the size of the rewards
    does not set that of the update; the returns are not.

    Args and returns as in `gae`.
    """
    advantages, returns = gae(rewards, values, response_mask, gamma, lam)
    return whiten_over_tokens(advantages, response_mask), returns
