"""Every advantage estimator against plain Python."""

from __future__ import annotations

import statistics

import pytest
import torch

from verl.algorithms.advantage import ADVANTAGES, gae
from verl.algorithms.rewards import token_rewards

SCORES = [1.0, 0.1, 0.0, 0.9, 0.1, 1.0, 0.25, 0.6]
GROUP = [7, 3, 7, 3, 3, 7, 7, 5]  # 5 is a group of one
LENGTHS = [2, 2, 1, 3, 2, 3, 3, 1]


def masked(lengths: list[int], width: int = 3) -> torch.Tensor:
    return torch.tensor([[int(t < length) for t in range(width)] for length in lengths])


def mates(row: int) -> list[float]:
    """Scores of the row's group, its own included."""
    return [s for s, g in zip(SCORES, GROUP, strict=True) if g == GROUP[row]]


def by_grpo(row: int) -> float:
    return (SCORES[row] - statistics.mean(mates(row))) / (statistics.stdev(mates(row)) + 1e-6)


def by_dr_grpo(row: int) -> float:
    return SCORES[row] - statistics.mean(mates(row))


def by_rloo(row: int) -> float:
    others = mates(row)
    others.remove(SCORES[row])
    return SCORES[row] - statistics.mean(others)


def whitened(values: list[float], row: int) -> float:
    tokens = [v for v, length in zip(values, LENGTHS, strict=True) for _ in range(length)]
    return (values[row] - statistics.mean(tokens)) / statistics.pstdev(tokens)


def by_reinforce_plus_plus(row: int) -> float:
    return whitened(SCORES, row)


def by_reinforce_plus_plus_baseline(row: int) -> float:
    return whitened([by_dr_grpo(i) for i in range(len(SCORES))], row)


def estimate(name: str, scores: torch.Tensor, group: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Advantages where a response's score is its last token's reward, values are 0 and greedy responses get 0."""
    zeros = torch.zeros(mask.shape)
    columns = {"scores": scores, "group": group, "response_mask": mask, "rewards": token_rewards(scores, mask)}
    columns |= {"values": zeros, "baseline_scores": zeros[:, 0]}
    return ADVANTAGES[name](columns, gamma=1.0, lam=1.0)["advantages"]


BY_HAND = {
    "grpo": by_grpo,
    "dr_grpo": by_dr_grpo,
    "rloo": by_rloo,
    "reinforce_plus_plus": by_reinforce_plus_plus,
    "reinforce_plus_plus_baseline": by_reinforce_plus_plus_baseline,
    "remax": lambda row: SCORES[row],
    "gae": by_reinforce_plus_plus,  # with values of 0 it is the reward to come
}
OVER_GROUPS = ("reinforce_plus_plus", "gae", "remax")  # they do not compare the responses to one prompt


@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_by_hand(name):
    mask = masked(LENGTHS)
    advantages = estimate(name, torch.tensor(SCORES), torch.tensor(GROUP), mask)
    assert advantages.dtype == torch.float32
    for row, group in enumerate(GROUP):
        own = advantages[row, 0].item()
        if group == 5 and name in ("grpo", "dr_grpo", "rloo"):
            assert own == 0
        else:
            assert own == pytest.approx(BY_HAND[name](row), abs=1e-5)
        assert advantages[row].tolist() == [own * m for m in mask[row].tolist()]


def test_golden_values():
    """Two prompts with scores (1, 0, 0) and (1, 1, 0), two tokens each but the last, which has four."""
    scores, group = torch.tensor([1.0, 0, 0, 1, 1, 0]), torch.tensor([0, 0, 0, 1, 1, 1])
    mask = masked([2, 2, 2, 2, 2, 4], width=4)

    def first(name: str) -> torch.Tensor:
        return estimate(name, scores, group, mask)[:, 0]

    torch.testing.assert_close(first("dr_grpo"), torch.tensor([2, -1, -1, 1, 1, -2]) / 3)
    torch.testing.assert_close(first("rloo"), torch.tensor([1, -0.5, -0.5, 0.5, 0.5, -1]))
    # 6 of 14 tokens have score 1: mean 3/7, variance 3/7 * 4/7, so (4/7, -3/7) * 7 / sqrt(12).
    up, down = 4 / 12**0.5, -3 / 12**0.5
    expected = torch.tensor([up, down, down, up, up, down])
    torch.testing.assert_close(first("reinforce_plus_plus"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", sorted(set(ADVANTAGES) - {"remax"}))
def test_groups_that_agree_and_groups_of_one(name):
    alike = estimate(name, torch.full((8,), 0.1), torch.tensor([0] * 7 + [1]), masked([2, 1, 0, 2, 1, 1, 2, 1], 2))
    assert alike.abs().max() < 1e-9
    mixed = estimate(name, torch.tensor([0.1] * 7 + [1.0]), torch.tensor([0] * 7 + [1]), masked([2] * 8, 2))
    if name in OVER_GROUPS:  # it compares over groups: 7 responses against 1
        torch.testing.assert_close(mixed[:, 0], torch.tensor([-(7**-0.5)] * 7 + [7**0.5]), atol=1e-4, rtol=0)
    else:
        assert mixed.abs().max() < 1e-9


@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_a_batch_of_empty_responses_stays_finite(name):
    assert (estimate(name, torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), masked([0, 0])) == 0).all()


@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_order_of_rows_does_not_matter(name):
    generator = torch.Generator().manual_seed(0)
    scores, group = torch.rand(12, generator=generator), torch.arange(12) % 3
    mask = masked([1, 2, 3] * 2 + [3, 2, 2] * 2)
    order = torch.randperm(12, generator=generator)
    reordered = estimate(name, scores[order], group[order], mask[order])
    torch.testing.assert_close(estimate(name, scores, group, mask)[order], reordered)


def test_unknown_estimators_are_refused_by_name():
    with pytest.raises(ValueError, match="unknown advantage estimator .algorithm.adv_estimator. 'gea'; known: .*grpo"):
        ADVANTAGES["gea"]


def gae_by_hand(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """One response without padding: the sum written out, for every token anew."""
    length = len(rewards)
    following = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(length)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.95), (1.0, 0.0), (0.0, 1.0)])
def test_gae_is_the_double_loop_over_valid_tokens(gamma, lam):
    generator = torch.Generator().manual_seed(1)
    rewards, values = (torch.randn(5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = masked([6, 4, 1, 0, 0], width=6)
    mask[4] = torch.tensor([1, 0, 0, 1, 1, 0])  # tokens inside that are not the policy's
    padded = [tensor.masked_fill(mask == 0, float("nan")) for tensor in (rewards, values)]
    advantages, returns = gae(*padded, mask, gamma, lam)
    for row in range(5):
        valid = mask[row].bool()
        expected = torch.tensor(gae_by_hand(rewards[row][valid].tolist(), values[row][valid].tolist(), gamma, lam))
        torch.testing.assert_close(advantages[row][valid], expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(returns[row][valid], expected + values[row][valid].float(), atol=1e-6, rtol=1e-6)
        assert (advantages[row][~valid] == 0).all() and (returns[row][~valid] == 0).all()


def test_gae_with_lambda_one_is_the_reward_to_come_less_the_value():
    advantages, returns = gae(torch.tensor([[0.0, 0, 1]]), torch.tensor([[0.5, 0.25, 2]]), masked([3]), 1.0, 1.0)
    assert advantages.tolist() == [[0.5, 0.75, -1.0]]
    assert returns.tolist() == [[1.0, 1.0, 1.0]]
