"""A tiny untrained Qwen2.5-VL and a little data, made once per session; nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _session() -> None:
    from verl.plugins import load_plugins

    torch.set_num_threads(1)
    load_plugins()


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/`, `train.parquet` and `val.parquet`, as the quickstart's, but small and untrained."""
    from tests.fakes.assets import make_assets

    return make_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture
def in_repository(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run where the presets' relative paths (templates, reward functions) lead somewhere."""
    monkeypatch.chdir(REPOSITORY)
    return REPOSITORY
