"""Counts the prompt tokens of the same rows by the filter's arithmetic and by the model's processor, in one run.

    python scripts/benchmark_filter.py --model DIR [--rows 100000] [--processor-rows 1000] [--width 280] [--workers N]

The rows are made here, a problem and an encoded picture each, in a temporary folder. The processor decodes every one,
as a filter that asks it for a length must; it gets the first rows only, and the lengths of both are compared.
"""

import argparse
import io
import logging
import os
import sys
import tempfile
import time
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from verl.config.data import DataConfig
from verl.data.checks import refuse, row_faults
from verl.data.overlong import count_prompts
from verl.data.rows import PromptRows
from verl.data.scan import scan
from verl.data.vision import VisionProcessor
from verl.utils.process import quiet_libraries

PICTURES = 64  # different ones
PROBLEM = "<image>In the picture, the triangle number {} has two equal sides. How large is the angle at its top?"


def make_rows(folder: str, count: int, width: int) -> str:
    """A parquet file of `count` rows with pictures about `width` pixels wide."""
    numbers = np.random.default_rng(0)
    pictures = []
    for _ in range(PICTURES):
        size = numbers.integers(width // 2, width + 1, 2)
        buffer = io.BytesIO()
        Image.fromarray(numbers.integers(0, 256, (*size, 3), dtype=np.uint8)).save(buffer, format="JPEG")
        pictures.append([{"bytes": buffer.getvalue(), "path": None}])
    path = os.path.join(folder, "rows.parquet")
    schema = pa.schema(
        [
            ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
            ("problem", pa.string()),
            ("answer", pa.string()),
        ]
    )
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, count, 10_000):
            part = range(start, min(start + 10_000, count))
            rows = [[pictures[i % PICTURES] for i in part], [PROBLEM.format(i) for i in part], ["7"] * len(part)]
            writer.write_table(
                pa.Table.from_arrays([pa.array(c, t.type) for c, t in zip(rows, schema, strict=True)], schema=schema)
            )
    return path


def by_processor(rows: PromptRows, vision: VisionProcessor, count: int) -> list[int]:
    """The tokens of the first `count` prompts, each picture decoded and processed."""
    lengths = []
    for index in tqdm(range(count), desc="by the processor", unit="row", leave=False):
        row = rows[index]
        lengths.append(
            len(vision.encode_prompt(vision.chat_text(rows.prompt_text(row)), rows.pictures(row))["prompt_ids"])
        )
    return lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or hub name; its weights are not loaded")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--processor-rows", type=int, default=1000)
    parser.add_argument("--width", type=int, default=280, help="of the widest picture, in pixels")
    parser.add_argument("--workers", type=int, help="processes of the filter (default: one per core)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    quiet_libraries()
    config = DataConfig(filter_overlong_prompts_workers=options.workers, seed=1)
    vision = VisionProcessor(options.model, config.min_pixels, config.max_pixels)
    with tempfile.TemporaryDirectory() as folder:
        rows = PromptRows(make_rows(folder, options.rows, options.width), "rows", config)
        start = time.perf_counter()
        refuse(rows, row_faults(rows, vision))
        checked = time.perf_counter() - start
        start = time.perf_counter()
        count = partial(count_prompts, rows, vision)
        counted = list(scan(rows, count, "by arithmetic", options.workers))
        filtered = time.perf_counter() - start
        start = time.perf_counter()
        expected = by_processor(rows, vision, min(options.processor_rows, options.rows))
        processed = time.perf_counter() - start
    if counted[: len(expected)] != expected:
        sys.exit("error: the two disagree about lengths")
    speeds = options.rows / filtered, len(expected) / processed
    processes = options.workers or len(os.sched_getaffinity(0))
    sys.stdout.write(
        f"{options.rows} rows, pictures of up to {options.width} pixels a side; {len(expected)} lengths compared, all "
        f"equal\nchecks of rows:  {checked:8.1f} s  {options.rows / checked:10.0f} rows/s, in one process\n"
        f"by arithmetic:   {filtered:8.1f} s  {speeds[0]:10.0f} rows/s, in {processes} process(es)\n"
        f"by processor:    {processed:8.1f} s  {speeds[1]:10.0f} rows/s, in one\n"
        f"arithmetic / processor: {speeds[0] / speeds[1]:.0f}x\n"
    )


if __name__ == "__main__":
    main()
