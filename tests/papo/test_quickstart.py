"""The quickstart's parts: digits that are never shared, an ordinary model folder, a start that stops on its loss."""

from __future__ import annotations

import io
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from papo.quickstart.artifacts import is_current
from papo.quickstart.digits import DigitsSettings, _split, build_data
from papo.quickstart.tiny_vlm import build_model
from papo.quickstart.warm_start import WarmStartSettings, warm_start
from tests.conftest import REPOSITORY
from tests.fakes.assets import CORPUS
from verl.workers.reward.base import RewardInput

SMALL = DigitsSettings(sft_images=40, sft_rows=40, train_images=60, train_rows=30, val_rows=30)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_data(tmp_path_factory.mktemp("digits") / "data", settings=SMALL)


def rows(path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def pictures(path) -> set[bytes]:
    """Every digit of every picture, as pixels."""
    found = set()
    for row in rows(path):
        image = Image.open(io.BytesIO(row["images"][0]["bytes"]))
        found |= {image.crop((x, 0, x + 28, 28)).tobytes() for x in range(0, image.width, 28)}
    return found


def test_the_three_files_share_no_digit(data):
    sft, train, val = (pictures(path) for path in (data / "sft.parquet", data / "train.parquet", data / "val.parquet"))
    assert not sft & train and not sft & val and not train & val
    # The whole pool, not only what 30 rows drew from it:
    labels = __import__("sklearn.datasets", fromlist=["load_digits"]).load_digits().target
    pools = [set(pool.tolist()) for pool in _split(labels, DigitsSettings()).values()]
    assert sum(len(pool) for pool in pools) == len(set().union(*pools)) == len(labels)


def test_rows_have_the_columns_of_the_paper_data_and_true_answers(data):
    (reward_path, name) = (REPOSITORY / "examples/reward_function/math.py", "compute_score")
    from verl.utils.imports import import_function

    score = import_function(f"{reward_path}:{name}", "key")
    for row in rows(data / "sft.parquet"):
        assert set(row) == {"images", "problem", "answer", "solution"}
        assert row["problem"].count("<image>") == len(row["images"]) == 1
        digits = row["solution"].split("<think>")[1].split("</think>")[0].split("+")
        assert 2 <= len(digits) <= 4 and sum(map(int, digits)) == int(row["answer"])
        given = RewardInput(response=row["solution"], response_length=9, ground_truth=row["answer"])
        assert score(given) == {"overall": 1.0, "accuracy": 1.0, "format": 1.0}
    assert "solution" not in rows(data / "train.parquet")[0]


def test_the_same_settings_are_used_again_and_others_are_not(data):
    before = (data / "train.parquet").stat().st_mtime_ns
    assert (build_data(data, settings=SMALL) / "train.parquet").stat().st_mtime_ns == before
    assert not is_current(data, {"kind": "digits"})
    other = build_data(data, settings=replace(SMALL, val_rows=31))
    assert len(rows(other / "val.parquet")) == 31


def test_a_folder_with_foreign_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files that the quickstart did not make"):
        build_data(tmp_path, settings=SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_the_model_is_an_ordinary_folder_of_the_promised_size(tmp_path):
    folder = build_model(tmp_path / "model", CORPUS, seed=0)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert 0.9e6 < model.num_parameters() < 2e6 and not model.config.tie_word_embeddings
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    text = "Think inside <think>3+4</think> \\boxed{7} äö"
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text
    inputs = processor(text=["<|image_pad|>"], images=[Image.new("RGB", (84, 28))], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 2, 6]] and inputs["input_ids"].shape[1] == 3


def test_a_warm_start_stops_on_its_loss_and_is_the_same_twice(tmp_path, data):
    base = build_model(tmp_path / "base", CORPUS, seed=0)
    template = REPOSITORY / "examples/format_prompt/math_perception.jinja"
    settings = WarmStartSettings(target_loss=4.5, final_steps=2, max_steps=40, batch_size=8, warmup_steps=5)
    sft = build_data(data.parent / "again", settings=SMALL) / "sft.parquet"
    models = [
        AutoModelForImageTextToText.from_pretrained(warm_start(base, sft, tmp_path / name, template, 1, settings))
        for name in ("first", "second")
    ]
    start = AutoModelForImageTextToText.from_pretrained(base).state_dict()
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], start["lm_head.weight"])
    with pytest.raises(RuntimeError, match=r"the loss is still .* after 3 steps \(target 0.001\)"):
        warm_start(base, sft, tmp_path / "x", template, 1, replace(settings, target_loss=0.001, max_steps=3))
    assert not (tmp_path / "x").exists()
