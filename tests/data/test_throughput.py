"""Speed, and what stays in memory: many rows, one copy of an image for all responses, few batches ahead."""

from __future__ import annotations

import mmap
import os
import pickle
import subprocess
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import REPOSITORY
from tests.fakes.rows import png, row, write_parquet
from tests.fakes.warm import warm_python
from verl.config.data import DataConfig
from verl.data.collate import PromptCollator
from verl.data.dataset import PromptDataset
from verl.data.loader import PREFETCHED, train_loader
from verl.data.vision import VisionProcessor
from verl.metrics.machine import host_memory

ROWS = 100_000


@pytest.fixture(scope="module")
def vision(assets):
    return VisionProcessor(str(assets / "model"), min_pixels=784, max_pixels=12544)


def test_a_hundred_thousand_rows_are_checked_and_filtered_within_a_minute_of_one_core(tmp_path, vision, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    pictures = [[{"bytes": png(28 + i, 84 - i), "path": None}] for i in range(50)]
    schema = pa.schema(
        [
            ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
            ("problem", pa.string()),
            ("answer", pa.string()),
        ]
    )
    problems = ["<image>In the picture, two digits are written side by side. How much is their sum?"] * (ROWS - 1)
    columns = [[pictures[i % 50] for i in range(ROWS)], [*problems, "<image>" + "Add. " * 400], ["7"] * ROWS]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), tmp_path / "a.parquet")
    config = DataConfig(filter_overlong_prompts_workers=1, max_prompt_length=400)
    started = time.process_time()  # of this process alone, which has no helpers here
    data = PromptDataset(str(tmp_path / "a.parquet"), "data.train_files", config, vision)
    assert time.process_time() - started < 60
    assert len(data) == ROWS - 1


class Recorder(PromptDataset):
    """Notes the process in which each item is made."""

    def __getitem__(self, item):
        folder = self.config.image_dir
        with open(os.path.join(folder, f"{item}.{os.getpid()}"), "w", encoding="utf-8"):
            return super().__getitem__(item)


def test_the_next_batches_are_made_by_loader_processes_meanwhile_and_no_more_than_those(tmp_path, vision):
    path, notes = write_parquet(tmp_path / "a.parquet", [row() for _ in range(40)]), tmp_path / "notes"
    notes.mkdir()
    data = Recorder(path, "k", DataConfig(image_dir=str(notes), max_prompt_length=200), vision)
    workers, size = 2, 4
    iterator = iter(train_loader(data, size, True, 1, workers, PromptCollator(vision.special.pad)))
    next(iterator)
    expected = size * (1 + workers * PREFETCHED)
    deadline = time.monotonic() + 120
    while len(list(notes.iterdir())) < expected and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)  # more than those would come now
    made = [file.name.split(".") for file in notes.iterdir()]
    assert len(made) == len({item for item, _ in made}) == expected  # each prompt once
    assert os.getpid() not in {int(pid) for _, pid in made}


def test_sixteen_responses_need_no_more_memory_for_images_than_one(assets):
    def peak(n: int) -> int:
        command = [*warm_python(), "-m", "tests.fakes.step_memory", str(assets / "model"), str(n)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
        assert not done.returncode, done.stderr
        return int(done.stdout)

    one, sixteen = peak(1), peak(16)
    assert one > 2 * 2 * 20  # MiB: two pictures of 1,000 pixels a side, and their masked views
    assert sixteen <= 1.3 * one


def test_the_message_to_a_rank_holds_an_image_once(tmp_path, vision):
    data = PromptDataset(write_parquet(tmp_path / "a.parquet", [row(width=112, height=112)]), "k", DataConfig(), vision)
    prompts = PromptCollator(vision.special.pad)([data[0], data[0]]).select(["prompt_ids", "mm_inputs"])
    sizes = {n: len(pickle.dumps(prompts.repeat_interleave(n))) for n in (1, 16)}
    pixels = prompts["mm_inputs"][0].tensors()["pixel_values"].nbytes
    assert 2 * pixels < sizes[1] and sizes[16] - sizes[1] < 0.3 * pixels


def test_memory_of_the_host_and_of_the_driver_are_reported():
    before = host_memory()
    ballast = mmap.mmap(-1, 200 << 20)  # not from the allocator, which may have as much left from earlier tests
    ballast[::1024] = b"x" * (200 << 10)  # in every page
    after = host_memory()
    grown = after["perf/driver_memory_gb"] - before["perf/driver_memory_gb"]
    assert 0.15 < grown < 0.3 and len(ballast) == 200 << 20
    assert after["perf/host_memory_gb"] > after["perf/driver_memory_gb"] > 0.2
