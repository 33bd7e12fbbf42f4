"""Groups of workers as the driver sees them: plain typed methods that say how they split and join their data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from verl.algorithms.losses.value import explained_variance
from verl.checkpoint.files import FileEntry
from verl.config.config import Config
from verl.metrics.bag import MetricBag
from verl.protocol import DataProto
from verl.single_controller.resources import ACTOR_SHARE, CRITIC_SHARE, REFERENCE_SHARE, Layout, actor_options
from verl.workers.model_worker import ActorWorker, CriticWorker, ModelWorker, PolicyWorker, ReferenceWorker
from verl.workers.rollout.weight_sync import BucketLayout


class WorkerGroup:
    """One worker per rank, called in step."""

    worker_class: type[ModelWorker]
    role: str
    gpu_share: float

    def __init__(self, config: Config, layout: Layout, group: PlacementGroup | None) -> None:
        self.size = layout.ranks
        remote = ray.remote(self.worker_class)
        self.workers = [
            remote.options(**actor_options(layout, group, rank, self.gpu_share, layout.rank_threads)).remote(
                self.role, config, rank, layout.ranks, layout.device, layout.rank_threads
            )
            for rank in range(layout.ranks)
        ]

    def connect(self) -> None:
        """Make the ranks one process group."""
        host, port = ray.get(self.workers[0].open_store.remote())
        self.on_all(self.worker_class.join, host, port)

    def start_save(self, folder: str, optimizer: bool, background: bool) -> None:
        """Begin to write all ranks' parts of a checkpoint into `folder` (see ModelWorker.start_save)."""
        self.on_all(ModelWorker.start_save, folder, optimizer, background)

    def save_is_done(self) -> bool:
        return all(self.on_all(ModelWorker.save_is_done))

    def finish_save(self) -> tuple[dict[str, FileEntry], list[str]]:
        """Wait for the end; returns the files of all ranks, and what kept ranks from writing theirs."""
        found = self.on_all(ModelWorker.finish_save)
        files = {name: entry for part in found if isinstance(part, dict) for name, entry in part.items()}
        return files, list(dict.fromkeys(part for part in found if isinstance(part, str)))

    def load_state(self, folder: str) -> None:
        """Go on from what a group of this role, of any number of ranks, has written into `folder`."""
        self.on_all(ModelWorker.load_state, folder)

    def on_all(self, method: Callable, *args: Any) -> list[Any]:
        """Call `method` with the same arguments on every rank; returns their results by rank."""
        return ray.get([getattr(worker, method.__name__).remote(*args) for worker in self.workers])

    def peak_memory(self) -> list[tuple[int, int | None]]:
        """By rank; see verl/workers/memory.py."""
        return self.on_all(ModelWorker.peak_memory)

    def shards_of_mini_batches(self, batch: DataProto, num_mini_batches: int) -> list[DataProto]:
        """Each rank's rows, mini-batch after mini-batch. The batch is cut into consecutive mini-batches first and each
        of those among the ranks, so that what a mini-batch is made of does not depend on the number of ranks."""
        pieces = [mini_batch.chunk(self.size) for mini_batch in batch.chunk(num_mini_batches)]
        return [DataProto.concat([piece[rank] for piece in pieces]) for rank in range(self.size)]

    def on_shards(self, method: Callable, shards: list[DataProto], *args: Any) -> list[Any]:
        """Call `method` on every rank with its own shard; returns their results by rank."""
        calls = zip(self.workers, shards, strict=True)
        return ray.get([getattr(worker, method.__name__).remote(shard, *args) for worker, shard in calls])


class LogProbGroup(WorkerGroup):
    """A group that computes log-probs: the actor and the reference."""

    def compute_log_probs(self, batch: DataProto, view: str = "") -> DataProto:
        """`log_probs` [B, R] of all rows, in order; the ranks take equal, consecutive parts."""
        return DataProto.concat(self.on_shards(PolicyWorker.compute_log_probs, batch.chunk(self.size), view))


class ReferenceGroup(LogProbGroup):
    worker_class = ReferenceWorker
    role = "reference"
    gpu_share = REFERENCE_SHARE

    def build(self) -> None:
        self.connect()
        self.on_all(ReferenceWorker.build)


class CriticGroup(WorkerGroup):
    worker_class = CriticWorker
    role = "critic"
    gpu_share = CRITIC_SHARE

    def build(self, total_updates: int) -> None:
        self.connect()
        self.on_all(CriticWorker.build, total_updates)

    def compute_values(self, batch: DataProto) -> DataProto:
        """`values` [B, R] of all rows, in order; the ranks take equal, consecutive parts."""
        return DataProto.concat(self.on_shards(CriticWorker.compute_values, batch.chunk(self.size)))

    def update_critic(self, batch: DataProto, num_mini_batches: int) -> MetricBag:
        """Train on a step's rows. `critic/explained_variance` is that of the values before the updates; there is none
        where all returns are the same."""
        shards = self.shards_of_mini_batches(batch, num_mini_batches)
        metrics = MetricBag.merged(self.on_shards(CriticWorker.update_critic, shards, num_mini_batches))
        explained = explained_variance(batch["values"], batch["returns"], batch["response_mask"])
        metrics.add("critic/explained_variance", *explained)
        return metrics


class ActorGroup(LogProbGroup):
    worker_class = ActorWorker
    role = "actor"
    gpu_share = ACTOR_SHARE

    def build(self, total_updates: int) -> int:
        """Returns the number of parameters of the policy."""
        self.connect()
        return self.on_all(ActorWorker.build, total_updates)[0]

    def compute_reference_log_probs(self, batch: DataProto) -> DataProto:
        """`log_probs` [B, R] of all rows, in order, by the policy with its adapter switched off."""
        return DataProto.concat(self.on_shards(ActorWorker.compute_reference_log_probs, batch.chunk(self.size)))

    def update_policy(self, batch: DataProto, num_mini_batches: int, coefs: dict[str, float]) -> MetricBag:
        """Train on a step's rows; `coefs` are the coefficients of the loss terms in this step."""
        shards = self.shards_of_mini_batches(batch, num_mini_batches)
        return MetricBag.merged(self.on_shards(ActorWorker.update_policy, shards, num_mini_batches, coefs))

    def send_through(self, carrier: str) -> tuple[str, int] | None:
        """Prepare to send weights; where sender and receivers must meet, returns (host, port)."""
        return self.on_all(ActorWorker.send_through, carrier)[0]

    def meet_receivers(self, host: str, port: int, size: int) -> None:
        """Rank 0 and all receivers, `size` processes in all, meet at host:port."""
        ray.get(self.workers[0].meet_receivers.remote(host, port, size))

    def plan_weights(self) -> list[BucketLayout]:
        return self.on_all(ActorWorker.plan_weights)[0]

    def send_bucket(self, layout: BucketLayout) -> list[ray.ObjectRef]:
        """Each rank's payload of the bucket, by reference since it may be large."""
        return [worker.send_bucket.remote(layout) for worker in self.workers]

    def save_huggingface(self, path: str) -> None:
        self.on_all(ActorWorker.save_huggingface, path)
