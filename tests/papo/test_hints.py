"""The digits with a friend's hint: its files, and the reward that counts copies."""

from __future__ import annotations

import inspect
import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText

from examples.reward_function.hints import compute_score
from papo.quickstart.digits import DigitsSettings
from papo.quickstart.hints import TASKS, build_hinted_data, hint_of
from verl.config.compose import compose_config, presets

SMALL = DigitsSettings(sft_images=60, sft_rows=400, train_images=200, train_rows=400, val_rows=40)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, list[dict]]:
    folder = build_hinted_data(tmp_path_factory.mktemp("hints"), TASKS["misled"], settings=SMALL)
    return {path.stem: pq.read_table(path).to_pylist() for path in folder.glob("*.parquet")}


def test_the_friend_is_as_often_right_as_the_task_says(files):
    for name, right in (("sft", TASKS["misled"].sft_right), ("train", TASKS["misled"].train_right)):
        hints = [hint_of(row["problem"]) for row in files[name]]
        assert sum(hint is None for hint in hints) / len(hints) == pytest.approx(0.2, abs=0.06)
        same = [hint == int(row["answer"]) for hint, row in zip(hints, files[name], strict=True) if hint is not None]
        assert right**4 - 0.06 < np.mean(same) < right + 0.06  # of all two to four digits


def test_the_four_slices_ask_the_same_questions(files):
    answers = [row["answer"] for row in files["no_hint"]]
    for name in ("no_hint", "hint_right", "hint_wrong", "blank_hint_right"):
        assert [row["answer"] for row in files[name]] == answers
    assert not any(hint_of(row["problem"]) for row in files["no_hint"])
    assert [hint_of(row["problem"]) for row in files["hint_right"]] == [int(answer) for answer in answers]
    assert all(hint_of(row["problem"]) not in (None, int(row["answer"])) for row in files["hint_wrong"])
    for row in files["blank_hint_right"]:
        assert (np.array(Image.open(io.BytesIO(row["images"][0]["bytes"]))) == 255).all()


def test_the_reward_tells_looking_from_copying():
    def score(response: str, problem: str = "<image>Add the digits. A friend reads 3+5.", **options) -> dict:
        return compute_score({"response": response, "ground_truth": "9", "problem": problem}, **options)

    good, form = "<think>4+5</think>\\boxed{9}", {"format": 1.0}
    assert score(good) == {"overall": 1.0, "accuracy": 1.0, "copied": 0.0, **form}
    assert score("<think>3+5</think>\\boxed{8}") == {"overall": 0.1, "accuracy": 0.0, "copied": 1.0, **form}
    assert score("\\boxed{7}")["copied"] == 0.0 and score("\\boxed{8}", "<image>Add the digits.")["copied"] == 0.0
    assert score("\\boxed{9}", format_weight=0.0)["overall"] == 1.0


@pytest.mark.parametrize("name", [preset for preset in presets() if preset != "quickstart"])
def test_every_preset_can_meet_the_task(in_repository, name):
    reward = compose_config(name, ["+task=misled"]).worker.reward
    assert reward.reward_function.endswith("hints.py:compute_score")
    inspect.signature(compute_score).bind({}, **reward.reward_function_kwargs)


def test_the_studys_start_is_the_one_that_is_kept(tmp_path, monkeypatch):
    """It is made of the untrained model and the kept weights, again only where these change."""
    import papo.quickstart.__main__ as quickstart

    monkeypatch.setattr(quickstart, "warm_start", None)
    model = quickstart.prepare(tmp_path, quickstart.FORMAT_PROMPT, task="misled")
    kept = quickstart.STARTS / "misled.safetensors"
    assert (model / "model.safetensors").read_bytes() == kept.read_bytes()
    before = (model / "model.safetensors").stat().st_mtime_ns
    assert quickstart.prepare(tmp_path, quickstart.FORMAT_PROMPT, task="misled") == model
    assert (model / "model.safetensors").stat().st_mtime_ns == before
    assert AutoModelForImageTextToText.from_pretrained(model).num_parameters() > 9e5
