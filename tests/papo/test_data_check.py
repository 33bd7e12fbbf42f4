"""The command `papo data check`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from papo.cli import main
from papo.tools.data_check.look import doubt
from papo.tools.data_check.report import draw
from tests.fakes.rows import row, write_parquet

PIXELS = ["min_pixels=784", "data.max_pixels=12544"]


def run(*arguments: str) -> int:
    try:
        main(["data", "check", *map(str, arguments)])
    except SystemExit as stopped:
        return stopped.code
    return 0


@pytest.fixture
def bad_file(tmp_path) -> str:
    rows = [row(f"<image>{i}", answer=str(i), width=40 + i) for i in range(12)]
    rows[1] = row("<image><image>Add.")
    rows[2]["images"][0]["bytes"] = b"no image"
    rows[3]["images"][0]["bytes"] = rows[3]["images"][0]["bytes"][:50]
    rows[4]["answer"] = " "
    rows[5]["answer"] = "\\frac{1}{2"
    rows[6]["problem"] = ""
    rows[8] = rows[7]
    rows[9]["problem"] = "<image>" + "Noise. " * 60
    return write_parquet(tmp_path / "bad.parquet", rows)


def test_every_bad_row_is_listed_and_the_exit_code_says_so(bad_file, tmp_path, assets, capsys):
    out = tmp_path / "out"
    options = ["--model", assets / "model", "--out", out, *PIXELS, "max_prompt_length=200"]
    assert run(bad_file, *options) == 1
    listed = [json.loads(line) for line in (out / "bad_rows.jsonl").read_text().splitlines()]
    assert {(bad["row"], bad["level"], bad["kind"]) for bad in listed} == {
        (1, "error", "markers"),
        (2, "error", "image"),
        (3, "error", "image"),
        (4, "error", "answer"),
        (5, "warning", "answer"),
        (6, "error", "problem"),
        (8, "warning", "duplicate"),
        (9, "warning", "length"),
    }
    assert all(bad["file"] == bad_file and bad["text"] for bad in listed)
    said = capsys.readouterr().out
    assert "12 in 1 file(s)" in said and "11 row(s) with 1" in said
    assert "1 prompt(s) longer than data.max_prompt_length=200 (truncation: drop)" in said
    assert "ERROR    image             2" in said and "5 error(s), 3 warning(s)" in said
    assert Image.open(out / "prompt_lengths.png").size == (960, 504)


def test_good_rows_and_no_model(tmp_path, capsys):
    path = write_parquet(tmp_path / "a.parquet", [row(answer=str(i)) for i in range(3)])
    assert run(f"{path}*2", "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "no row is at fault" in said and "not counted: --model says whose tokens" in said
    assert "3 in " in said and "2 times in an epoch" in said and "56x28 the smallest" in said
    assert (tmp_path / "out" / "bad_rows.jsonl").read_text() == ""
    assert not (tmp_path / "out" / "prompt_lengths.png").exists()


def test_headers_alone_do_not_find_a_file_that_was_cut_off(tmp_path):
    cut = row()
    cut["images"][0]["bytes"] = cut["images"][0]["bytes"][:50]
    path = write_parquet(tmp_path / "a.parquet", [row(answer="8"), cut])
    assert run(path, "--out", tmp_path / "out", "--headers") == 0
    assert run(path, "--out", tmp_path / "out") == 1


def test_what_a_run_would_refuse_is_an_error_and_what_it_would_cut_is_not(tmp_path, assets):
    path = write_parquet(tmp_path / "a.parquet", [row(), row("<image>" + "Noise. " * 60)])
    options = [path, "--model", assets / "model", "--out", tmp_path / "out", *PIXELS, "max_prompt_length=200"]
    assert run(*options, "truncation=left") == 0
    assert run(*options, "truncation=error") == 1
    (bad,) = (json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines())
    assert bad["row"] == 1 and "tokens, more than data.max_prompt_length=200: refused" in bad["text"]


def test_a_text_only_model_and_images(tmp_path, families):
    path = write_parquet(tmp_path / "a.parquet", [row("1+1?", images=0), row()])
    assert run(path, "--model", families["qwen3"] / "model", "--out", tmp_path / "out") == 1
    (bad,) = (json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines())
    assert bad["kind"] == "media" and "Qwen3 model, which reads text only" in bad["text"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["/nowhere.parquet"], "FILES: there is no file or folder '/nowhere.parquet'"),
        (["{good}", "promt_key=a"], "'promt_key'.*keys are train_files"),
        (["{good}", "prompt_key=question"], "FILES: no column 'question' .data.prompt_key."),
        (["{good}", "other.parquet"], "'other.parquet' is no key=value; several files are one word"),
        (["{good}", "max_prompt_length=many"], "'many'"),
        (["{good}", "truncation=right"], "right"),
        (["{good}", "min_pixels=9", "max_pixels=8"], "data.min_pixels=9 is above"),
        (["{good}", "--model", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_named(tmp_path, arguments, named):
    good = write_parquet(tmp_path / "a.parquet", [row()])
    with pytest.raises(SystemExit, match=f"error: .*{named}"):
        main(["data", "check", *(word.format(good=good) for word in arguments), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("answer", ["7", "\\frac{1}{2}", "\\{1, 2\\}", "$5$", "\\$5", "B", "[0, 1)", "x" * 200])
def test_answers_that_a_rule_can_find(answer):
    assert not doubt(answer)


@pytest.mark.parametrize(
    ("answer", "why"),
    [("\\frac{1}{2", "braces"), ("}{", "braces"), ("\\boxed{3}", "boxed"), ("$5", "dollar"), ("x" * 201, "201 char")],
)
def test_answers_that_it_may_not(answer, why):
    assert why in doubt(answer)


@pytest.mark.parametrize(("lengths", "limit"), [([7], 10), ([7], 3), ([5, 5, 900], 100), (range(5000), 4096)])
def test_any_lengths_can_be_drawn(tmp_path, lengths, limit):
    draw(list(lengths), limit, str(tmp_path / "a.png"))
    colours = np.array(Image.open(tmp_path / "a.png").convert("RGB")).reshape(-1, 3)
    assert (colours == (0xC0, 0x39, 0x2B)).all(axis=1).any() == (max(lengths) > limit)
