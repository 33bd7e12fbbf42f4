"""What the machine has, and how a run uses it: Ray, placement and threads."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verl.config.trainer import Device, TrainerConfig

logger = logging.getLogger(__name__)

# Shares of one GPU for the workers that live on it in turn; Ray only counts them, memory is each worker's own.
ACTOR_SHARE, REFERENCE_SHARE, ROLLOUT_SHARE = 0.4, 0.2, 0.4
PLACEMENT_TIMEOUT_S = 120

# Worker processes inherit these from the driver.
PASSED_ON = ("VERL_PLUGINS", "PYTHONPATH", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN", "GLOO_SOCKET_IFNAME")


@dataclass(frozen=True)
class Layout:
    """Where training ranks and engine run.

    Ranks work at the same time, the engine while they wait; so the ranks share the cores, and the engine has
    all of them.
    """

    device: str
    ranks: int
    rank_threads: int
    rollout_threads: int

    def in_words(self) -> str:
        where = "GPU" if self.device == "cuda" else "CPU process"
        return (
            f"{self.ranks} training rank(s), one per {where}, {self.rank_threads} thread(s) each; "
            f"rollout engine with {self.rollout_threads} thread(s)"
        )


def plan_layout(config: TrainerConfig, rollout_threads: int | None = None) -> Layout:
    """Choose the device and the number of threads. Raises ValueError where GPUs are asked for and there are none."""
    device = config.device.value
    if config.device == Device.auto:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("trainer.device=cuda, and torch sees no GPU here; use trainer.device=auto or cpu")
    if device == "cuda" and config.nnodes == 1 and config.n_gpus_per_node > torch.cuda.device_count():
        raise ValueError(
            f"trainer.n_gpus_per_node={config.n_gpus_per_node}, and this machine has {torch.cuda.device_count()} GPU(s)"
        )
    cores = usable_cores()
    ranks_here = config.n_gpus_per_node
    if device == "cpu" and ranks_here > cores:
        logger.warning(
            "trainer.n_gpus_per_node=%d processes on %d core(s): they will wait for each other",
            ranks_here,
            cores,
        )
    return Layout(
        device=device,
        ranks=config.nnodes * ranks_here,
        rank_threads=max(1, cores // ranks_here),
        rollout_threads=min(rollout_threads or cores, cores),
    )


def usable_cores() -> int:
    """Cores that this process may run on, which in a container is often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_ray(layout: Layout) -> None:
    """Connect to the cluster in RAY_ADDRESS, or start one on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    runtime_env = {
        "env_vars": {**passed_on, "TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0"},
        # Before a worker unpickles anything: a config may hold classes that only a plugin defines.
        "worker_process_setup_hook": "verl.plugins.load_plugins",
    }
    options = {"logging_level": logging.ERROR, "runtime_env": runtime_env}
    if not os.environ.get("RAY_ADDRESS"):
        options |= {"include_dashboard": False, "num_cpus": max(usable_cores(), 1)}
    ray.init(**options)


def place_ranks(layout: Layout, nnodes: int) -> PlacementGroup | None:
    """One bundle per training rank on GPUs, packed node by node; None on CPU, where Ray need not count anything.

    Raises RuntimeError, with what is there and what is needed, if the cluster does not offer it in time.
    """
    if layout.device != "cuda":
        return None
    group = placement_group([{"GPU": 1, "CPU": 1}] * layout.ranks, strategy="PACK")
    try:
        ray.get(group.ready(), timeout=PLACEMENT_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError as error:
        seen = ray.cluster_resources()
        raise RuntimeError(
            f"trainer.nnodes={nnodes} x trainer.n_gpus_per_node needs {layout.ranks} GPUs and {layout.ranks} CPUs; "
            f"the Ray cluster has {seen.get('GPU', 0):g} GPUs and {seen.get('CPU', 0):g} CPUs, "
            f"free: {ray.available_resources().get('GPU', 0):g} GPUs"
        ) from error
    return group


def actor_options(layout: Layout, group: PlacementGroup | None, bundle: int, gpu_share: float, threads: int) -> dict:
    """Options of `ray.remote` for a worker on `bundle` of the placement group."""
    # OMP reads its number of threads when torch is imported, long before set_num_threads.
    options: dict = {"num_cpus": 0, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}}}
    if group is not None:
        options["num_gpus"] = gpu_share
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
    return options
