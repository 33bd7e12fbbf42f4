"""The filter's arithmetic is the processor's; its cache is used, and only while nothing has changed; text is cut."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from tests.data.test_images import encoded, noise
from tests.fakes.rows import png, row, write_parquet
from verl.config.data import DataConfig, PromptTruncation
from verl.data import overlong
from verl.data.dataset import PromptDataset
from verl.data.length_cache import cache_path
from verl.data.overlong import prompt_lengths, without_characters
from verl.data.rows import PromptRows
from verl.data.vision import VisionProcessor


def dataset(path, vision, **options) -> PromptDataset:
    config = DataConfig(**{"max_prompt_length": 4000, **options})
    return PromptDataset(str(path), "data.train_files", config, vision)


@pytest.fixture(scope="module")
def vision(assets):
    return VisionProcessor(str(assets / "model"), min_pixels=784, max_pixels=12544)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A folder for the cache of this test alone."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "prompt_lengths"


def sideways() -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return encoded(noise(90, 31), "JPEG", exif=exif)


def odd_images() -> list[bytes]:
    sizes = [(1, 1), (1, 200), (200, 1), (27, 29), (28, 28), (1000, 7), (333, 777), (2000, 1500), (31, 56), (14, 4)]
    found = [encoded(noise(*size)) for size in sizes]
    found += [sideways(), encoded(noise(40, 90).quantize(), "GIF"), encoded(noise(mode="CMYK"), "JPEG")]
    found += [encoded(Image.new("RGBA", (70, 45)), "WEBP"), encoded(Image.new("I;16", (45, 70)))]
    return found


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("limits", [(784, 12544), (50176, 100352)])
def test_counted_lengths_are_the_processors_on_every_image(families, model_type, limits, tmp_path):
    vision = VisionProcessor(str(families[model_type] / "model"), *limits)
    images = odd_images()
    rows = [row("<image>Add.", images=0) | {"images": [{"bytes": data, "path": None}]} for data in images]
    rows += [row(f"{i} <image> and <image>: ü√ {i}\n\n", images=2, width=60 + i, height=90) for i in range(3)]
    rows.append(row("How much is 1+1?", images=0))
    data = dataset(write_parquet(tmp_path / "a.parquet", rows), vision)
    counted = prompt_lengths(data.rows, vision).tolist()
    assert counted == [len(data[i]["prompt_ids"]) for i in range(len(rows))]


def test_text_only_families_too(families, tmp_path):
    vision = VisionProcessor(str(families["qwen3"] / "model"), 784, 12544)
    data = dataset(write_parquet(tmp_path / "a.parquet", [row(f"1+{i}?", images=0) for i in (1, 1000)]), vision)
    assert prompt_lengths(data.rows, vision).tolist() == [len(data[i]["prompt_ids"]) for i in range(2)]


def test_processes_count_what_one_process_counts(tmp_path, vision, monkeypatch):
    monkeypatch.setattr("verl.data.scan.FEW", 10)
    rows = [row("<image>" + "Add. " * (i % 7), width=28 + 9 * (i % 11)) for i in range(200)]
    path = write_parquet(tmp_path / "a.parquet", rows)
    counted = {}
    for workers in (1, 2):
        source = PromptRows(path, "k", DataConfig(filter_overlong_prompts_workers=workers))
        counted[workers] = prompt_lengths(source, vision).tolist()
        os.remove(cache_path(source, vision))
    assert counted[1] == counted[2] and len(set(counted[1])) > 7


def test_sides_that_the_model_does_not_take_are_named_with_their_row(tmp_path, vision):
    path = write_parquet(tmp_path / "a.parquet", [row(), row(width=301, height=1)])
    for options in ({}, {"filter_overlong_prompts": False}):
        with pytest.raises(ValueError, match="a.parquet', row 1: an image of 301x1 pixels is none for Qwen2.5-VL.*200"):
            dataset(path, vision, **options)


class Counter:
    """Counts how often lengths are really counted."""

    def __init__(self, monkeypatch) -> None:
        self.calls = 0
        count = overlong.count_prompts

        def counting(*arguments):
            self.calls += 1
            return count(*arguments)

        monkeypatch.setattr(overlong, "count_prompts", counting)


def test_the_cache_is_used_until_something_changes(tmp_path, vision, monkeypatch, assets):
    counter = Counter(monkeypatch)
    path = write_parquet(tmp_path / "a.parquet", [row(), row("<image>" + "Add. " * 50)])

    def counts(expected: int, vision=vision, rows: int = 2, **options) -> None:
        before = counter.calls
        assert len(dataset(path, vision, **options)) == rows
        assert counter.calls - before == expected, options

    counts(1)
    counts(0)
    counts(0, rows=1, max_prompt_length=60)  # the limit is no part of the lengths
    (tmp_path / "t.jinja").write_text("{{ content }} Think.")
    counts(1, format_prompt=str(tmp_path / "t.jinja"))
    counts(0, format_prompt=str(tmp_path / "t.jinja"))
    (tmp_path / "t.jinja").write_text("{{ content }} Think twice.")
    counts(1, format_prompt=str(tmp_path / "t.jinja"))
    counts(1, VisionProcessor(str(assets / "model"), 784, 784))
    counts(0)
    before = os.stat(tmp_path / "a.parquet").st_mtime_ns
    write_parquet(tmp_path / "a.parquet", [row(), row(), row()])
    os.utime(tmp_path / "a.parquet", ns=(before + 10**9,) * 2)  # a file system's clock may be slower than a write
    counts(1, rows=3)


def test_images_that_are_files_are_part_of_the_cache(tmp_path, vision, monkeypatch):
    counter = Counter(monkeypatch)
    (tmp_path / "a.png").write_bytes(png(28, 28))
    path = write_parquet(tmp_path / "a.parquet", [row() | {"images": [{"bytes": None, "path": "a.png"}]}])
    small = prompt_lengths(dataset(path, vision, image_dir=str(tmp_path)).rows, vision)
    assert counter.calls == 1
    (tmp_path / "a.png").write_bytes(png(280, 28))
    large = prompt_lengths(dataset(path, vision, image_dir=str(tmp_path)).rows, vision)
    assert large[0] > small[0]


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_a_broken_cache_is_said_and_made_anew(tmp_path, vision, cache, caplog, content):
    path = write_parquet(tmp_path / "a.parquet", [row()])
    expected = prompt_lengths(dataset(path, vision).rows, vision).tolist()
    (file,) = cache.iterdir()
    if content is None:
        np.save(file, np.zeros(7, np.int32))
    else:
        file.write_bytes(content)
    assert prompt_lengths(dataset(path, vision).rows, vision).tolist() == expected
    assert caplog.text.count("the cache of prompt lengths") == 1 and "is broken and is made anew" in caplog.text
    assert np.load(file).tolist() == expected


def test_a_cache_that_cannot_be_written_is_said(tmp_path, vision, cache, caplog):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    path = write_parquet(tmp_path / "a.parquet", [row()])
    assert len(dataset(path, vision)) == 1
    assert "prompt lengths cannot be kept for the next run" in caplog.text


def test_faults_are_never_kept(tmp_path, vision, cache):
    path = write_parquet(tmp_path / "a.parquet", [row() | {"images": [{"bytes": b"no", "path": None}]}])
    with pytest.raises(ValueError, match="row 0: an image of 2 bytes cannot be read"):
        dataset(path, vision)
    assert not cache.exists()


LONG = "<image>First part. <image>" + "Noise. " * 60 + "How much is 1+1?"


def test_text_is_cut_on_its_left_and_images_stay_whole(tmp_path, vision, caplog):
    path = write_parquet(tmp_path / "a.parquet", [row(LONG, images=2), row()])
    whole = dataset(path, vision)[0]
    data = dataset(path, vision, truncation=PromptTruncation.left, max_prompt_length=60)
    item = data[0]
    assert len(data) == 2 and 50 < len(item["prompt_ids"]) <= 60
    assert item["problem"].startswith("<image><image>") and item["problem"].endswith("Noise. How much is 1+1?")
    image_token = vision.config.image_token_id
    assert (item["prompt_ids"] == image_token).sum() == (whole["prompt_ids"] == image_token).sum() == 4
    assert item["mm_inputs"].digests == whole["mm_inputs"].digests
    assert vision.tokenizer.decode(item["prompt_ids"][:3]) == vision.tokenizer.decode(whole["prompt_ids"][:3])
    assert data[1]["problem"] == "<image>Add the digits."
    assert "1 of 2 prompts are longer" in caplog.text and "cut at the left end of their text" in caplog.text


def test_the_templates_words_are_not_cut(tmp_path, vision):
    (tmp_path / "t.jinja").write_text("Look. {{ content }} Think first.")
    path = write_parquet(tmp_path / "a.parquet", [row(LONG, images=2)])
    options = {"truncation": PromptTruncation.left, "format_prompt": str(tmp_path / "t.jinja")}
    problem = dataset(path, vision, max_prompt_length=90, **options)[0]["problem"]
    assert problem.startswith("Look. <image><image>") and problem.endswith("How much is 1+1? Think first.")


def test_images_that_leave_no_room_are_refused_and_not_cut(tmp_path, vision):
    path = write_parquet(tmp_path / "a.parquet", [row(), row(LONG, images=2, width=112, height=112)])
    with pytest.raises(ValueError, match="row 1: its images take 32 tokens and leave no room for text in data.max_pr"):
        dataset(path, vision, truncation=PromptTruncation.left, max_prompt_length=40)


def test_error_stops_at_once_and_counts(tmp_path, vision):
    path = write_parquet(tmp_path / "a.parquet", [row(), row(LONG, images=2), row(LONG, images=2)])
    with pytest.raises(ValueError, match="row 1: the prompt has .*truncation to drop or left .and 1 more row"):
        dataset(path, vision, truncation=PromptTruncation.error, max_prompt_length=60)


def test_what_cannot_be_without_the_filter(tmp_path, vision, caplog):
    path = write_parquet(tmp_path / "a.parquet", [row(LONG, images=2)])
    with pytest.raises(ValueError, match="data.truncation=drop needs data.filter_overlong_prompts=true"):
        dataset(path, vision, truncation=PromptTruncation.drop, filter_overlong_prompts=False)
    with pytest.raises(ValueError, match="filter_overlong_prompts_workers=0: 1 or more"):
        dataset(path, vision, filter_overlong_prompts_workers=0)
    left = {"truncation": PromptTruncation.left, "filter_overlong_prompts": False, "max_prompt_length": 60}
    assert len(dataset(path, vision, **left)[0]["prompt_ids"]) <= 60
    assert "does not count how many" in caplog.text


@pytest.mark.parametrize(
    ("count", "left"),
    [(0, "ab<image>c<image>"), (1, "b<image>c<image>"), (2, "<image>c<image>"), (9, "<image><image>")],
)
def test_markers_are_no_characters_to_cut(count, left):
    assert without_characters("ab<image>c<image>", count) == left


@pytest.mark.parametrize("word", ["<|image_pad|>", "<|video_pad|>"])
def test_a_text_that_would_be_taken_for_a_picture_stops_at_the_start(tmp_path, vision, word):
    logging.getLogger("verl").setLevel(logging.INFO)
    path = write_parquet(tmp_path / "a.parquet", [row(), row(f"<image>What is {word}?")])
    with pytest.raises(ValueError, match="a.parquet', row 1: the text itself holds an image token"):
        dataset(path, vision)
