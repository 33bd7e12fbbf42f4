"""The reward manager, and the rule that comes with it."""

from __future__ import annotations

import pytest

from tests.conftest import REPOSITORY
from verl.config.worker import RewardConfig
from verl.workers.reward.manager import RewardInput, RewardManager

MATH = f"{REPOSITORY}/examples/reward_function/math.py:compute_score"


def reward_input(response: str, truth: str = "14") -> RewardInput:
    return RewardInput(response=response, response_length=5, ground_truth=truth)


@pytest.mark.parametrize(
    ("response", "accuracy", "form"),
    [
        ("<think>3+5+6</think>\\boxed{14}", 1, 1),
        ("<think>3+5+6</think> It is \\boxed{14}.", 1, 1),
        ("< think >3+5\n+6</ think >\n\\boxed{14}", 1, 1),
        ("<think>3+5</think>\\boxed{8}", 0, 1),
        ("\\boxed{14}", 1, 0),
        ("<think>14</think> 14", 0, 0),
        ("", 0, 0),
        ("<think>\\boxed{14}", 1, 0),
        ("<think></think>\\boxed{ 14 }", 1, 1),
    ],
)
def test_math_reward(response, accuracy, form):
    (score,) = RewardManager(RewardConfig(MATH)).score([reward_input(response)])
    assert (score["accuracy"], score["format"]) == (accuracy, form)
    assert score["overall"] == pytest.approx(0.9 * accuracy + 0.1 * form)


def test_the_weight_of_the_format_is_an_option():
    manager = RewardManager(RewardConfig(MATH, {"format_weight": 0.5}))
    assert manager.score([reward_input("<think></think>\\boxed{1}")])[0]["overall"] == 0.5


def manager_of(tmp_path, body: str) -> RewardManager:
    path = tmp_path / "reward.py"
    path.write_text(f"def score(inputs):\n    {body}\n")
    return RewardManager(RewardConfig(f"{path}:score"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [{'overall': 1.0}]", "returned 1 for 2 inputs"),
        ("return {'overall': 1.0}", "returned a dict, not a list for 2 inputs"),
        ("return [{'accuracy': 1.0}] * 2", "a score is a dict with at least 'overall'"),
        ("return [{'overall': 1.0}, {'overall': float('nan')}]", "every component is a finite number.*second"),
        ("return [{'overall': 1.0}, {'overall': 1.0, 'x': 1.0}]", "components differ"),
    ],
)
def test_what_a_reward_function_may_not_return(tmp_path, body, message):
    with pytest.raises(ValueError, match=message):
        manager_of(tmp_path, body).score([reward_input("first"), reward_input("second")])


def test_a_reward_function_that_raises_is_named(tmp_path):
    with pytest.raises(RuntimeError, match=r"reward.py:score raised ZeroDivisionError.*\n.*first"):
        manager_of(tmp_path, "return [1 / 0]").score([reward_input("first")])


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("/nowhere/reward.py:score", FileNotFoundError, "worker.reward.reward_function names '/nowhere/reward.py'"),
        (
            MATH.replace("compute_score", "score"),
            ValueError,
            "has no function 'score'; functions there: .*compute_score",
        ),
        (MATH.split(":")[0], ValueError, "write it as path/to/file.py:function"),
    ],
)
def test_mistyped_reward_functions_are_named(reference, error, message):
    with pytest.raises(error, match=message):
        RewardManager(RewardConfig(reference))
