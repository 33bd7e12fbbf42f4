"""Resources of the machine and their use by a run: Ray, placement and threads."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verl.config.trainer import Device, TrainerConfig
from verl.config.worker import RolloutConfig
from verl.utils.process import OLDEST_DRIVER, driver_gpus, usable_cores

logger = logging.getLogger(__name__)

# Shares of one GPU for the workers that live on it in turn; Ray only counts them, memory is each worker's own.
ACTOR_SHARE, REFERENCE_SHARE, CRITIC_SHARE, ROLLOUT_SHARE = 0.3, 0.1, 0.3, 0.3

# Worker processes on all nodes get these from the driver. No secrets: Ray keeps and shows them. A worker has the
# HF_TOKEN of the node that it runs on.
PASSED_ON = ("VERL_PLUGINS", "PYTHONPATH", "GLOO_SOCKET_IFNAME", "TRANSFORMERS_OFFLINE")
PASSED_ON += tuple(f"HF_{name}" for name in ("HOME", "HUB_CACHE", "HUB_OFFLINE", "DATASETS_CACHE", "ENDPOINT"))
PASSED_ON_PREFIXES = ("VLLM_", "NCCL_", "PYTORCH_", "TORCH_")


@dataclass(frozen=True)
class Layout:
    """Placement of training ranks and engines.

    Ranks work at the same time, and so do the engines while the ranks wait; so each kind has all the cores.
    `dedicated_gpus` are the engines' own, behind those of the ranks; with 0 they share the ranks' GPUs.
    """

    device: str
    ranks: int
    rank_threads: int
    rollout_threads: int
    replicas: int = 1
    gpus_per_replica: int = 1
    dedicated_gpus: int = 0

    @property
    def shares_gpus(self) -> bool:
        """Whether engines and trainer take turns on the same GPUs."""
        return self.device == "cuda" and not self.dedicated_gpus

    def in_words(self) -> str:
        where = "GPU" if self.device == "cuda" else "CPU process"
        wide = f" over {self.gpus_per_replica} {where}s each" if self.gpus_per_replica > 1 else ""
        own = f" on {self.dedicated_gpus} GPU(s) of their own" if self.dedicated_gpus else ""
        return (
            f"{self.ranks} training rank(s), one per {where}, {self.rank_threads} thread(s) each; "
            f"{self.replicas} rollout engine(s){wide}{own}, {self.rollout_threads} thread(s) each"
        )


@dataclass
class Seat:
    """A rollout replica's place: a bundle of the placement group, how much of its GPU Ray counts, and, where it
    needs several GPUs, which."""

    bundle: int
    gpu_share: float
    visible_gpus: list[str] | None = None
    bundles: tuple[int, ...] = ()  # of all its GPUs; of the trainer's these are the ranks

    def __post_init__(self) -> None:
        self.bundles = self.bundles or (self.bundle,)


def plan_layout(config: TrainerConfig, rollout: RolloutConfig) -> Layout:
    """Choose the device, replicas and threads. Raises ValueError where GPUs are asked for that are not there."""
    device = find_device(config)
    ranks, dedicated, width = (
        config.nnodes * config.n_gpus_per_node,
        rollout.dedicated_gpus,
        rollout.tensor_parallel_size,
    )
    if (
        device == "cuda"
        and config.nnodes == 1
        and not names_cluster()
        and ranks + dedicated > torch.cuda.device_count()
    ):
        raise ValueError(
            f"trainer.n_gpus_per_node={ranks} and worker.rollout.dedicated_gpus={dedicated}: this machine has "
            f"{torch.cuda.device_count()} GPU(s)"
        )
    replicas = rollout.data_parallel_size or 1
    if device == "cuda":
        check_environment(shares_gpus=not dedicated)
        replicas = plan_replicas(ranks, rollout)
    elif dedicated:
        raise ValueError(f"worker.rollout.dedicated_gpus={dedicated}, and this run is on CPU; set it to 0")
    cores = usable_cores()
    ranks_here = config.n_gpus_per_node
    for key, processes in (("trainer.n_gpus_per_node", ranks_here), ("worker.rollout.data_parallel_size", replicas)):
        if device == "cpu" and processes > cores:
            logger.warning("%s=%d processes on %d core(s): they will wait for each other", key, processes, cores)
    engine_threads = max(1, cores // (replicas * width if device == "cpu" else ranks_here))
    rank_cores = cores
    if config.ahead and device == "cpu":  # they work at one time
        engine_threads = rollout.cpu_threads or max(1, cores // (2 * replicas))
        rank_cores = max(1, cores - replicas * engine_threads)
    if config.ahead and device == "cuda" and not dedicated:
        raise ValueError(
            "trainer.ahead=1, and the engines share the trainer's GPUs, so that only one of both can work: give them "
            "GPUs of their own with worker.rollout.dedicated_gpus"
        )
    return Layout(
        device=device,
        ranks=ranks,
        rank_threads=max(1, rank_cores // ranks_here),
        rollout_threads=min(rollout.cpu_threads or engine_threads, cores),
        replicas=replicas,
        gpus_per_replica=width,
        dedicated_gpus=dedicated,
    )


def find_device(config: TrainerConfig) -> str:
    """`cuda` or `cpu`: what `trainer.device` says, or with `auto` what the cluster, or this machine, has.

    Raises ValueError where GPUs are asked for that are not there, and where there are some that torch cannot use: a run
    that is meant for them would take weeks on the CPU.
    """
    if config.device == Device.cpu:
        return "cpu"
    if config.nnodes > 1 or names_cluster():  # its head, where this runs, need not have GPUs
        found = config.device == Device.cuda or cluster_gpus(config.nnodes, config.cluster_timeout_s) > 0
        return "cuda" if found else "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if config.device == Device.cuda:
        raise ValueError("trainer.device=cuda, and torch sees no GPU here; use trainer.device=auto or cpu")
    if seen := driver_gpus():
        raise ValueError(
            f"the driver sees {seen[0]}, and torch cannot use it: this torch needs driver {OLDEST_DRIVER} or newer "
            "(CUDA 13), or is a build for CPUs. Update the driver or install again; trainer.device=cpu runs without it"
        )
    return "cpu"


def check_environment(shares_gpus: bool) -> None:
    """Raise ValueError for settings of the environment with which workers on GPUs cannot work."""
    everywhere = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
    if os.environ.get(everywhere, "") not in ("", "0"):
        raise ValueError(f"{everywhere} is set: every worker would use the first GPU of its node; unset it")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if shares_gpus and "expandable_segments:true" in os.environ.get(name, "").lower().replace(" ", ""):
            raise ValueError(
                f"{name}={os.environ[name]}: engines on the trainer's GPUs get weights by CUDA IPC and sleep, and "
                "neither works with expandable segments; unset it, or give engines GPUs of their own "
                "(worker.rollout.dedicated_gpus)"
            )


def names_cluster() -> bool:
    """Whether RAY_ADDRESS names a cluster that a run joins."""
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


def cluster_gpus(nnodes: int, timeout_s: float) -> int:
    """GPUs of the Ray cluster, once `nnodes` nodes have joined or the time is over."""
    join_cluster(nnodes)
    try:
        deadline = time.monotonic() + timeout_s
        while sum(node["Alive"] for node in ray.nodes()) < nnodes and time.monotonic() < deadline:
            time.sleep(0.5)
        return int(ray.cluster_resources().get("GPU", 0))
    finally:
        ray.shutdown()


def plan_replicas(ranks: int, rollout: RolloutConfig) -> int:
    """The number of engines that the GPUs hold, or that is asked for; raises ValueError where those do not fit."""
    gpus, width = rollout.dedicated_gpus or ranks, rollout.tensor_parallel_size
    if gpus % width:
        raise ValueError(f"worker.rollout.tensor_parallel_size={width} does not divide the {gpus} GPUs of the engines")
    wanted = rollout.data_parallel_size or gpus // width
    if wanted * width > gpus:
        raise ValueError(
            f"worker.rollout.data_parallel_size={wanted} x tensor_parallel_size={width} is more than the {gpus} GPUs "
            "of the engines"
        )
    return wanted


def start_ray(layout: Layout, nnodes: int = 1) -> bool:
    """Connect to the cluster in RAY_ADDRESS; without one, a run on one node starts Ray for itself, whatever else runs
    there, and a run on several joins the cluster that `ray start` has made. Returns whether this did it: a process that
    is connected already, such as a notebook's, stays as it is.

    Raises ConnectionError, with the way out, where there is none.
    """
    if ray.is_initialized():
        logger.info("Ray runs in this process already and is used as it is")
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # a process per core, none of which a run would use
    passed_on = {n: v for n, v in os.environ.items() if n in PASSED_ON or n.startswith(PASSED_ON_PREFIXES)}
    runtime_env = {
        "env_vars": {**passed_on, "TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0"},
        "worker_process_setup_hook": "verl.plugins.prepare_worker",
    }
    if nnodes > 1 or names_cluster():
        join_cluster(nnodes, runtime_env=runtime_env)
    else:
        own = {"address": "local", "include_dashboard": False, "num_cpus": max(usable_cores(), 1)}
        ray.init(logging_level=logging.ERROR, runtime_env=runtime_env, **own)
    return True


def join_cluster(nnodes: int, **options: Any) -> None:
    """Connect to the cluster in RAY_ADDRESS, or to the one that `ray start` has made here. Raises ConnectionError, with
    the way out, where there is none."""
    if not names_cluster():
        options["address"] = "auto"
    try:
        ray.init(logging_level=logging.ERROR, **options)
    except ConnectionError as error:
        raise ConnectionError(
            f"trainer.nnodes={nnodes} and RAY_ADDRESS={os.environ.get('RAY_ADDRESS', '')!r}: there is no Ray cluster "
            "to join, or it asks for another token. Run `ray start --head --port=6379` on one node and `ray start "
            "--address=HEAD:6379` on the others, each with the token of the first (its ~/.ray/auth_token, as that file "
            "or as RAY_AUTH_TOKEN)"
        ) from error


def actor_options(
    layout: Layout, group: PlacementGroup | None, bundle: int, gpu_share: float, threads: int, **environment: str
) -> dict:
    """Options of `ray.remote` for a worker on `bundle` of the placement group, in this environment."""
    # OMP reads its number of threads when torch is imported, long before set_num_threads.
    options: dict = {"num_cpus": 0, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads), **environment}}}
    if group is not None:
        options["num_gpus"] = gpu_share if layout.device == "cuda" else 0
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
    return options


def rollout_seats(layout: Layout, group: PlacementGroup | None) -> list[Seat]:
    """A place for each rollout replica. One that spans several GPUs has them all on one node."""
    if layout.device == "cpu":
        return [Seat(bundle=index % layout.ranks, gpu_share=0) for index in range(layout.replicas)]
    first, share = (layout.ranks, 1.0) if layout.dedicated_gpus else (0, ROLLOUT_SHARE)
    if layout.gpus_per_replica == 1:
        return [Seat(first + index, share) for index in range(layout.replicas)]
    bundles = range(first, first + (layout.dedicated_gpus or layout.ranks))
    found = ray.get([_where.options(**actor_options(layout, group, b, share, threads=1)).remote() for b in bundles])
    return wide_seats(dict(zip(bundles, found, strict=True)), layout.gpus_per_replica, layout.replicas, share)


def wide_seats(places: dict[int, tuple[str, str]], width: int, replicas: int, share: float) -> list[Seat]:
    """Seats of `width` GPUs each, from (node, GPU) of every bundle. Raises ValueError where nodes do not hold them."""
    nodes: dict[str, list[tuple[int, str]]] = {}
    for bundle, (node, gpu) in places.items():
        nodes.setdefault(node, []).append((bundle, gpu))
    seats = []
    for members in nodes.values():
        for start in range(0, len(members) - width + 1, width):
            part = members[start : start + width]
            seats.append(Seat(part[0][0], share, [gpu for _, gpu in part], tuple(bundle for bundle, _ in part)))
    if len(seats) < replicas:
        raise ValueError(
            f"worker.rollout.tensor_parallel_size={width}: {replicas} engines do not fit on nodes with "
            f"{[len(members) for members in nodes.values()]} GPUs, since an engine cannot span nodes"
        )
    return seats[:replicas]


@ray.remote
def _where() -> tuple[str, str]:
    """(node, GPU) of the bundle that this runs on."""
    return ray.get_runtime_context().get_node_id(), str(ray.get_gpu_ids()[0])
