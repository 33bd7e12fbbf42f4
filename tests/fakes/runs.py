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


def two_steps(assets: Path, output: Path) -> list[str]:
    """Overrides for two tiny steps."""
    return [
        f"data.train_files={assets / 'train.parquet'}",
        f"data.val_files={assets / 'val.parquet'}",
        f"worker.actor.model.model_path={assets / 'model'}",
        f"trainer.output_dir={output}",
        "data.rollout_batch_size=4",
        "worker.actor.global_batch_size=2",
        "worker.rollout.n=3",
        "trainer.max_steps=2",
    ]


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(
    assets: Path, output: Path, *overrides: str, env: dict | None = None, within: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run two tiny steps; `within` is a command that runs the command."""
    return subprocess.run(
        [*(within or []), *command(*two_steps(assets, output), *overrides)],
        cwd=REPOSITORY,
        env={**os.environ, **ENVIRONMENT, **(env or {})},
        capture_output=True,
        text=True,
        timeout=600,
    )


def launch(assets: Path, output: Path, log: Path, *overrides: str) -> subprocess.Popen:
    """As `start`, and do not wait for it; what it says goes to the end of `log`."""
    with open(log, "ab") as file:
        return subprocess.Popen(
            command(*two_steps(assets, output), *overrides),
            cwd=REPOSITORY,
            env={**os.environ, **ENVIRONMENT},
            stdout=file,
            stderr=file,
        )


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(run: Path) -> list[dict]:
    """metrics.jsonl without what is measured in seconds."""
    return [{k: v for k, v in r.items() if not k.startswith(TIMINGS)} for r in records(run / "metrics.jsonl")]


# An untrained model is never right, so a coin decides which response is.
REWARD = """
import hashlib

def score(inputs):
    def coin(i):
        return hashlib.md5((i["response"] + i["ground_truth"]).encode()).digest()[0] % 2
    return [{"overall": float(coin(i)), "accuracy": float(coin(i))} for i in inputs]
"""
