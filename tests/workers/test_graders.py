"""Graders by hand, PAPO's mathematics reward against its rule, and responses that no model should write."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import REPOSITORY
from verl.config.worker import RewardConfig
from verl.utils.imports import import_function
from verl.workers.reward.base import RewardInput
from verl.workers.reward.graders import GRADERS, LONGEST_ANSWER, boxed, close_tags, tagged, thinks_and_boxes
from verl.workers.reward.manager import RewardManager

EXAMPLES = REPOSITORY / "examples/reward_function"


@pytest.mark.parametrize(
    ("grader", "answer", "truth", "value", "options"),
    [
        ("exact", " New  York\n", "new york", 1, {}),
        ("exact", "New-York", "new york", 0, {}),
        ("choice", "b) two", "(B)", 1, {}),
        ("choice", "Both", "B", 0, {}),
        ("number", "3.14", "3.14159", 1, {"tolerance": 0.01}),
        ("number", "3.14", "3.14159", 0, {"tolerance": 0.001}),
        ("number", "about 1,050 m", "1000", 1, {"relative": 0.05}),
        ("number", "-1.5e3", "-1500", 1, {}),
        ("number", "seven", "7", 1, {}),
        ("number", "5 or 7", "7", 0, {}),
        ("number", "1" * 400, "7", 0, {"tolerance": 1e300}),
        ("iou", "[0, 0, 10, 10]", "[0, 0, 10, 10]", 1, {}),
        ("iou", "(0,0,10,5)", "[0, 0, 10, 10]", 0.5, {}),
        ("iou", "[5, 5, 15, 15]", "[0, 0, 10, 10]", 25 / 175, {}),
        ("iou", "[10, 10, 20, 20]", "[0, 0, 10, 10]", 0, {}),
        ("iou", "[10, 0, 0, 10]", "[0, 0, 10, 10]", 0, {}),  # from right to left: no box
        ("iou", '[{"bbox_2d": [20, 0, 30, 10]}, {"bbox_2d": [0, 0, 10, 5]}]', "[0,0,10,10] [20,0,30,10]", 0.75, {}),
        ("iou", "[0, 0, 10, 10]", "[0,0,10,10] [20,0,30,10]", 0.5, {}),  # one is missing
        ("iou", "[0,0,10,10] [0,0,10,10]", "[0, 0, 10, 10]", 0.5, {}),  # the same one twice
        ("iou", "[0, 0, 10, 6]", "[0, 0, 10, 10]", 1, {"threshold": 0.5}),
        ("iou", "[0, 0, 10, 4]", "[0, 0, 10, 10]", 0, {"threshold": 0.5}),
        ("iou", "no box", "[0, 0, 10, 10]", 0, {}),
        ("mathruler", "\\frac{3}{4}", "\\frac34", 1, {}),
        ("mathruler", "2x+1", "1+2x", 1, {}),
        ("mathruler", "2", "3", 0, {}),
        ("math_verify", "\\frac{1}{2}", "0.5", 1, {}),
        ("math_verify", "\\{1, 2\\}", "\\{2, 1\\}", 1, {}),
        ("math_verify", "3 < x < 4", "(3, 4)", 0, {}),
        ("math_verify", "7", "8", 0, {}),
    ],
)
def test_graders(grader, answer, truth, value, options):
    assert GRADERS[grader](answer, truth, **options) == pytest.approx(value)


@pytest.mark.parametrize(
    ("grader", "truth"), [("choice", "45"), ("number", "a few"), ("iou", "left"), ("math_verify", "")]
)
def test_a_truth_that_no_answer_could_match_is_an_error(grader, truth):
    with pytest.raises(ValueError, match=f"'{truth}'"):
        GRADERS[grader]("1", truth)


@pytest.mark.parametrize("grader", ["mathruler", "math_verify"])
def test_answers_beyond_the_cap_are_compared_as_text_and_never_parsed(grader, monkeypatch):
    for module in ("mathruler.grader.grade_answer", "math_verify.parse"):
        monkeypatch.setattr(module, lambda *_: pytest.fail("it was parsed"))
    long = "1+" * (LONGEST_ANSWER // 2) + "1"
    assert GRADERS[grader](f" {long}", long) == 1 and GRADERS[grader](long, str(LONGEST_ANSWER // 2 + 1)) == 0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("\\boxed{1} so \\boxed{ \\frac{1}{2} }.", "\\frac{1}{2}"),
        ("\\boxed{{}", None),
        ("\\boxed{}", ""),
        ("boxed{1}", None),
    ],
)
def test_boxed(response, answer):
    assert boxed(response) == answer


def test_tagged():
    assert tagged("<answer> a </answer><answer>b</answer>") == "a"
    assert tagged("<answer>a") is None and tagged("a</answer>") is None


# Mathematics reward: truth, answer in the box, and whether it is right. By hand.
ANSWERS = [
    *[("14", "14", 1), ("14", " 14 ", 1), ("14", "14.0", 1), ("14", "15", 0), ("14", "-14", 0)],
    *[("1234", "1,234", 1), ("0.5", "\\frac{1}{2}", 1), ("\\frac{3}{4}", "3/4", 1), ("\\frac{3}{4}", "6/8", 0)],
    *[("\\sqrt{2}", "\\sqrt2", 1), ("\\sqrt{2}", "2", 0), ("2x+1", "1+2x", 1), ("2x+1", "2x-1", 0)],
    *[("(1,2)", "(1, 2)", 1), ("(1,2)", "(2,1)", 0), ("(1,2)", "[1,2)", 0), ("50\\%", "50", 1)],
    *[("90^\\circ", "90", 1), ("B", "B", 1), ("B", "C", 0), ("\\pi", "3.14", 0), ("x^2", "x^2", 1)],
    *[("5\\text{ cm}", "5", 1), ("\\text{yes}", "yes", 1), ("nothing", "some", 0)],
]
# What is around the box: before, behind, whether the format is right, and whether the box is found. By hand.
SHELLS = [
    ("<think>so</think>\\boxed{", "}", 1, 1),
    ("<think>so\nand so</think> It is \\boxed{", "} indeed.", 1, 1),
    ("< think > so </ think >\n\\boxed{", "}", 1, 1),
    (" <think>so</think>\\boxed{", "}", 1, 1),  # the spaces before the tag go as well
    ("Well: <think>so</think>\\boxed{", "}", 0, 1),
    ("<think>\\boxed{", "}</think>", 0, 1),  # found, in the wrong place
    ("<think>so</think>\\boxed{7} no, \\boxed{", "}", 1, 1),
    ("<think>so</think>", "", 0, 0),
]
TABLE = [
    (truth, f"{before}{answer}{behind}", right * found, form)
    for truth, answer, right in ANSWERS
    for before, behind, form, found in SHELLS
]


def test_the_papers_rule_takes_a_missing_box_for_the_answer_none():
    """An oddity of mathruler that parity keeps: a ground truth "None" is earned without an answer."""
    score = import_function(f"{EXAMPLES}/math.py:compute_score", "test")
    assert score(RewardInput(response="", response_length=9, ground_truth="none"))["accuracy"] == 1


def by_the_rule(response: str, truth: str) -> tuple[float, float]:
    """(accuracy, format) as the paper's code is described: spaces around brackets and slashes go, the whole response
    matches one expression, and mathruler compares the last box."""
    from mathruler.grader import extract_boxed_content, grade_answer

    response = re.sub(r"\s*(<|>|/)\s*", r"\1", response)
    form = re.fullmatch(r"<think>.*</think>.*\\boxed\{.*\}.*", response, re.DOTALL)
    return float(grade_answer(extract_boxed_content(response), truth)), float(form is not None)


def test_the_mathematics_reward_is_papos_on_200_responses():
    score = import_function(f"{EXAMPLES}/math.py:compute_score", "test")
    assert len(TABLE) == len({(truth, response) for truth, response, *_ in TABLE}) == 200
    for truth, response, accuracy, form in TABLE:
        found = score(RewardInput(response=response, response_length=9, ground_truth=truth))
        assert (found["accuracy"], found["format"]) == (accuracy, form), (truth, response)
        assert (found["accuracy"], found["format"]) == by_the_rule(response, truth), (truth, response)
        assert found["overall"] == pytest.approx(0.9 * accuracy + 0.1 * form)


PIECES = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "\\boxed{",
    "}",
    "{",
    "<",
    ">",
    "/",
    " ",
    "\n",
    "\u2003",
    "7",
    "x",
]
SOUP = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)


@settings(max_examples=1000, deadline=None)
@given(SOUP)
def test_what_reads_in_one_pass_reads_as_the_regular_expressions_do(text):
    """Those take minutes on a degenerate response, such as one of ten thousand </think>."""
    assert close_tags(text) == re.sub(r"\s*(<|>|/)\s*", r"\1", text)
    assert thinks_and_boxes(text) == bool(re.fullmatch(r"<think>.*</think>.*\\boxed\{.*\}.*", text, re.DOTALL))
    well_formed = import_function(f"{EXAMPLES}/r1v.py:well_formed", "test")
    whole = re.fullmatch(r"<think>.*?</think>\s*<answer>(.*?)</answer>", text, re.DOTALL)
    assert well_formed(text) == bool(whole)
    first = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    assert tagged(text) == (first.group(1).strip() if first else None)


LATEX = [
    *[
        "\\frac",
        "\\sqrt",
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        "^",
        "_",
        "**",
        "!",
        "+",
        "-",
        "*",
        "/",
        "=",
        "<",
        ",",
        ".",
        "%",
    ],
    *[
        "1",
        "2",
        "9",
        "0",
        "x",
        "y",
        "e",
        "i",
        "\\pi",
        "\\infty",
        "\\text{",
        "\\left",
        "\\right",
        "\\cup",
        "\\begin",
        "&",
    ],
    *["and", " ", "\\\\", "$", "million", "'", '"', "\x00", "\ud800", "é", "∞", "nan", "inf", "lambda", ":"],
]
ANSWER = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(LATEX), max_size=14).map("".join))
RESPONSE = st.one_of(
    ANSWER, ANSWER.map(lambda a: f"<think>so</think>\\boxed{{{a}}}"), ANSWER.map(lambda a: f"<answer>{a}")
)
TRUTHS = {"choice": "B", "counting": "7", "iou": "[0, 0, 10, 10]", "number": "7"}


def manager_of(name: str) -> RewardManager:
    kwargs, file = ({"grader": name}, "answer") if name in GRADERS else ({}, name)
    config = RewardConfig(f"{EXAMPLES}/{file}.py:compute_score", kwargs, max_failure_frac=0.99, timeout_s=20.0)
    config.num_workers = 1
    manager = RewardManager(config)
    manager.start()
    return manager


PROBLEM = "<image>Add the digits. A friend reads 3+5."
FUNCTIONS = sorted({path.stem for path in EXAMPLES.glob("*.py")} - {"answer"} | set(GRADERS))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_response_crashes_or_hangs_a_reward_without_an_error_that_says_so(name):
    """Through the grader processes, as in training. A sample may cost its grader; it may not cost the batch, and what
    has no score has a reason."""
    manager = manager_of(name)

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.lists(RESPONSE, min_size=20, max_size=20))
    def fuzz(responses):
        truth = TRUTHS.get(name, "\\frac{1}{2}")
        inputs = [RewardInput(response=r, response_length=5, ground_truth=truth, problem=PROBLEM) for r in responses]
        for outcome in manager.score(inputs):
            if outcome.failure is None:
                assert -1 <= outcome.score["overall"] <= 1 and all(map(math.isfinite, outcome.score.values()))
            else:
                assert outcome.failure.reason in ("timeout", "memory", "died", "raised") and outcome.failure.detail

    try:
        fuzz()
    finally:
        manager.close()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_long_degenerate_responses_take_no_time_worth_a_limit(name):
    """What a policy that has come apart writes until its length ends; none of it may cost a grader."""
    pieces = [
        *PIECES,
        "</think>\\boxed{",
        "<think></think>\\boxed{",
        "<answer></think>",
        "[1, 1, 1, 1] ",
        "1,",
        "answer:",
    ]
    manager = manager_of(name)
    try:
        truth = TRUTHS.get(name, "\\frac{1}{2}")
        long = [f"<think>{piece * (40_000 // len(piece))}" for piece in pieces]
        inputs = [RewardInput(response=r, response_length=5, ground_truth=truth, problem=PROBLEM) for r in long]
        assert [outcome.failure for outcome in manager.score(inputs)] == [None] * len(inputs)
    finally:
        manager.close()
