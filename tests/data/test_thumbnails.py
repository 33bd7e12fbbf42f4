"""What a person is shown is what the model was given."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from papo.corruption.fill import PrecomputedConfig
from papo.corruption.patches import RandomPatchConfig
from tests.papo.test_corruption import picture
from verl.config.algorithm import ViewPer, ViewStage
from verl.config.config import Config
from verl.data.thumbnails import GAP, LONGEST_SIDE, side_by_side, thumbnails, views_to_show
from verl.data.views import change_images, image_seeds
from verl.data.vision import VisionProcessor
from verl.protocol import DataProto
from verl.trainer.validation import Answers, Validation
from verl.workers.reward.base import Outcome


@pytest.fixture(scope="module")
def vision(assets) -> VisionProcessor:
    return VisionProcessor(str(assets / "model"), min_pixels=784, max_pixels=12544)


@pytest.mark.parametrize("stage", ViewStage)
@pytest.mark.parametrize("per", ViewPer)
def test_a_thumbnail_has_the_mask_of_the_first_response_in_the_first_epoch(vision, stage, per):
    view = RandomPatchConfig(prob=0.5, stage=stage, per=per)
    image = picture(84, 56)
    made = thumbnails("a:1", [image], {"masked": view}, vision, seed=3)
    assert list(made) == ["image", "masked"] and (np.array(made["image"]) == np.array(image)).all()
    seeds = image_seeds("masked", view, 1, seed=3, uid="a:1", epoch=0, response=0)
    trained, shown = change_images("masked", view, [image], seeds, vision), [made["masked"]]
    trained, shown = (vision.encode_images(i, do_resize=stage == ViewStage.raw).tensors() for i in (trained, shown))
    assert torch.equal(shown["pixel_values"], trained["pixel_values"])


def test_several_images_stand_in_a_row_small_enough_to_send(vision):
    made = thumbnails("a:1", [picture(84, 56), picture(1400, 700)], {"masked": RandomPatchConfig()}, vision, seed=3)
    for image in made.values():
        assert image.size == (84 + GAP + LONGEST_SIDE, LONGEST_SIDE // 2)
    assert thumbnails("a:1", [], {"masked": RandomPatchConfig()}, vision, seed=3) == {}
    row = np.array(side_by_side([Image.new("RGB", (2, 2), "red"), Image.new("RGB", (2, 1), "blue")]))
    assert row.shape == (2, 4 + GAP, 3) and (row[0, -1] == (0, 0, 255)).all() and (row[1, -1] == 255).all()


def test_a_view_of_another_column_is_left_out_by_name(caplog):
    views = {"hints": PrecomputedConfig(column="hint"), "masked": RandomPatchConfig()}
    with caplog.at_level(logging.INFO, logger="verl"):
        assert list(views_to_show(views)) == ["masked"]
    assert "view 'hints' has no thumbnails" in caplog.text and "'hint'" in caplog.text


def test_rows_for_a_table_have_texts_scores_and_pictures_where_there_are_some(vision):
    objects = {"uid": ["a:0", "a:1", "a:2"], "problem": ["p0", "p1", "p2"], "images": [[picture(56, 28)], [], []]}
    prompts = DataProto.from_dict({}, objects)
    inputs = [{"response": f"r{i}", "response_length": 2, "ground_truth": f"{i}"} for i in range(3)]
    outcomes = [Outcome({"overall": i / 2, "accuracy": 1.0}, None, 0.0) for i in range(3)]
    validation = object.__new__(Validation)
    validation.plan, validation.views = SimpleNamespace(vision=vision, config=Config()), {"masked": RandomPatchConfig()}
    answers = Answers(prompts, prompts, inputs, outcomes)
    rows = validation._rows(answers, copies=1, count=2)
    texts = {"uid": "a:1", "prompt": "p1", "response": "r1", "answer": "1"}
    assert rows[1] == {**texts, "score/overall": 0.5, "score/accuracy": 1.0} and len(rows) == 2
    assert set(rows[0]) - set(rows[1]) == {"image", "masked"}
    assert validation._rows(answers, copies=1, count=0) == []
