"""The rule by which PAPO-Eval grades, on answers as its benchmarks have them.

The rule: take the spaces around < > / away, take the content of the last \\boxed{} whose braces are in pairs, and let
mathruler compare it with the truth: equal after normalisation (text, dollar and percent signs, units, degrees, braces,
spaces and case do not count), or equal by sympy, where a truth that is an integer wants an integer, and fractions have
to be written alike.
"""

from __future__ import annotations

import importlib.util

import pytest

from tests.conftest import REPOSITORY

# truth: answers that are right, answers that are wrong
ANSWERS: dict[str, tuple[list[str], list[str]]] = {
    # Choices: MathVerse, MathVista, LogicVista, MMMU-Pro. The letter alone is the answer, whatever its case.
    "A": (["A", "a", " A ", "\\text{A}", "{A}", "$A$"], ["B", "", "A.", "A)", "A: 30", "AB", "Answer A", "option A"]),
    "C": (["C", "c", "\\text{C}"], ["(D)", "A", "C, D", "3", "The third"]),
    "J": (["J", "j"], ["I", "10"]),
    "AC": (["AC", "ac", "A C"], ["A", "A, C", "CA and more"]),
    "B, D": (["B, D", "b,d", "B and D", "B or D"], ["B", "BDE"]),
    # Counting (clevr_count) and integers. An integer wants an integer.
    "3": (
        ["3", "3.0", "03", "\\text{3}", "$3$", "+3", "3.", "{3}"],
        ["4", "3.5", "33", "three", "3 objects", "6/2", "-3"],
    ),
    "0": (["0", "0.0"], ["", "1", "none", "O"]),
    "10": (["10", "10.0"], ["1", "100", "ten", "10.1"]),
    "1000": (["1000", "1,000", "1000.0"], ["100", "1,00", "10000"]),
    "1234567": (["1,234,567", "1234567"], ["1234", "1,234"]),
    "-7": (["-7", "- 7", "-7.0"], ["7", "-8"]),
    # Decimals.
    "0.5": (["0.5", ".5", "0.50", "\\frac{1}{2}", "1/2"], ["0.55", "5", "1/3", "0,5"]),
    "2.75": (["2.75", "11/4", "\\frac{11}{4}"], ["2.7", "2.8", "275"]),
    "3.14": (["3.14", "3.140"], ["\\pi", "3.1", "3.1416"]),
    # Percent: the sign does not count, and so 0.25 is not 25 %.
    "25%": (["25%", "25", "25\\%", "25 \\%"], ["0.25", "75%", "2.5%"]),
    "12.5\\%": (["12.5", "12.5%", "12.5\\%"], ["0.125", "12"]),
    # Fractions: written alike, or as anything else that sympy can read.
    "\\frac{3}{4}": (["\\frac{3}{4}", "3/4", "\\dfrac{3}{4}", "\\tfrac{3}{4}", "0.75"], ["6/8", "4/3", "\\frac{6}{8}"]),
    "-\\frac{1}{2}": (["-\\frac{1}{2}", "-1/2", "-0.5"], ["1/2", "-2"]),
    "5/3": (["5/3", "\\frac{5}{3}", "\\frac53"], ["1.67", "3/5", "10/6"]),
    # Roots, pi and powers: Geometry3K, We-Math, MMK12.
    "\\sqrt{2}": (["\\sqrt{2}", "\\sqrt2", "sqrt(2)", "2/\\sqrt{2}"], ["2", "1.41", "\\sqrt{3}"]),
    "2\\sqrt{3}": (["2\\sqrt{3}", "\\sqrt{12}", "2 \\sqrt{3}"], ["\\sqrt{3}", "3\\sqrt{2}", "3.46"]),
    "5\\sqrt{2}": (["5\\sqrt{2}", "\\sqrt{50}"], ["7.07", "\\sqrt{25}"]),
    "16\\pi": (["16\\pi", "16 \\pi", "4\\pi \\cdot 4"], ["16", "50.27", "8\\pi"]),
    "\\frac{\\pi}{3}": (["\\frac{\\pi}{3}", "\\pi/3"], ["\\pi", "60"]),
    # Units and degrees do not count.
    "60^\\circ": (["60^\\circ", "60", "60°".replace("°", " degrees"), "60^{\\circ}"], ["30^\\circ", "120", "6"]),
    "45": (["45^\\circ", "45 degrees", "45"], ["45.5", "135"]),
    "12 cm": (["12 cm", "12", "12\\text{ cm}", "12cm"], ["12 kg", "1.2", "0.12"]),
    "30 meters": (["30 meters", "30", "30 meter"], ["30 km", "3"]),
    "5 feet": (["5 feet", "5"], ["5.5 feet", "60 inches"]),
    "\\$15": (["15", "$15", "\\$15"], ["1.5", "\\$51"]),
    # Expressions, equations, intervals, pairs.
    "x^2+1": (["x^2+1", "1+x^2", "x^2 + 1"], ["x^2", "x^2-1"]),
    "2x+3": (["2x+3", "3+2x", "2*x+3"], ["2x", "3x+2"]),
    "(1, 2)": (["(1, 2)", "(1,2)", "( 1 , 2 )"], ["(2, 1)", "1, 2", "(1, 2, 3)", "[1, 2]"]),
    "(-\\infty, 3)": (["(-\\infty, 3)", "(-\\infty,3)"], ["(-\\infty, 3]", "(3, \\infty)"]),
    "y=2x": (["y=2x", "y = 2x", "2x"], ["y=3x", "x"]),  # what stands before = does not count
    # Words: MathVista and MMMU have some.
    "yes": (["yes", "Yes", "YES", "\\text{Yes}"], ["no", "true", "y"]),
    "Friday": (["Friday", "friday", "\\text{Friday}", "Fri"], ["Monday", "Sunday"]),  # `day` is taken for a unit
    "blue cube": (["blue cube", "Blue Cube", "bluecube"], ["cube", "red cube"]),
}
CASES = [
    (answer, truth, float(right))
    for truth, (good, bad) in ANSWERS.items()
    for right, answers in ((True, good), (False, bad))
    for answer in answers
]
# Whole responses, where there is no one box, or more than one.
RESPONSES = [
    ("<think>2+1</think> The answer is \\boxed{3}.", "3", 1.0),
    ("\\boxed{3}", "3", 1.0),
    ("\\boxed{4} no, \\boxed{3}", "3", 1.0),
    ("\\boxed{3} no, \\boxed{4}", "3", 0.0),
    ("3", "3", 0.0),
    ("", "3", 0.0),
    ("The answer is 3.", "3", 0.0),
    ("\\boxed{}", "3", 0.0),
    ("\\boxed{3", "3", 0.0),
    ("\\boxed{\\frac{1}{2}}", "0.5", 1.0),
    ("\\boxed{ 1 / 2 }", "1/2", 1.0),
    ("< think > so < / think >\\boxed{B}", "B", 1.0),
    ("\\boxed{{B}}", "B", 1.0),
    ("\\fbox{3}", "3", 0.0),
    ("\\boxed {3}", "3", 0.0),
]


@pytest.fixture(scope="module")
def rule():
    path = REPOSITORY / "examples/reward_function/math.py"
    spec = importlib.util.spec_from_file_location("papo_math_rule", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda response, truth: module.compute_score({"response": response, "ground_truth": truth})["accuracy"]


@pytest.mark.parametrize(("answer", "truth", "expected"), CASES)
def test_an_answer(rule, answer, truth, expected):
    assert rule(f"<think>I look.</think> So \\boxed{{{answer}}}", truth) == expected


@pytest.mark.parametrize(("response", "truth", "expected"), RESPONSES)
def test_a_response(rule, response, truth, expected):
    assert rule(response, truth) == expected


def test_the_table_is_long_enough():
    assert len(CASES) + len(RESPONSES) >= 150
