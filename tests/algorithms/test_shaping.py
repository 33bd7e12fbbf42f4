"""DAPO's length penalty and group filter, at their borders."""

from __future__ import annotations

import pytest
import torch

from verl.algorithms.groups import keep_groups
from verl.algorithms.rewards import overlong_penalty


def test_overlong_penalty_is_flat_then_linear_then_flat():
    lengths = torch.tensor([0, 79, 80, 81, 90, 95, 99, 100, 101, 5000])
    expected = torch.tensor([0, 0, 0, -0.05, -0.5, -0.75, -0.95, -1, -1, -1])
    torch.testing.assert_close(overlong_penalty(lengths, max_length=100, cache=20), expected)
    assert overlong_penalty(torch.tensor([0, 50, 100]), max_length=100, cache=100).tolist() == [0, -0.5, -1]


@pytest.mark.parametrize("cache", [0, -1, 101])
def test_a_slope_that_does_not_fit_is_refused(cache):
    with pytest.raises(ValueError, match=f"cache={cache}: .*max_length=100"):
        overlong_penalty(torch.tensor([1]), 100, cache)


def test_groups_are_kept_whole_where_some_are_right_and_some_wrong():
    metric = torch.tensor([1.0, 0, 1, 0, 1, 0, 0, 1])
    group = torch.tensor([4, 9, 4, 9, 2, 2, 9, 6])
    expected = torch.tensor([False, False, False, False, True, True, False, False])
    assert torch.equal(keep_groups(metric, group, 0.01, 0.99), expected)
    order = torch.tensor([5, 0, 7, 3, 1, 6, 2, 4])
    assert torch.equal(keep_groups(metric[order], group[order], 0.01, 0.99), expected[order])


def test_means_at_the_bounds_and_means_that_are_not_finite_are_dropped():
    metric = torch.tensor([0.25, 0.25, 0.75, 0.75, 0.5, 0.25, float("nan"), 0.5])
    group = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert keep_groups(metric, group, 0.25, 0.75).tolist() == [False] * 4 + [True] * 2 + [False] * 2


def test_an_empty_interval_is_refused():
    with pytest.raises(ValueError, match="low=0.99, high=0.01"):
        keep_groups(torch.tensor([1.0]), torch.tensor([0]), 0.99, 0.01)
