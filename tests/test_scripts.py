"""Shell scripts parse, are strict, and the SLURM launcher does what it says with SLURM and Ray replaced."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.fakes.pins import setup_values

SCRIPTS = sorted([*REPOSITORY.glob("scripts/*.sh"), *REPOSITORY.glob("examples/**/*.sh"), REPOSITORY / ".ci/run"])

# There is no SLURM here. A node is a name, and Ray a file with a line for each node that it was started on.
COMMANDS = {
    "scontrol": "echo node1; echo node2; echo node3",
    "srun": """
        for argument; do
            case "$argument" in
                --nodelist=*) export NODE="${argument#*=}"; shift ;;
                --*) shift ;;
                *) break ;;
            esac
        done
        exec "$@"
    """,
    "hostname": "echo 10.0.0.1 10.1.0.1",
    "ray": """
        [ "$NODE" != "${BROKEN_NODE:-}" ] || exit 1
        echo "$NODE $* token=${#RAY_AUTH_TOKEN} mode=$RAY_AUTH_MODE" >>"$LOG/started"
        trap 'echo "$NODE" >>"$LOG/stopped"; exit 0' TERM
        while true; do sleep 0.1; done
    """,
    "python": f"""
        case "$*" in
            *ray.init*) if [ -n "${{ONLY_HEAD_JOINS:-}}" ]; then echo 1; else cat "$LOG"/started | wc -l; fi ;;
            *) exec {sys.executable} "$@" ;;
        esac
    """,
    "train": 'echo "$NODE $RAY_ADDRESS $*" >>"$LOG/trained"; exit "${TRAIN_CODE:-0}"',
}  # fmt: skip


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_scripts_parse_and_are_strict(path):
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)


def submit(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run examples/slurm.sh as the batch script of a job of three nodes."""
    commands = folder / "bin"
    commands.mkdir()
    for name, source in COMMANDS.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{source}\n")
        (commands / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[1-3]", "SLURM_SUBMIT_DIR": str(folder), "LOG": str(folder)}
    return subprocess.run(
        ["bash", REPOSITORY / "examples/slurm.sh", *command],
        env={"PATH": f"{commands}:{os.environ['PATH']}", **job, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.mark.parametrize("code", [0, 3])
def test_slurm_starts_ray_everywhere_trains_on_the_first_node_and_stops_ray(tmp_path, code):
    done = submit(tmp_path, "train", "a=b c", TRAIN_CODE=str(code))
    assert done.returncode == code, done.stderr
    head, *others = lines(tmp_path / "started")
    assert head.startswith("node1 start --block --head --node-ip-address=10.0.0.1 --port=6379")
    assert [line.split(" token")[0] for line in sorted(others)] == [
        f"node{number} start --block --address=10.0.0.1:6379" for number in (2, 3)
    ]
    assert all(line.endswith("token=64 mode=token") for line in (head, *others))
    assert lines(tmp_path / "trained") == ["node1 10.0.0.1:6379 a=b c"]
    assert sorted(lines(tmp_path / "stopped")) == ["node1", "node2", "node3"]


def test_slurm_says_what_is_wrong(tmp_path):
    for name, command, environment, message in (
        ("a", [], {}, "no command was given"),
        ("b", ["train"], {"SLURM_JOB_NODELIST": ""}, "this is no SLURM job: submit it with sbatch"),
        ("c", ["train"], {"BROKEN_NODE": "node1", "START_TIMEOUT_S": "20"}, "Ray has ended on a node"),
    ):
        (tmp_path / name).mkdir()
        done = submit(tmp_path / name, *command, **environment)
        assert done.returncode == 1 and f"[slurm] ERROR: {message}" in done.stderr, name
        assert not (tmp_path / name / "trained").exists()


def test_a_node_that_does_not_join_in_time_is_an_error_and_ray_is_stopped(tmp_path):
    done = submit(tmp_path, "train", HEAD_IP="10.9.9.9", RAY_PORT="7000", START_TIMEOUT_S="1", ONLY_HEAD_JOINS="yes")
    assert done.returncode == 1 and not (tmp_path / "trained").exists()
    assert "after 1 s (START_TIMEOUT_S) not all of 3 node(s) have joined Ray at 10.9.9.9:7000" in done.stderr
    assert sorted(lines(tmp_path / "stopped")) == ["node1", "node2", "node3"]


def test_pre_commit_runs_the_tools_that_setup_py_names():
    config = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert [hook["entry"].split()[:2] for hook in hooks] == [["ruff", "check"], ["ruff", "format"]]
    assert all(hook["language"] == "system" for hook in hooks)
    tools = {requirement.split(">=")[0] for requirement in setup_values()["EXTRAS"]["dev"]}
    assert {"ruff", "pre-commit"} == tools
