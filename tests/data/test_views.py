"""Views: same tokens, other images, repeatable."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from papo.corruption.fill import BlankConfig, PrecomputedConfig
from papo.corruption.patches import RandomPatchConfig
from tests.fakes.rows import png, row, write_parquet
from verl.config.data import DataConfig
from verl.data.collate import PromptCollator
from verl.data.dataset import PromptDataset
from verl.data.views import add_view
from verl.data.vision import VisionProcessor
from verl.trainer.collect import add_views


@pytest.fixture(scope="module")
def prompts_and_vision(assets, tmp_path_factory):
    vision = VisionProcessor(str(assets / "model"), min_pixels=784, max_pixels=12544)
    rows = [row(), row("<image>+<image>", images=2, width=90, height=50), row("1+1?", images=0), row()]
    path = write_parquet(tmp_path_factory.mktemp("views") / "a.parquet", rows)
    data = PromptDataset(path, "k", DataConfig(train_files=path, max_prompt_length=200), vision)
    return PromptCollator(vision.special.pad)([data[i] for i in range(4)]), vision


def masked(prompts_and_vision, seed=1, epoch=0, copies=1, **options):
    prompts, vision = prompts_and_vision
    rows = prompts.repeat_interleave(copies)
    return add_view(rows, "masked", RandomPatchConfig(**options), vision, seed, epoch, copies)


def pixels(batch, index):
    return batch["masked_mm_inputs"][index].tensors()["pixel_values"]


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
    assert not batch["masked_mm_inputs"][2]


def test_nothing_masked_is_the_original_bit_for_bit(prompts_and_vision):
    batch = masked(prompts_and_vision, prob=0.0)
    for index in (0, 1, 3):
        assert torch.equal(pixels(batch, index), batch["mm_inputs"][index].tensors()["pixel_values"])


def test_every_image_of_a_prompt_has_a_mask_of_its_own(prompts_and_vision):
    first, second = pixels(masked(prompts_and_vision, prob=0.5), 1).chunk(2)  # two equal pictures
    assert not torch.equal(first, second)


def test_responses_share_the_mask_of_their_prompt(prompts_and_vision):
    batch, single = masked(prompts_and_vision, copies=3), masked(prompts_and_vision)
    assert all(batch["masked_mm_inputs"][i] is batch["masked_mm_inputs"][i // 3 * 3] for i in (1, 2, 4, 5, 10, 11))
    assert batch["masked_rows"].tolist() == single["masked_rows"].repeat_interleave(3).tolist()
    for index in (0, 1, 3):
        assert torch.equal(pixels(batch, 3 * index), pixels(single, index))


def test_responses_can_have_masks_of_their_own(prompts_and_vision):
    first, again = (masked(prompts_and_vision, copies=3, per="response") for _ in range(2))
    made = [pixels(first, 3 + copy) for copy in range(3)]
    assert not any(torch.equal(made[i], made[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert all(torch.equal(made[copy], pixels(again, 3 + copy)) for copy in range(3))
    assert first["masked_rows"].tolist() == [True] * 6 + [False] * 3 + [True] * 3


@pytest.mark.parametrize("per, different", [("prompt", 1), ("response", 4)])
def test_a_step_makes_a_row_per_response_and_drops_the_pictures(prompts_and_vision, per, different):
    prompts, vision = prompts_and_vision
    run = SimpleNamespace(
        config=SimpleNamespace(
            algorithm=SimpleNamespace(views={"masked": RandomPatchConfig(per=per), "gone": BlankConfig()}),
            trainer=SimpleNamespace(seed=1),
        ),
        sizes=SimpleNamespace(responses_per_prompt=4),
        requirements=SimpleNamespace(views=("masked", "gone")),
        vision=vision,
    )
    rows = add_views(run, prompts, epoch=0)
    assert list(rows["uid"]) == [uid for uid in prompts["uid"] for _ in range(4)]
    assert "images" not in rows and "view_images" not in rows
    assert len({pixels(rows, 4 + copy).numpy().tobytes() for copy in range(4)}) == different
    assert rows["gone_rows"].tolist() == rows["masked_rows"].tolist()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(1, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(90, 50), (300, 200), (10, 100), (28, 28), (57, 1)])
def test_resize_is_the_processors_own(prompts_and_vision, size):
    """Encoding a picture resized before is encoding the picture, also where the processor resizes once more."""
    vision = prompts_and_vision[1]
    image = noise(*size)
    resized = vision.resize(image)
    assert resized.width % 28 == 0 and resized.height % 28 == 0
    wanted = vision.encode_images([image]).tensors()
    for images in (vision.encode_images([resized], do_resize=False), vision.encode_images([resized])):
        found = images.tensors()
        assert torch.equal(found["image_grid_thw"], wanted["image_grid_thw"])
        torch.testing.assert_close(found["pixel_values"], wanted["pixel_values"], rtol=0, atol=1e-6)


def test_patches_of_a_resized_view_are_patches_of_the_vision_tower(prompts_and_vision):
    """Raw patches straddle the tower's where the picture is resized; resized ones hide whole ones or nothing."""
    prompts, vision = prompts_and_vision
    assert vision.processor.image_processor.patch_size == 14
    black = vision.encode_images([Image.new("RGB", (28, 28))]).tensors()["pixel_values"][0]
    aligned = {}
    for stage in ("raw", "resized"):
        batch = masked(prompts_and_vision, stage=stage, prob=0.5)
        found, original = pixels(batch, 1), prompts["mm_inputs"][1].tensors()["pixel_values"]
        hidden, kept = (found == black).all(dim=1), (found == original).all(dim=1)
        assert torch.equal(
            batch["masked_mm_inputs"][1].tensors()["image_grid_thw"],
            prompts["mm_inputs"][1].tensors()["image_grid_thw"],
        )
        aligned[stage] = bool((hidden | kept).all()) and bool(hidden.any()) and bool(kept.any())
    assert aligned == {"raw": False, "resized": True}
    same = masked(prompts_and_vision, stage="resized", prob=0.0)
    assert torch.equal(pixels(same, 1), prompts["mm_inputs"][1].tensors()["pixel_values"])


def with_hints(path, hints):
    """A file whose rows have the pictures `hints` in the column `hints`."""
    rows = [{**row(), "hints": hint} for hint in hints]
    images = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    schema = pa.schema([("images", images), ("problem", pa.string()), ("answer", pa.string()), ("hints", images)])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return str(path)


def hinted(path, vision):
    data = PromptDataset(path, "k", DataConfig(train_files=path, max_prompt_length=200), vision, ["hints"])
    prompts = PromptCollator(vision.special.pad)([data[i] for i in range(len(data))])
    return add_view(prompts, "masked", PrecomputedConfig(column="hints"), vision, 1, 0)


def test_precomputed_pictures_come_from_their_column(prompts_and_vision, tmp_path):
    vision = prompts_and_vision[1]
    colours = [(0, 0, 0), (10, 200, 30)]
    path = with_hints(tmp_path / "a.parquet", [[{"bytes": png(colour=c), "path": None}] for c in colours])
    batch = hinted(path, vision)
    for index, colour in enumerate(colours):
        wanted = vision.encode_images([Image.new("RGB", (56, 28), colour)]).tensors()["pixel_values"]
        assert torch.equal(pixels(batch, index), wanted)


def test_precomputed_pictures_must_be_there_as_many_and_as_large(prompts_and_vision, tmp_path):
    vision = prompts_and_vision[1]
    with pytest.raises(ValueError, match="no column 'hints'.*algorithm.views"):
        hinted(write_parquet(tmp_path / "a.parquet", [row()]), vision)
    with pytest.raises(ValueError, match="row 0: 0 image.s. in column 'hints'.*1 in column 'images'"):
        hinted(with_hints(tmp_path / "b.parquet", [[]]), vision)
    with pytest.raises(ValueError, match="views.masked.column='hints'.*b2.parquet:0.*agree"):
        hinted(with_hints(tmp_path / "b2.parquet", [[{"bytes": png(width=84), "path": None}]]), vision)
