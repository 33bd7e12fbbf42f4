"""A run as a user starts it, small; and what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY

TIMINGS = ("timing_s/", "perf/")


def command(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "verl.trainer.main", "--config-name", "quickstart", *overrides]


def start(
    assets: Path, output: Path, *overrides: str, env: dict | None = None, within: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run two tiny steps; `within` is a command that runs the command."""
    paths = [
        f"data.train_files={assets / 'train.parquet'}",
        f"data.val_files={assets / 'val.parquet'}",
        f"worker.actor.model.model_path={assets / 'model'}",
        f"trainer.output_dir={output}",
    ]
    sizes = [
        "data.rollout_batch_size=4",
        "worker.actor.global_batch_size=2",
        "worker.rollout.n=3",
        "trainer.max_steps=2",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})}
    return subprocess.run(
        [*(within or []), *command(*paths, *sizes, *overrides)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# An untrained model is never right, so a coin decides which response is.
REWARD = """
import hashlib

def score(inputs):
    def coin(i):
        return hashlib.md5((i["response"] + i["ground_truth"]).encode()).digest()[0] % 2
    return [{"overall": float(coin(i)), "accuracy": float(coin(i))} for i in inputs]
"""
