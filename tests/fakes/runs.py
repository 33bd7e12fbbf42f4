"""A run as a user starts it, small; and what it leaves."""

from __future__ import annotations

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from ray.cluster_utils import Cluster

from tests.conftest import REPOSITORY
from tests.fakes.warm import ray_uses_it, warm_python

TIMINGS = ("timing_s/", "perf/")


def command(*overrides: str, cold: bool = False) -> list[str]:
    """What a user types, in a warm process (tests/fakes/warm.py) unless `cold`."""
    python = [sys.executable] if cold else warm_python()
    return [*python, "-m", "verl.trainer.main", "--config-name", "quickstart", *overrides]


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


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@functools.cache
def shared_cluster() -> str:
    """The address of a Ray cluster that the runs of a test session join one after the other: to start one for each
    takes as long as a small run."""
    cluster = Cluster(
        initialize_head=True,
        # Ray's agent has the same port in every cluster: another one may be on this machine.
        head_node_args={"num_cpus": 2, "include_dashboard": False, "dashboard_agent_listen_port": free_port()},
    )
    atexit.register(cluster.shutdown)
    return cluster.address


def start(
    assets: Path,
    output: Path,
    *overrides: str,
    env: dict | None = None,
    within: list[str] | None = None,
    cold: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run two tiny steps; `within` is a command that runs the command. A cold run is exactly what a user starts; one
    within another command is always cold."""
    environment = {**os.environ, **ENVIRONMENT, **(env or {})}
    cold = cold or within is not None
    if not cold:
        environment |= dict([ray_uses_it()])
        if "RAY_ADDRESS" not in environment:
            environment["RAY_ADDRESS"] = shared_cluster()
    elif "RAY_ADDRESS" not in environment:
        del environment["RAY_AUTH_MODE"]
    return subprocess.run(
        [*(within or []), *command(*two_steps(assets, output), *overrides, cold=cold)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def launch(assets: Path, output: Path, log: Path, *overrides: str, own_ray: bool = False) -> subprocess.Popen:
    """As `start`, and do not wait for it; what it says goes to the end of `log`."""
    joined = {} if own_ray else {"RAY_ADDRESS": shared_cluster()}
    with open(log, "ab") as file:
        return subprocess.Popen(
            command(*two_steps(assets, output), *overrides),
            cwd=REPOSITORY,
            env={**os.environ, **ENVIRONMENT, **dict([ray_uses_it()]), **joined},
            stdout=file,
            stderr=file,
        )


def records(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:  # splitlines() would also split at what a response may hold
        return [json.loads(line) for line in file]


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

# How right a response is, drawn from it. Next to no group of responses has a mean that the filter drops.
PARTIAL = """
import hashlib

def score(inputs):
    parts = [hashlib.md5((i["response"] + i["ground_truth"]).encode()).digest()[0] / 255 for i in inputs]
    return [{"overall": part, "accuracy": part} for part in parts]
"""
