"""Rewards of tokens, and the KL in the reward."""

from __future__ import annotations

import pytest
import torch

from verl.algorithms.advantage import ADVANTAGES
from verl.algorithms.rewards import RewardKL, reward_to_go, token_rewards
from verl.config.algorithm import Estimator, KLController, RewardKLConfig

MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 1], [0, 0, 0]])


def test_the_score_stands_at_the_last_valid_token():
    rewards = token_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), MASK)
    assert rewards.tolist() == [[0, 0, 1], [0, 2, 0], [0, 0, 3], [0, 0, 0]]


def test_reward_to_go_by_hand():
    rewards = torch.tensor([[1.0, 2, 4], [1, 2, float("nan")], [1, float("nan"), 4], [1, 1, 1]])
    assert reward_to_go(rewards, MASK).tolist() == [[7, 6, 4], [3, 2, 0], [5, 0, 4], [0, 0, 0]]
    assert reward_to_go(rewards, MASK, 0.5).tolist() == [[3, 4, 4], [2, 2, 0], [3, 0, 4], [0, 0, 0]]


def test_remax_takes_the_reward_of_the_greedy_response_off():
    columns = {
        "rewards": torch.tensor([[0.0, -0.25, 1.0], [0.0, 0.5, 0.0]]),
        "response_mask": MASK[:2],
        "baseline_scores": torch.tensor([0.5, 0.5]),
    }
    assert ADVANTAGES["remax"](columns, 1.0, 1.0)["advantages"].tolist() == [[0.25, 0.25, 0.5], [0.0, 0.0, 0.0]]


def test_gae_gives_the_critic_its_returns():
    columns = {"rewards": torch.tensor([[0.0, 0.0, 1.0]]), "values": torch.tensor([[0.5, 0.25, 2]])}
    found = ADVANTAGES["gae"]({**columns, "response_mask": MASK[:1]}, gamma=1.0, lam=1.0)
    advantages = torch.tensor([0.5, 0.75, -1.0])
    torch.testing.assert_close(found["returns"], torch.ones(1, 3))
    whitened = (advantages - advantages.mean()) / advantages.std(unbiased=False)
    torch.testing.assert_close(found["advantages"][0], whitened, atol=1e-5, rtol=0)


@pytest.mark.parametrize("estimator", [Estimator.k1, Estimator.k2, Estimator.k3])
def test_each_token_loses_its_own_estimate(estimator):
    generator = torch.Generator().manual_seed(0)
    log_probs, ref = (-torch.rand(4, 3, generator=generator) for _ in range(2))
    ratio = (ref - log_probs).double()
    expected = {"k1": -ratio, "k2": ratio**2 / 2, "k3": ratio.exp() - ratio - 1}[estimator.value]
    control = RewardKL(RewardKLConfig(coef=0.3, estimator=estimator))
    padded = log_probs.masked_fill(MASK == 0, float("nan"))
    penalty = control.penalty(padded, ref, MASK)
    torch.testing.assert_close(penalty.double(), 0.3 * expected * MASK, atol=1e-6, rtol=1e-5)
    assert control.last_kl == pytest.approx((expected * MASK).sum().item() / 7, abs=1e-6)
    assert control.coef == 0.3


def test_the_adaptive_coefficient_follows_the_kl_and_applies_from_the_next_batch_on():
    config = RewardKLConfig(coef=1.0, controller=KLController.adaptive, target=0.1, horizon=40)
    control, zeros = RewardKL(config), torch.zeros(4, 3)
    assert control.penalty(zeros, zeros - 1.0, MASK)[0].tolist() == [1, 1, 1]  # k1 = 1, ten times the target
    assert control.coef == pytest.approx(1 + 0.2 * 4 / 40)
    control.penalty(zeros, zeros - 0.11, MASK)  # 10 % above: grows by that, not by 20 %
    assert control.coef == pytest.approx(1.02 * (1 + 0.1 * 4 / 40))
    before = control.coef
    control.penalty(zeros, zeros, MASK)
    assert control.coef == pytest.approx(before * (1 - 0.2 * 4 / 40))
