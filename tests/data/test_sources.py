"""Shapes of public data sets, made by hand; several files, with weights; Arrow folders."""

from __future__ import annotations

import base64
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from datasets import Image as ImageFeature
from PIL import Image as Picture

from tests.fakes.rows import png, row, write_parquet
from verl.config.data import DataConfig
from verl.data.collate import PromptCollator
from verl.data.dataset import PromptDataset
from verl.data.loader import train_loader, validation_loader
from verl.data.vision import VisionProcessor


@pytest.fixture(scope="module")
def vision(assets):
    return VisionProcessor(str(assets / "model"), min_pixels=784, max_pixels=12544)


def dataset(reference, vision, **options) -> PromptDataset:
    config = DataConfig(**{"max_prompt_length": 256, **options})
    return PromptDataset(str(reference), "data.train_files", config, vision)


def grids(item) -> list[list[int]]:
    return item["mm_inputs"].tensors()["image_grid_thw"].tolist() if item["mm_inputs"] else []


def picture(width: int = 56, height: int = 28) -> Picture.Image:
    return Picture.new("RGB", (width, height), (200, 30, 90))


def test_papo_virl39k_and_mmk12(tmp_path, vision):
    """`images` as a list of {bytes, path}, with or without an id."""
    rows = [row(answer="A"), row("<image> or <image>?", images=2, answer="\\frac{1}{2}"), row("1+1?", images=0)]
    data = dataset(write_parquet(tmp_path / "train.parquet", rows), vision)
    assert [len(grids(data[i])) for i in range(3)] == [1, 2, 0]
    assert [data[i]["answer"] for i in range(3)] == ["A", "\\frac{1}{2}", "7"]
    numbered = [{"id": f"q{i}", **r} for i, r in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(numbered), tmp_path / "numbered.parquet")
    again = dataset(tmp_path / "numbered.parquet", vision)
    assert [again[i]["prompt_ids"].tolist() for i in range(3)] == [data[i]["prompt_ids"].tolist() for i in range(3)]


def test_geometry3k_whose_images_are_an_image_feature(tmp_path, vision):
    features = Features({"images": List(Image()), "problem": Value("string"), "answer": Value("string")})
    made = Dataset.from_dict(
        {"images": [[picture()], [picture(84)]], "problem": ["<image>Find x."] * 2, "answer": ["1", "2"]}, features
    )
    made.to_parquet(tmp_path / "train.parquet")
    data = dataset(tmp_path / "train.parquet", vision)
    assert [grids(data[i]) for i in range(2)] == [[[1, 2, 4]], [[1, 2, 6]]]
    mixed = dataset(f"{tmp_path / 'train.parquet'},{write_parquet(tmp_path / 'b.parquet', [row()])}", vision)
    assert grids(mixed[2]) == [[1, 2, 4]] and mixed[2]["uid"].endswith("b.parquet:0")


def test_clevr_count_with_one_image_in_a_column_and_no_marker(tmp_path, vision):
    """The template writes the marker that the rows lack."""
    features = Features({"image": ImageFeature(), "question": Value("string"), "count": Value("int64")})
    made = Dataset.from_dict({"image": [picture()] * 2, "question": ["How many?"] * 2, "count": [3, 10]}, features)
    made.to_parquet(tmp_path / "train.parquet")
    columns = {"image_key": "image", "prompt_key": "question", "answer_key": "count"}
    with pytest.raises(ValueError, match=r"row 0: the problem has 0 <image> .* 1 image.*1 more row.s. at fault"):
        dataset(tmp_path / "train.parquet", vision, **columns)
    (tmp_path / "t.jinja").write_text("<image>{{ content }}")
    data = dataset(tmp_path / "train.parquet", vision, format_prompt=str(tmp_path / "t.jinja"), **columns)
    assert data[1]["problem"] == "<image>How many?" and data[1]["answer"] == "10" and len(grids(data[1])) == 1


def test_base64_and_paths_in_jsonl(tmp_path, vision):
    (tmp_path / "a.png").write_bytes(png())
    text = base64.b64encode(png()).decode()
    images = ["a.png", text, f"data:image/png;base64,{text}"]
    lines = [{"images": [image], "problem": "<image>?", "answer": 7} for image in images]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = dataset(tmp_path / "a.jsonl", vision, image_dir=str(tmp_path))
    assert all(data[i]["prompt_ids"].tolist() == data[0]["prompt_ids"].tolist() for i in range(3))
    assert data[0]["answer"] == "7"


def test_text_files_beside_image_files_and_numbers_beside_letters(tmp_path, vision):
    (tmp_path / "text.jsonl").write_text(json.dumps({"problem": "1+1?", "answer": 2, "level": 5}))
    (tmp_path / "empty.jsonl").write_text(json.dumps({"problem": "1+2?", "answer": "C", "images": [], "level": "x"}))
    images = write_parquet(tmp_path / "a.parquet", [row()])
    data = dataset(f"{tmp_path / 'text.jsonl'},{images},{tmp_path / 'empty.jsonl'}", vision)
    assert [(data[i]["answer"], len(grids(data[i]))) for i in range(3)] == [("2", 0), ("7", 1), ("C", 0)]


def test_arrow_files_and_folders_of_save_to_disk(tmp_path, vision):
    made = Dataset.from_list([row(answer="1"), row(answer="2"), row(answer="3")])
    made.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": made, "test": made.select([2])}).save_to_disk(tmp_path / "splits")
    assert [dataset(tmp_path / "saved", vision)[i]["answer"] for i in range(3)] == ["1", "2", "3"]
    test = dataset(f"{tmp_path / 'splits'}@test", vision)
    assert len(test) == 1 and test[0]["answer"] == "3"
    with pytest.raises(ValueError, match="data.train_files: the folder '.*splits@dev', which .*does not load: .*dev"):
        dataset(f"{tmp_path / 'splits'}@dev", vision)
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    assert len(dataset(arrow, vision)) == 3


@pytest.fixture
def two_files(tmp_path):
    first = [row(answer=f"a{i}") for i in range(8)]
    second = [row(answer=f"b{i}") for i in range(4)]
    return write_parquet(tmp_path / "a.parquet", first), write_parquet(tmp_path / "b.parquet", second)


def epoch_of(loader, epoch: int) -> list[str]:
    loader.sampler.set_epoch(epoch)
    return [uid.rsplit("/", 1)[1] for batch in loader for uid in batch["uid"]]


def weighted(two_files, vision, weights=(0.5, 2.5), seed=1):
    reference = f"{two_files[0]}*{weights[0]}, {two_files[1]}*{weights[1]}"
    return train_loader(dataset(reference, vision), 2, True, seed, 0, PromptCollator(vision.special.pad))


def test_weights_take_turns_and_repeat_by_seed(two_files, vision):
    loader = weighted(two_files, vision)
    epochs = [epoch_of(loader, epoch) for epoch in range(4)]
    for uids in epochs:
        assert len(uids) == len(set(uids)) == 4 + 10
        assert sum(uid.startswith("a.parquet") for uid in uids) == 4
    halves = [{uid for uid in uids if uid.startswith("a")} for uids in epochs]
    assert halves[0] | halves[1] == halves[2] | halves[3] == {f"a.parquet:{i}" for i in range(8)}
    thirds = [{uid for uid in uids if uid.endswith("#2")} for uids in epochs[:2]]
    assert thirds[0] | thirds[1] == {f"b.parquet:{i}#2" for i in range(4)}
    again = weighted(two_files, vision)
    assert [epoch_of(again, epoch) for epoch in range(4)] == epochs
    assert epoch_of(weighted(two_files, vision, seed=2), 0) != epochs[0]


def test_a_weighted_epoch_resumes_in_its_middle(two_files, vision):
    whole = epoch_of(weighted(two_files, vision), 1)
    started = weighted(two_files, vision)
    started.sampler.set_epoch(1)
    iterator = iter(started)
    head = [uid.rsplit("/", 1)[1] for _ in range(3) for uid in next(iterator)["uid"]]
    resumed = weighted(two_files, vision)
    resumed.load_state_dict(started.state_dict())
    assert head + epoch_of(resumed, 1) == whole


def test_copies_of_a_row_are_the_same_prompt_under_another_name(two_files, vision):
    data = dataset(f"{two_files[0]}*2", vision)
    first, copy = data[3], data[3 + len(data)]
    assert copy["uid"] == first["uid"] + "#1" and copy["prompt_ids"].tolist() == first["prompt_ids"].tolist()


def test_weights_count_rows_that_the_filter_has_left(tmp_path, vision):
    long = row("<image>" + "Add the digits. " * 200)
    path = write_parquet(tmp_path / "a.parquet", [long, row(), row(), long, row(), row()])
    loader = train_loader(dataset(f"{path}*0.5", vision), 2, True, 1, 0, PromptCollator(0))
    assert len(loader) == 1 and {uid.rsplit(":", 1)[1] for uid in next(iter(loader))["uid"]} <= set("1245")


def test_weights_that_make_no_sense(two_files, vision):
    with pytest.raises(ValueError, match=r"a.parquet\*0' has the weight 0; leave it out"):
        dataset(f"{two_files[0]}*0", vision)
    with pytest.raises(ValueError, match="data.val_files: every prompt is validated once"):
        validation_loader(dataset(f"{two_files[0]}*2", vision), 2, 0, PromptCollator(0))
    with pytest.raises(ValueError, match="has 2 prompts, fewer than one step takes"):
        train_loader(dataset(f"{two_files[0]}*.25", vision), 4, True, 1, 0, PromptCollator(0))
