"""The quickstart's model and data in small: untrained weights, a few rows."""

from __future__ import annotations

import shutil
from pathlib import Path

from papo.quickstart.digits import DigitsSettings, build_data
from papo.quickstart.tiny_vlm import build_model

CORPUS = [
    f"<think>{a}+{b}</think>\\boxed{{{a + b}}} Add the digits. user assistant" for a in range(10) for b in range(10)
]


def make_assets(folder: Path) -> Path:
    settings = DigitsSettings(sft_images=20, sft_rows=8, train_images=200, train_rows=24, val_rows=6)
    paths = build_data(folder / "data", settings=settings)
    shutil.copy(paths / "train.parquet", folder / "train.parquet")
    shutil.copy(paths / "val.parquet", folder / "val.parquet")
    build_model(folder / "model", CORPUS, seed=3)
    return folder
