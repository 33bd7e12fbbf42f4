"""Views: same tokens, other images, repeatable."""

from __future__ import annotations

import pytest
import torch

from papo.corruption.random_patch import RandomPatchConfig
from tests.fakes.rows import row, write_parquet
from verl.config.data import DataConfig
from verl.data.collate import PromptCollator
from verl.data.dataset import PromptDataset
from verl.data.views import add_view
from verl.data.vision import VisionProcessor


@pytest.fixture(scope="module")
def prompts_and_vision(assets, tmp_path_factory):
    vision = VisionProcessor(str(assets / "model"), min_pixels=784, max_pixels=12544)
    rows = [row(), row("<image>+<image>", images=2, width=90, height=50), row("1+1?", images=0), row()]
    path = write_parquet(tmp_path_factory.mktemp("views") / "a.parquet", rows)
    data = PromptDataset(path, "k", DataConfig(train_files=path, max_prompt_length=200), vision)
    return PromptCollator(vision.special.pad)([data[i] for i in range(4)]), vision


def masked(prompts_and_vision, seed=1, epoch=0, **options):
    prompts, vision = prompts_and_vision
    return add_view(prompts, "masked", RandomPatchConfig(**options), vision, seed, epoch)


def pixels(batch, index):
    return batch["masked_mm_inputs"][index]["pixel_values"]


def test_masks_repeat_by_seed_uid_and_epoch(prompts_and_vision):
    first, again = masked(prompts_and_vision), masked(prompts_and_vision)
    for index in (0, 1, 3):
        assert torch.equal(pixels(first, index), pixels(again, index))
    assert not torch.equal(pixels(first, 1), pixels(masked(prompts_and_vision, seed=2), 1))
    assert not torch.equal(pixels(first, 1), pixels(masked(prompts_and_vision, epoch=1), 1))
    assert not torch.equal(pixels(first, 0), pixels(first, 3)) or not torch.equal(
        pixels(masked(prompts_and_vision, epoch=1), 0), pixels(masked(prompts_and_vision, epoch=1), 3)
    )


def test_a_masks_random_numbers_do_not_depend_on_the_other_prompts(prompts_and_vision):
    prompts, vision = prompts_and_vision
    alone = add_view(prompts.rows(torch.tensor([1])), "masked", RandomPatchConfig(), vision, 1, 0)
    assert torch.equal(pixels(alone, 0), pixels(masked(prompts_and_vision), 1))


def test_rows_without_images_are_not_covered(prompts_and_vision):
    batch = masked(prompts_and_vision)
    assert batch["masked_rows"].tolist() == [True, True, False, True]
    assert batch["masked_mm_inputs"][2] == {}


def test_nothing_masked_is_the_original_bit_for_bit(prompts_and_vision):
    batch = masked(prompts_and_vision, prob=0.0)
    for index in (0, 1, 3):
        assert torch.equal(pixels(batch, index), batch["mm_inputs"][index]["pixel_values"])


def test_responses_share_the_mask_of_their_prompt(prompts_and_vision):
    batch = masked(prompts_and_vision).repeat_interleave(3)
    assert batch["masked_mm_inputs"][0] is batch["masked_mm_inputs"][2]
