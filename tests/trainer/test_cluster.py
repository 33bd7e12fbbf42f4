"""Real Ray clusters of two nodes on this machine: one raylet each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import yaml
from ray.cluster_utils import Cluster

from tests.conftest import REPOSITORY
from tests.fakes.runs import free_port, records, start
from verl.config.compose import compose_config
from verl.single_controller.preflight import ClusterError, place_ranks
from verl.single_controller.resources import plan_layout

pytestmark = pytest.mark.run

SMALL = ("trainer.nnodes=2", "trainer.n_gpus_per_node=1", "worker.rollout.name=hf")
NO_VALIDATION = ("trainer.val_before_train=false", "trainer.val_after_train=false", "trainer.val_freq=0")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes with one CPU each: two ranks, each of which takes one, cannot share a node."""
    # Ray's agent, which takes jobs, has the same port in every cluster: another one may be on this machine.
    head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": 0, "dashboard_agent_listen_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1, dashboard_agent_listen_port=free_port())
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


def test_what_a_cluster_lacks_is_said_in_one_line(cluster, assets, tmp_path):
    three = ("trainer.nnodes=3", "trainer.n_gpus_per_node=1", "trainer.cluster_timeout_s=2", *NO_VALIDATION)
    done = start(assets, tmp_path / "run", *three, env={"RAY_ADDRESS": cluster.address})
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: the run needs 3 node(s) with 3 CPU(s) in all")
    assert "1 node(s) have not joined: run `ray start --address=HEAD:6379`" in line


def test_a_cluster_that_is_large_enough_and_taken_is_told_from_one_that_is_too_small(cluster, assets, monkeypatch):
    monkeypatch.setattr("verl.single_controller.preflight.RESERVE_S", 2.0)
    config = compose_config("quickstart", ["trainer.nnodes=2", "trainer.n_gpus_per_node=1", "trainer.device=cpu"])
    layout = plan_layout(config.trainer, config.worker.rollout)
    ray.init(address=cluster.address, logging_level="ERROR")
    try:
        group = place_ranks(layout, nnodes=2, timeout_s=20)
        nodes = {n for n in ray.util.placement_group_table(group)["bundles_to_node_id"].values()}
        assert len(nodes) == 2
        with pytest.raises(ClusterError, match="has them, but not free: 0 GPU.s. and 0 CPU"):
            place_ranks(layout, nnodes=2, timeout_s=2)
        ray.util.remove_placement_group(group)
        config.trainer.n_gpus_per_node = 2
        layout = plan_layout(config.trainer, config.worker.rollout)
        with pytest.raises(ClusterError, match="needs 2 node.s. with 4 CPU.*set trainer.n_gpus_per_node"):
            place_ranks(layout, nnodes=2, timeout_s=0)
    finally:
        ray.shutdown()


def test_a_run_over_two_nodes_by_ray_job_submit(cluster, assets, tmp_path):
    """The command of examples/README.md, with the example's runtime environment."""
    environment = yaml.safe_load((REPOSITORY / "examples" / "runtime_env.yaml").read_text())
    file = tmp_path / "runtime_env.yaml"  # the same without its working folder: this one is not packed and sent
    file.write_text(yaml.safe_dump({k: v for k, v in environment.items() if k != "working_dir"}))
    address = f"http://{cluster.head_node.webui_url}"
    overrides = [
        f"data.train_files={assets / 'train.parquet'}",
        "data.val_files=null",
        f"worker.actor.model.model_path={assets / 'model'}",
        f"trainer.output_dir={tmp_path / 'run'}",
        *("data.rollout_batch_size=4", "worker.actor.global_batch_size=2", "worker.rollout.n=3"),
        *("trainer.max_steps=2", *SMALL, *NO_VALIDATION),
    ]
    training = [sys.executable, "-m", "verl.trainer.main", "--config-name", "quickstart", *overrides]
    ray_command = str(Path(sys.executable).with_name("ray"))
    submit = [ray_command, "job", "submit", "--address", address, "--runtime-env", str(file), "--"]
    folder = f"cd {REPOSITORY} && "
    quoted = ["bash", "-c", folder + " ".join(f"'{word}'" for word in training)]
    done = subprocess.run(
        submit + quoted, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "NO_COLOR": "1"}
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "the run needs 2 node(s) with 2 CPU(s) in all" in done.stdout + done.stderr
    steps = records(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in steps] == [1, 2] and (tmp_path / "run" / "model" / "config.json").is_file()
    assert steps[1]["rollout/log_prob_diff_max"] < 1e-3  # the second node's engine, if it is there, has the weights
