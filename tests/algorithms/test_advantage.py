"""GRPO's advantage against plain Python."""

from __future__ import annotations

import statistics

import pytest
import torch

from verl.algorithms.advantage import ADVANTAGES, grpo


def test_grpo_by_hand():
    scores = torch.tensor([1.0, 0.1, 0.0, 0.9, 0.1, 1.0, 0.25])
    group = torch.tensor([7, 3, 7, 3, 3, 7, 7])
    mask = torch.tensor([[1, 1, 0]] * 6 + [[1, 1, 1]])
    advantages = grpo(scores, group, mask)
    for row in range(7):
        same = [scores[i].item() for i in range(7) if group[i] == group[row]]
        expected = (scores[row].item() - statistics.mean(same)) / (statistics.stdev(same) + 1e-6)
        assert advantages[row, 0].item() == pytest.approx(expected, abs=1e-5)
        assert advantages[row].tolist() == [advantages[row, 0].item() * m for m in mask[row].tolist()]


def test_groups_that_agree_and_groups_of_one_get_zero():
    scores = torch.tensor([0.1] * 7 + [1.0])
    group = torch.tensor([0] * 7 + [1])
    advantages = grpo(scores, group, torch.ones(8, 2, dtype=torch.int64))
    assert advantages.abs().max() < 1e-9


def test_order_of_rows_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    scores, group = torch.rand(12, generator=generator), torch.arange(12) % 3
    mask = torch.ones(12, 2, dtype=torch.int64)
    order = torch.randperm(12, generator=generator)
    torch.testing.assert_close(grpo(scores, group, mask)[order], grpo(scores[order], group[order], mask))


def test_unknown_estimators_are_refused_by_name():
    with pytest.raises(ValueError, match="unknown advantage estimator 'gea'; known: .*grpo"):
        ADVANTAGES["gea"]
