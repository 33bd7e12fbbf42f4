"""Groups of workers as the driver sees them: plain typed methods that say how they split and join their data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch
from ray.util.placement_group import PlacementGroup

from verl.algorithms.losses.value import explained_variance
from verl.checkpoint.files import FileEntry
from verl.config.config import Config
from verl.metrics.bag import MetricBag
from verl.protocol import DataProto
from verl.single_controller.resources import ACTOR_SHARE, CRITIC_SHARE, REFERENCE_SHARE, Layout, actor_options
from verl.workers.model_worker import ActorWorker, CriticWorker, ModelWorker, PolicyWorker, ReferenceWorker
from verl.workers.rollout.weight_sync import BucketLayout
from verl.workers.training.balance import Share


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

    def free_cache(self) -> None:
        """Return cached memory to the GPUs."""
        self.on_all(ModelWorker.free_cache)

    def on_all(self, method: Callable, *args: Any) -> list[Any]:
        """Call `method` with the same arguments on every rank; returns their results by rank."""
        return ray.get([getattr(worker, method.__name__).remote(*args) for worker in self.workers])

    def peak_memory(self) -> list[tuple[int, int | None]]:
        """The peaks of each rank; see verl/workers/memory.py."""
        return self.on_all(ModelWorker.peak_memory)

    def take_rows(self, shards: list[ray.ObjectRef], shares: list[Share]) -> None:
        """Give each rank its rows of a step, with the images of every view; they stay there until the next step's.

        Args:
            shards: By rank the rows that its share names, as DataProto.
        """
        self.shares = shares
        calls = zip(self.workers, shards, shares, strict=True)
        ray.get([worker.take_rows.remote(shard, share.sizes) for worker, shard, share in calls])

    def gather(self, method: Callable, *args: Any) -> dict[str, torch.Tensor]:
        """The columns that `method` finds on every rank, in the order of the step's rows."""
        parts = self.on_all(method, *args)
        order = torch.cat([share.rows for share in self.shares]).argsort()
        return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}

    def scatter(
        self, method: Callable, columns: DataProto, *args: Any, meanwhile: Callable[[], None] | None = None
    ) -> list[Any]:
        """Call `method` on every rank with these columns of its own rows; returns their results by rank. While they
        work, `meanwhile` is called."""
        pairs = zip(self.workers, self.shares, strict=True)
        calls = [getattr(worker, method.__name__).remote(columns.rows(share.rows), *args) for worker, share in pairs]
        if meanwhile is not None:
            meanwhile()
        return ray.get(calls)


class LogProbGroup(WorkerGroup):
    """A group that computes log-probs: the actor and the reference."""

    def compute_log_probs(self, *views: str, exact: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        """Log-probs [B, R] of the step's rows under each view, by column, from one forward of all views; and columns
        over the whole vocabulary (see forward_views)."""
        return self.gather(PolicyWorker.compute_log_probs, views, exact)


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

    def compute_values(self) -> torch.Tensor:
        """Values [B, R] of the step's rows."""
        return self.gather(CriticWorker.compute_values)["values"]

    def update_critic(self, columns: DataProto) -> MetricBag:
        """Train on the step's rows with `values`, `returns` and `response_mask`. `critic/explained_variance` is that of
        the values before the updates; there is none where all returns are the same."""
        metrics = MetricBag.merged(self.scatter(CriticWorker.update_critic, columns))
        explained = explained_variance(columns["values"], columns["returns"], columns["response_mask"])
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

    def compute_reference_log_probs(self) -> dict[str, torch.Tensor]:
        """`log_probs` [B, R] of the step's rows by the policy with its adapter switched off."""
        return self.gather(ActorWorker.compute_reference_log_probs)

    def update_policy(
        self, columns: DataProto, coefs: dict[str, float], meanwhile: Callable[[], None] | None = None
    ) -> MetricBag:
        """Train on the step's rows with further columns; `coefs` are the coefficients of the loss terms in it."""
        return MetricBag.merged(self.scatter(ActorWorker.update_policy, columns, coefs, meanwhile=meanwhile))

    def shown(self) -> dict[int, dict[str, torch.Tensor]]:
        """The columns of the step's first rows, by their number, that the update computed (see
        DataParallelActor.shown)."""
        return {number: row for part in self.on_all(ActorWorker.shown) for number, row in part.items()}

    def send_through(self, carrier: str) -> tuple[str, int] | None:
        """Prepare to send weights; where sender and receivers must meet, returns (host, port)."""
        return self.on_all(ActorWorker.send_through, carrier)[0]

    def meet_receivers(self, host: str, port: int, size: int) -> None:
        """Rank 0 and all receivers, `size` processes in all, meet at host:port."""
        ray.get(self.workers[0].meet_receivers.remote(host, port, size))

    def plan_weights(self) -> list[BucketLayout]:
        return self.on_all(ActorWorker.plan_weights)[0]

    def send_bucket(self, layout: BucketLayout, senders: Sequence[int] = (0,)) -> list[ray.ObjectRef]:
        """The payloads of the bucket from the ranks that send it, by reference since they may be large."""
        sent = [worker.send_bucket.remote(layout, rank in senders) for rank, worker in enumerate(self.workers)]
        return [sent[rank] for rank in senders]

    def end_sending(self) -> None:
        """Free all that sending took."""
        self.on_all(ActorWorker.end_sending)

    def save_huggingface(self, path: str) -> None:
        self.on_all(ActorWorker.save_huggingface, path)
