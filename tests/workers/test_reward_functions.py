"""The rewards in examples/reward_function, called as a grader process calls them."""

from __future__ import annotations

import asyncio

import pytest

from tests.conftest import REPOSITORY
from verl.config.worker import RewardConfig
from verl.workers.reward.base import Failure, RewardInput, RewardScore
from verl.workers.reward.functions import load_functions


def answer_to(name: str, response: str, truth: str, length: int = 5, **kwargs: object) -> RewardScore | Failure:
    path = f"{REPOSITORY}/examples/reward_function/{name}.py:compute_score"
    (function,) = load_functions(RewardConfig(path, dict(kwargs))).values()
    with asyncio.Runner() as runner:
        given = RewardInput(response=response, response_length=length, ground_truth=truth)
        return function([given], runner, timeout_s=60)[0].score


def score(name: str, response: str, truth: str, length: int = 5, **kwargs: object) -> RewardScore:
    empty = answer_to(name, "", truth, 0, **kwargs)
    assert empty["overall"] <= 0 and empty["accuracy"] == 0  # silence earns nothing
    return answer_to(name, response, truth, length, **kwargs)


@pytest.mark.parametrize(
    ("response", "accuracy", "form"),
    [
        ("3+5+6</think>\\boxed{14}", 1, 1),  # the template has opened the thoughts
        ("<think>3+5+6</think>\\boxed{14}", 1, 1),
        ("3+5\n+6</ think >\n It is \\boxed{ 14 }.", 1, 1),
        ("3+5</think>\\boxed{8}", 0, 1),
        ("\\boxed{14}", 1, 0),  # never stopped thinking
        ("3+5+6</think>14", 0, 0),
        ("3+5</think> <think> \\boxed{14}", 1, 1),
    ],
)
def test_thinking_models_need_not_open_their_thoughts(response, accuracy, form):
    found = score("qwen3_vl_think", response, "14")
    assert (found["accuracy"], found["format"]) == (accuracy, form)
    assert found["overall"] == pytest.approx(0.9 * accuracy + 0.1 * form)
    assert score("qwen3_vl_think", response, "14", format_weight=0.5)["overall"] == 0.5 * (accuracy + form)


@pytest.mark.parametrize(
    ("response", "accuracy", "form"),
    [
        ("<think>two rows</think><answer>6</answer>", 1, 1),
        ("<think>two\nrows</think>\n<answer> 6 </answer>\n", 1, 1),
        ("<think>a</think><answer>$6.0$</answer>", 1, 1),
        ("<think>a</think><answer>7</answer>", 0, 1),
        ("<answer>6</answer>", 1, 0),
        ("6", 1, 0),
        ("<think>a</think><answer>6</answer> or so", 1, 0),
        ("<think>6</think>", 0, 0),
    ],
)
def test_r1v(response, accuracy, form):
    found = score("r1v", response, " 6 ")
    assert (found["accuracy"], found["format"]) == (accuracy, form)
    assert found["overall"] == pytest.approx(0.5 * accuracy + 0.5 * form)


@pytest.mark.parametrize(
    ("answer", "truth", "accuracy"),
    [
        ("B", "B", 1),
        ("b", "(B)", 1),
        ("(B)", "B. 45 degrees", 1),
        ("B. 45", "B", 1),
        ("B: 45", "B", 1),
        ("\\text{B}", "B", 1),
        ("\\text{(B) 45}", "B", 1),
        ("A", "B", 0),
        ("\\textbf{B}", "B", 1),
        ("A triangle", "A", 0),
        ("Both", "B", 0),
        ("Don't know", "D", 0),
        ("45", "B", 0),
        ("AB", "A", 0),
        ("", "B", 0),
    ],
)
def test_choice(answer, truth, accuracy):
    found = score("choice", f"<think>a</think> \\boxed{{{answer}}}", truth)
    assert (found["accuracy"], found["format"]) == (accuracy, 1)
    assert found["overall"] == pytest.approx(0.9 * accuracy + 0.1)
    assert score("choice", f"\\boxed{{{answer}}}", truth)["format"] == 0


@pytest.mark.parametrize(
    ("answer", "accuracy", "close"),
    [
        ("7", 1, 1),
        ("7.0", 1, 1),
        ("seven", 1, 1),
        ("7 cubes", 1, 1),
        ("There are Seven cubes", 1, 1),
        ("8", 0, 1),
        ("17", 0, 0),
        ("5 or 7", 0, 0),  # one number is an answer, two are a guess
        ("many", 0, 0),
        ("-7", 0, 0),
    ],
)
def test_counting(answer, accuracy, close):
    found = score("counting", f"<think>a</think> \\boxed{{{answer}}}", "7")
    assert (found["accuracy"], found["close"], found["format"]) == (accuracy, close, 1)
    assert found["overall"] == pytest.approx(0.9 * accuracy + 0.1)
    assert score("counting", "<think>a</think>\\boxed{1,024}", "1024")["accuracy"] == 1


@pytest.mark.parametrize(("name", "truth"), [("choice", "45"), ("counting", "a few")])
def test_a_ground_truth_that_nothing_could_match_is_no_wrong_answer(name, truth):
    failure = answer_to(name, "\\boxed{1}", truth)
    assert failure.reason == "raised" and f"the ground truth '{truth}'" in failure.detail


@pytest.mark.parametrize(
    ("response", "accuracy"),
    [
        ("Thus.\nAnswer: 34", 1),
        ("Answer: 3\nno,\nANSWER: $34$", 1),
        ("Answer: \\boxed{34}", 1),
        ("answer :  x = 34 dollars", 1),
        ("Answer: $34$.", 1),
        ("Answer: 34.", 0),
        ("**Answer: 34**", 0),
        ("So \\boxed{34}", 0),
        ("Answer: 34.0", 0),
        ("Answer: 35", 0),
        ("34", 0),
        ("Answer: 34\n" + "But wait. " * 28, 1),
        ("Answer: 34\n" + "But wait. " * 31, 0),  # only the last 300 characters are read
    ],
)
def test_dapo_is_plus_or_minus_one(response, accuracy):
    found = score("dapo", response, "34", length=9999)
    assert found == {
        "overall": 2 * accuracy - 1,
        "accuracy": accuracy,
        "accuracy_normalized": accuracy,
        "overlong": 0.0,
    }


@pytest.mark.parametrize(
    ("answer", "truth", "accuracy"),
    [
        ("1,000", "1000", 1),
        ("1,2,3", "123", 1),  # a quirk of the rule: commas between digits go, as in a number
        ("(1, 2)", "(1,2)", 1),
        ("\\frac12", "\\frac{1}{2}", 1),
        ("\\sqrt2", "\\sqrt{2}", 1),
        ("\\sqrt{2}", "\\sqrt2", 1),
        ("0.5", "\\frac{1}{2}", 0),  # no mathematics: letter by letter
        ("90^\\circ", "90", 1),
        ("90 degrees", "90^{\\circ}", 1),
        ("12 cm", "12", 1),
        ("12 \\text{ cm}", "12", 1),
        ("\\text{Tuesday}", "Tuesday", 1),
        ("\\textbf{B}", "B", 1),
        ("\\overline{AB}", "AB", 1),
        ("\\$5", "5", 1),
        ("the value is $x^2$ here", "x^2", 1),
        ("3 \\text{ and } 4", "3,4", 1),
        ("y = 2x + 1", "2x+1", 1),
        ("5^{\\mathrm{th}}", "5^{}", 1),
        ("an apple", "apple", 1),
        ("x\\in[0,1]", "x\\in [0, 1]", 1),
        ("7 students", "7", 1),
        ("seven", "7", 0),
        ("-3", "3", 0),
    ],
)
def test_dapo_compares_as_minerva_does(answer, truth, accuracy):
    assert score("dapo", f"Answer: {answer}", truth)["accuracy"] == accuracy


@pytest.mark.parametrize(("length", "penalty"), [(0, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1), (120, -1)])
def test_dapos_penalty_of_long_responses(length, penalty):
    old = {"max_response_length": 100, "overlong_buffer_length": 20, "overlong_penalty_factor": 2.0}
    found = score("dapo", "Answer: 34", "34", length=length, **old)
    assert found["overlong"] == pytest.approx(penalty) and found["overall"] == pytest.approx(1 + 2 * penalty)


def test_a_buffer_that_does_not_fit_is_refused():
    for old in ({"overlong_buffer_length": 20}, {"max_response_length": 10, "overlong_buffer_length": 20}):
        assert "overlong_buffer_length=20: from 0" in answer_to("dapo", "Answer: 34", "34", **old).detail


@pytest.mark.parametrize(
    ("options", "response", "truth", "accuracy"),
    [
        ({}, "\\boxed{\\frac{1}{2}}", "0.5", 1),
        ({"grader": "math_verify"}, "\\boxed{x+1}", "1+x", 1),
        ({"grader": "exact", "place": "all"}, " Two  Words ", "two words", 1),
        ({"grader": "number", "relative": 0.05}, "\\boxed{104}", "100", 1),
        ({"grader": "iou", "place": "tag"}, "<answer>[0, 0, 2, 1]</answer>", "[0, 0, 1, 1]", 0.5),
        ({"grader": "choice", "place": "tag"}, "no tag: B", "B", 0),
    ],
)
def test_every_grader_by_its_name(options, response, truth, accuracy):
    assert score("answer", response, truth, **options) == {"overall": accuracy, "accuracy": accuracy, "format": 0.0}


def test_graders_and_places_that_do_not_exist_are_named():
    for option in ({"grader": "regexp"}, {"place": "regexp"}):
        assert "'regexp' is none of " in answer_to("answer", "1", "1", **option).detail
