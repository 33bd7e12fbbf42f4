"""Files to prompts: formats, templates, and errors that name file and row."""

from __future__ import annotations

import json

import pytest
import torch

from tests.fakes.rows import png, row, write_parquet
from verl.config.data import DataConfig
from verl.data.collate import PromptCollator
from verl.data.dataset import PromptDataset
from verl.data.loader import train_loader
from verl.data.overlong import prompt_lengths
from verl.data.vision import VisionProcessor


@pytest.fixture(scope="module")
def vision(assets):
    return VisionProcessor(str(assets / "model"), min_pixels=784, max_pixels=12544)


def dataset(reference, vision, **options) -> PromptDataset:
    config = DataConfig(**{"train_files": str(reference), "max_prompt_length": 256, **options})
    return PromptDataset(str(reference), "data.train_files", config, vision)


def test_one_prompt_holds_one_token_per_merged_patch(tmp_path, vision):
    path = write_parquet(tmp_path / "a.parquet", [row(width=84, height=28)])
    item = dataset(path, vision)[0]
    image_token = vision.config.image_token_id
    assert (item["prompt_ids"] == image_token).sum() == 3
    assert item["mm_inputs"].tensors()["image_grid_thw"].tolist() == [[1, 2, 6]]
    assert item["uid"] == f"{path}:0" and item["answer"] == "7"
    assert item["prompt_positions"].shape == (3, len(item["prompt_ids"]))


def test_parquet_json_jsonl_folders_and_lists_give_the_same_prompts(tmp_path, vision):
    (tmp_path / "picture.png").write_bytes(png())
    record = {"images": ["picture.png"], "problem": "<image>Add the digits.", "answer": "7"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "rows.json").write_text(json.dumps([record]))
    folder = tmp_path / "folder"
    folder.mkdir()
    parquet = write_parquet(folder / "rows.parquet", [row()])
    expected = dataset(parquet, vision)[0]
    for reference in (tmp_path / "rows.jsonl", tmp_path / "rows.json", folder):
        item = dataset(reference, vision, image_dir=str(tmp_path))[0]
        assert torch.equal(item["prompt_ids"], expected["prompt_ids"])
        assert torch.equal(item["mm_inputs"].tensors()["pixel_values"], expected["mm_inputs"].tensors()["pixel_values"])


def test_files_whose_columns_do_not_fit_together_are_named(tmp_path, vision):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"images": ["a.png"], "problem": "<image>", "answer": "7"}))
    parquet = write_parquet(tmp_path / "rows.parquet", [row()])
    with pytest.raises(ValueError, match="rows.parquet.*rows.jsonl.*have columns that do not fit"):
        dataset(f"{parquet},{tmp_path / 'rows.jsonl'}", vision)


def test_text_only_and_multi_image_rows(tmp_path, vision):
    path = write_parquet(
        tmp_path / "a.parquet", [row("How much is 3+4?", images=0), row("<image> and <image>: add.", images=2)]
    )
    data = dataset(path, vision)
    assert not data[0]["mm_inputs"] and data[0]["images"] == []
    assert data[1]["mm_inputs"].tensors()["image_grid_thw"].shape == (2, 3)


def test_palette_gray_and_transparent_images_are_made_rgb_first(tmp_path, vision):
    for mode in ("P", "L", "RGBA"):
        path = write_parquet(tmp_path / f"{mode}.parquet", [row(mode=mode)])
        (image,) = dataset(path, vision)[0]["images"]
        assert image.mode == "RGB"


def test_template_is_set_around_the_problem(tmp_path, vision):
    template = tmp_path / "t.jinja"
    template.write_text("{{ content | trim }}\n\nThink first.")
    path = write_parquet(tmp_path / "a.parquet", [row("  <image>Add.  ")])
    item = dataset(path, vision, format_prompt=str(template))[0]
    assert item["problem"] == "<image>Add.\n\nThink first."
    assert "Think first.<|im_end|>" in vision.tokenizer.decode(item["prompt_ids"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ content ", "is not a valid template"),
        ("Think.", "does not print the problem"),
        ("{{ x }}", "is not a valid template"),
    ],
)
def test_templates_that_are_none(tmp_path, vision, source, message):
    template = tmp_path / "t.jinja"
    template.write_text(source)
    path = write_parquet(tmp_path / "a.parquet", [row()])
    with pytest.raises(ValueError, match=f"data.format_prompt='.*t.jinja' {message}"):
        dataset(path, vision, format_prompt=str(template))


@pytest.mark.parametrize("bad", [row("<image><image>Add."), row("Add.", images=1), row("<image>Add.", images=0)])
def test_markers_and_images_that_disagree_stop_at_once_naming_file_and_row(tmp_path, vision, bad):
    first = write_parquet(tmp_path / "a.parquet", [row()])
    second = write_parquet(tmp_path / "b.parquet", [row(), row(), bad])
    with pytest.raises(ValueError, match=r"b.parquet', row 2: the problem has \d <image> marker\(s\) and the row has"):
        dataset(f"{first},{second}", vision)


def test_an_image_token_written_into_the_text_is_refused(tmp_path, vision):
    path = write_parquet(tmp_path / "a.parquet", [row("What is <|image_pad|>?", images=0)])
    with pytest.raises(ValueError, match="row 0: .*the text itself holds an image token"):
        dataset(path, vision)[0]


def test_an_empty_problem_names_file_and_row(tmp_path, vision):
    with pytest.raises(ValueError, match="a.parquet', row 1: column 'problem' is empty"):
        dataset(write_parquet(tmp_path / "a.parquet", [row(), row("  ", images=0)]), vision)
    with pytest.raises(ValueError, match="a.parquet', row 1: column 'answer' is empty"):
        dataset(write_parquet(tmp_path / "a.parquet", [row(), row(answer=None)]), vision)


@pytest.mark.parametrize("reference", ["/nowhere/train.parquet", "./nowhere", "nowhere.jsonl", "a/b/c"])
def test_mistyped_paths_are_named(vision, reference):
    with pytest.raises(FileNotFoundError, match="data.train_files: there is no file or folder"):
        dataset(reference, vision)


def test_a_file_that_is_no_parquet_is_named(tmp_path, vision):
    (tmp_path / "broken.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match="data.train_files: '.*broken.parquet' cannot be read as parquet"):
        dataset(tmp_path / "broken.parquet", vision)


def test_a_missing_column_is_named_with_the_columns_there_are(tmp_path, vision):
    path = write_parquet(tmp_path / "a.parquet", [row()])
    with pytest.raises(ValueError, match=r"no column 'question' \(data.prompt_key\).*'problem'"):
        dataset(path, vision, prompt_key="question")


def test_a_broken_image_names_its_row(tmp_path, vision):
    bad = row()
    bad["images"][0]["bytes"] = b"no image"
    path = write_parquet(tmp_path / "a.parquet", [row(), bad])
    with pytest.raises(ValueError, match="a.parquet', row 1: an image of 8 bytes cannot be read"):
        dataset(path, vision, filter_overlong_prompts=False)[1]
    with pytest.raises(ValueError, match="a.parquet', row 1: an image of 8 bytes cannot be read"):
        dataset(path, vision)


def test_overlong_prompts_are_dropped_with_a_report_or_refused(tmp_path, vision, caplog):
    path = write_parquet(tmp_path / "a.parquet", [row(), row("<image>" + "Add the digits. " * 200)])
    with caplog.at_level("WARNING", logger="verl"):
        assert len(dataset(path, vision)) == 1
    assert "1 of 2 prompts are longer than data.max_prompt_length=256" in caplog.text and "row 1" in caplog.text
    with pytest.raises(ValueError, match="row 1: the prompt has .* tokens, more than data.max_prompt_length=256"):
        dataset(path, vision, filter_overlong_prompts=False)[1]


def test_counted_prompt_length_is_that_of_the_processor(tmp_path, vision):
    rows = [row("<image> <image> add", images=2, width=w, height=h) for w, h in ((28, 28), (99, 41), (400, 33))]
    data = dataset(write_parquet(tmp_path / "a.parquet", [*rows, row("2+2?", images=0)]), vision)
    counted = prompt_lengths(data.rows, vision)
    assert counted.tolist() == [len(data[index]["prompt_ids"]) for index in range(len(data))]


def test_prompts_are_padded_on_the_left(tmp_path, vision):
    data = dataset(write_parquet(tmp_path / "a.parquet", [row(), row("<image>" + "Add. " * 9)]), vision)
    batch = PromptCollator(vision.special.pad)([data[0], data[1]])
    assert batch["prompt_mask"][0].tolist() == sorted(batch["prompt_mask"][0].tolist())
    assert torch.equal(batch["prompt_ids"][0][batch["prompt_mask"][0].bool()], data[0]["prompt_ids"])


def loader_of(vision, path, seed=1, batch=4):
    return train_loader(dataset(path, vision), batch, True, seed, 0, PromptCollator(vision.special.pad))


def test_loader_shuffles_by_seed_and_epoch_and_resumes_in_the_middle(tmp_path, vision):
    path = write_parquet(tmp_path / "a.parquet", [row(answer=str(i)) for i in range(18)])

    def order(loader, epoch):
        loader.sampler.set_epoch(epoch)
        return [list(b["answer"]) for b in loader]

    first, again = order(loader_of(vision, path), 0), order(loader_of(vision, path), 0)
    assert first == again and len(first) == 4  # the incomplete fifth batch is left out
    assert order(loader_of(vision, path), 1) != first and order(loader_of(vision, path, seed=2), 0) != first

    started = loader_of(vision, path)
    started.sampler.set_epoch(0)
    iterator = iter(started)
    head = [list(next(iterator)["answer"]) for _ in range(2)]
    resumed = loader_of(vision, path)
    resumed.sampler.set_epoch(0)
    resumed.load_state_dict(started.state_dict())
    assert head + [list(b["answer"]) for b in resumed] == first


def test_loader_processes_give_the_same_batches(tmp_path, vision):
    data = dataset(write_parquet(tmp_path / "a.parquet", [row(answer=str(i)) for i in range(9)]), vision)
    collator = PromptCollator(vision.special.pad)
    here, beside = (list(train_loader(data, 4, True, 1, workers, collator)) for workers in (0, 2))
    for first, second in zip(here, beside, strict=True):
        assert first["uid"].tolist() == second["uid"].tolist()
        assert torch.equal(first["prompt_ids"], second["prompt_ids"])
        assert torch.equal(
            first["mm_inputs"][0].tensors()["pixel_values"], second["mm_inputs"][0].tensors()["pixel_values"]
        )


def test_a_name_that_neither_disk_nor_hub_knows_is_named(vision):
    with pytest.raises(ValueError, match="data.train_files='someone/nothing@train' is no file or folder here"):
        dataset("someone/nothing@train", vision)


def test_fewer_prompts_than_a_step_are_refused(tmp_path, vision):
    with pytest.raises(ValueError, match="has 2 prompts, fewer than one step takes .data.rollout_batch_size=4."):
        loader_of(vision, write_parquet(tmp_path / "a.parquet", [row(), row()]))
