"""The check, before any worker starts, that the cluster has what the run needs; if not, it says what is missing and
why."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from tqdm import tqdm

from verl.single_controller.resources import Layout

logger = logging.getLogger(__name__)

POLL_S = 1.0
RESERVE_S = 30.0  # what a cluster that has everything takes to hand it over, with room to spare


class ClusterError(RuntimeError):
    """The cluster does not have what the run needs."""


@dataclass(frozen=True)
class Node:
    """Resources of one node of the Ray cluster."""

    address: str
    cpus: float
    gpus: float

    def in_words(self) -> str:
        return f"{self.address}: {self.gpus:g} GPU(s), {self.cpus:g} CPU(s)"


def cluster_nodes() -> list[Node]:
    """The living nodes."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [Node(n["NodeManagerAddress"], n["Resources"].get("CPU", 0), n["Resources"].get("GPU", 0)) for n in alive]


def place_ranks(layout: Layout, nnodes: int, timeout_s: float) -> PlacementGroup | None:
    """Wait until the cluster has what the run needs, and take it: one bundle per training rank, then one per GPU of the
    engines' own. On GPUs they are packed node by node, on CPU ranks are spread over the nodes. None on the CPU of one
    machine, where there is nothing to take.

    Raises ClusterError, with what is needed, what is there and the way out, where that lasts longer than `timeout_s`.
    """
    on_gpu = layout.device == "cuda"
    if not on_gpu and nnodes == 1:
        return None
    bundles = layout.ranks + layout.dedicated_gpus
    needs = f"{nnodes} node(s) with {bundles} {'GPU' if on_gpu else 'CPU'}(s) in all, {bundles} CPU(s)"
    nodes = _wait_for_nodes(nnodes, bundles, on_gpu, timeout_s, needs)
    logger.info("the run needs %s; the Ray cluster has %s", needs, "; ".join(n.in_words() for n in nodes))
    bundle = {"CPU": 1, **({"GPU": 1} if on_gpu else {})}
    group = placement_group([bundle] * bundles, strategy="PACK" if on_gpu else "SPREAD")
    try:
        ray.get(group.ready(), timeout=RESERVE_S)
    except ray.exceptions.GetTimeoutError as error:
        remove_placement_group(group)
        free = ray.available_resources()
        raise ClusterError(
            f"the run needs {needs}. The Ray cluster has them, but not free: {free.get('GPU', 0):g} GPU(s) and "
            f"{free.get('CPU', 0):g} CPU(s) are. Another job holds the rest (`ray status`, `ray job list`): wait "
            "for it, stop it, or make trainer.nnodes or trainer.n_gpus_per_node smaller"
        ) from error
    return group


def _wait_for_nodes(nnodes: int, bundles: int, on_gpu: bool, timeout_s: float, needs: str) -> list[Node]:
    """The cluster's nodes, once they are enough."""
    deadline = time.monotonic() + timeout_s
    with tqdm(total=nnodes, desc="waiting for nodes", unit="node", leave=False) as bar:
        while True:
            nodes = cluster_nodes()
            bar.update(min(len(nodes), nnodes) - bar.n)
            units = sum(int(min(node.cpus, node.gpus) if on_gpu else node.cpus) for node in nodes)
            if len(nodes) >= nnodes and units >= bundles:
                return nodes
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
    if len(nodes) < nnodes:
        way_out = (
            f"{nnodes - len(nodes)} node(s) have not joined: run `ray start --address=HEAD:6379` on each, with the "
            "head's address, or set trainer.nnodes to what there is"
        )
    elif on_gpu:
        way_out = (
            "set trainer.n_gpus_per_node, worker.rollout.dedicated_gpus or trainer.nnodes to what there is; a node "
            "that shows fewer GPUs than it has was started with a CUDA_VISIBLE_DEVICES, or without the NVIDIA driver"
        )
    else:
        way_out = "set trainer.n_gpus_per_node, the ranks per node, or trainer.nnodes to what there is"
    raise ClusterError(
        f"the run needs {needs}; after {timeout_s:g} s (trainer.cluster_timeout_s) the Ray cluster has "
        f"{'; '.join(node.in_words() for node in nodes) or 'no nodes'}. The way out: {way_out}"
    )
