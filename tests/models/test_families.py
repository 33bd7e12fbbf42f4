"""Positions against transformers' own, padded and not."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText

from verl.data.vision import VisionProcessor
from verl.models.families import check_family, positions_of_prompt, positions_of_response


@pytest.fixture(scope="module")
def model(assets):
    return AutoModelForImageTextToText.from_pretrained(assets / "model")


@pytest.fixture(scope="module")
def vision(assets):
    return VisionProcessor(str(assets / "model"), min_pixels=784, max_pixels=50176)


@pytest.mark.parametrize("sizes", [[], [(28, 28)], [(84, 56)], [(56, 140), (28, 28), (112, 84)]])
def test_positions_equal_those_of_transformers(model, vision, sizes):
    from PIL import Image

    images = [Image.new("RGB", size) for size in sizes]
    encoded = vision.encode_prompt(vision.chat_text("Look: " + "<image>" * len(images) + " add."), images)
    ids = encoded["prompt_ids"]
    grid = encoded["mm_inputs"].get("image_grid_thw")
    types = (ids == model.config.image_token_id).int()
    expected, delta = model.model.get_rope_index(ids[None], mm_token_type_ids=types[None], image_grid_thw=grid)
    torch.testing.assert_close(encoded["prompt_positions"], expected[:, 0])
    after = positions_of_response(encoded["prompt_positions"][None], 3)[0]
    first = len(ids) + int(delta)  # transformers goes on at length + delta
    assert after.tolist() == [[first, first + 1, first + 2]] * 3


def test_positions_of_text_count(model):
    assert positions_of_prompt(torch.tensor([40, 41, 42]), None, model.config).tolist() == [[0, 1, 2]] * 3


def test_modality_tokens_are_banned_and_the_end_token_is_not(vision):
    names = vision.tokenizer.convert_ids_to_tokens(list(vision.special.banned))
    assert {"<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"} <= set(names)
    assert not set(vision.special.eos) & set(vision.special.banned)


def test_untested_families_are_refused_by_name():
    from transformers import Qwen2Config

    with pytest.raises(ValueError, match="holds a 'qwen2' model; supported: qwen2_5_vl"):
        check_family(Qwen2Config())
