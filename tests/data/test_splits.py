"""A dataset folder gives the rows that its name on the hub gives, and never those of another split."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from datasets import load_dataset_builder

from tests.fakes.rows import png, row, write_parquet
from verl.data.files import LOADERS, open_rows
from verl.data.splits import split_files

COLUMNS = {"problem": "data.prompt_key", "answer": "data.answer_key"}
CARD = "---\nconfigs:\n{}---\nA dataset.\n"
DECLARED = "- config_name: {}\n  data_files:\n  - split: train\n    path: {}\n  - split: test\n    path: {}\n"

# Files, and the README's configs; the oracle is `datasets` itself.
LAYOUTS = {
    "shards": ("data/train-00000-of-00002 data/train-00001-of-00002 data/test-00000-of-00001", ""),
    "own split names": ("data/easy-00000-of-00001 data/train-00000-of-00001", ""),
    "names": ("train test validation", ""),
    "words in names": ("geo_train geo_test my-dev-set extra", ""),
    "latest is no test": ("latest contest", ""),
    "folders": ("train/a train/b test/a", ""),
    "folders before names": ("train/test_a test/train_b", ""),
    "numbered": ("part.0 part.1", ""),
    "nested": ("raw/2024/training.set raw/2024/eval.set", ""),
    "declared": ("a b c", DECLARED.format("default", "[a.parquet, b.parquet]", "c.parquet")),
    "declared against the names": ("test train", DECLARED.format("main", "test.parquet", "train*")),
    "the default of two": (
        "a b c d",
        DECLARED.format("other", "a.parquet", "b.parquet") + DECLARED.format("default", "c.parquet", "d.parquet"),
    ),
}


def make(folder: Path, names: str, configs: str) -> Path:
    for name in names.split():
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(path, [row(answer=name)])
    if configs:
        (folder / "README.md").write_text(CARD.format(configs))
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_split_has_the_files_that_datasets_gives_it(layout, tmp_path):
    folder = make(tmp_path / "set", *LAYOUTS[layout])
    expected = load_dataset_builder(str(folder), cache_dir=str(tmp_path / "cache")).config.data_files
    found = split_files(str(folder), list(LOADERS))
    assert found == {str(split): sorted(map(str, files)) for split, files in expected.items()}


def test_a_folder_trains_on_its_train_split_alone_and_the_log_says_so(tmp_path, caplog):
    folder = make(tmp_path / "set", "train test validation", "")
    with caplog.at_level(logging.INFO, logger="verl"):
        rows = open_rows(str(folder), "data.train_files", COLUMNS)
    assert rows.dataset["answer"][:] == ["train"]
    assert f"split 'train' of {folder} is train.parquet (others: test, validation)" in caplog.text
    assert open_rows(f"{folder}@test", "data.val_files", COLUMNS).dataset["answer"][:] == ["test"]


def test_pictures_beside_the_rows_are_no_rows(tmp_path):
    (tmp_path / "images/train").mkdir(parents=True)
    for number in range(3):
        (tmp_path / f"images/train/{number}.png").write_bytes(png())
    (tmp_path / "questions.jsonl").write_text(json.dumps({"problem": "<image>?", "answer": 7}))
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert split_files(str(tmp_path), list(LOADERS)) == {"train": [str(tmp_path / "questions.jsonl")]}


def test_a_split_that_is_not_there_is_named(tmp_path):
    folder = make(tmp_path / "set", "test a_validation", "")
    with pytest.raises(ValueError, match=r"no split 'train' .* has validation \(1 file.*, test \(1 file"):
        open_rows(str(folder), "data.train_files", COLUMNS)
    with pytest.raises(ValueError, match="asks for a split of a file, which has none"):
        open_rows(f"{folder / 'test.parquet'}@test", "data.train_files", COLUMNS)
    two = DECLARED.format("a", "test.parquet", "x") + DECLARED.format("b", "test.parquet", "x")
    (folder / "README.md").write_text(CARD.format(two))
    with pytest.raises(ValueError, match="README.md has the configs a, b, none of them the default"):
        open_rows(str(folder), "data.train_files", COLUMNS)
    (folder / "README.md").write_text(CARD.format(DECLARED.format("a", "gone.parquet", "test.parquet")))
    with pytest.raises(ValueError, match="data.train_files='.*gone.parquet"):
        open_rows(str(folder), "data.train_files", COLUMNS)


def test_a_file_that_is_named_twice_is_refused(tmp_path):
    """Its rows would have the same names, and so the same seeds and the same responses."""
    folder = make(tmp_path / "set", "train", "")
    for again in (folder, folder / "train.parquet"):
        with pytest.raises(ValueError, match=r"'.*train.parquet' is named twice.*\*2' gives each row two sets"):
            open_rows(f"{folder / 'train.parquet'}, {again}", "data.train_files", COLUMNS)
