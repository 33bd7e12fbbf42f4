"""The rollout replicas as the driver sees them: one engine, as far as the trainer can tell."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup

from verl.config.config import Config
from verl.protocol import DataProto
from verl.single_controller.resources import Layout, actor_options, rollout_seats
from verl.single_controller.worker_group import ActorGroup
from verl.workers.rollout.base import SamplingParams, in_order
from verl.workers.rollout.weight_sync import CARRIERS
from verl.workers.rollout.worker import RolloutWorker

logger = logging.getLogger(__name__)

NEEDED = ("uid", "prompt_ids", "prompt_mask", "prompt_positions", "mm_inputs")


@dataclass
class Rollout:
    """Responses that are being generated: the rows of each replica that has some, and its answer to come. `ahead`: the
    trainer's weights may change before they are done."""

    prompts: DataProto
    sampling: list[SamplingParams]
    rows: dict[int, list[int]]
    answers: dict[int, ray.ObjectRef]
    ahead: bool = False


class RolloutGroup:
    """Replicas of an engine that share the prompts.

    A replica that dies or fails is started again, gets the current weights, and generates its share again: requests
    carry their own seeds, so nothing is lost, doubled or drawn otherwise. After `worker.rollout.max_failures`
    failures in a row the run stops; a rollout or a sync that goes through sets the count back.
    """

    def __init__(self, config: Config, layout: Layout, placement: PlacementGroup | None, pad_token_id: int) -> None:
        self.config = config
        self.layout = layout
        self.placement = placement
        self.pad_token_id = pad_token_id
        self.carrier = choose_carrier(config.worker.rollout.weight_sync, layout)
        self.seats = rollout_seats(layout, placement)
        self.replicas = [self._start(index) for index in range(len(self.seats))]
        self.actor: ActorGroup | None = None
        self.connected: tuple[str, list[int]] | None = None  # the carrier that is open, and the replicas at its end
        self.version = 0
        self.failures = 0

    def build(self) -> None:
        """Wait for all engines. One that cannot start at all is not tried again: its error is raised."""
        self.process_ids()

    def engine_seconds(self) -> float:
        """Duration of the last generation, of the replica that was longest at it."""
        asked = Receivers(dict(enumerate(self.replicas)))
        return max([0.0, *asked.call(RolloutWorker.engine_seconds)])

    def process_ids(self) -> list[int]:
        """The process id of each replica, on its node."""
        return ray.get([replica.ready.remote() for replica in self.replicas])

    def generate(self, prompts: DataProto, sampling: list[SamplingParams], ahead: bool = False) -> Rollout:
        """Begin to generate; `result` waits for the end."""
        prompts = prompts.select(NEEDED)
        shares = spread(prompts["prompt_mask"].sum(dim=1).tolist(), sampling, len(self.replicas))
        rollout = Rollout(prompts, sampling, {i: rows for i, rows in enumerate(shares) if rows}, {}, ahead)
        for index in rollout.rows:
            self._ask(rollout, index)
        return rollout

    def result(self, rollout: Rollout) -> DataProto:
        """The responses to all prompts (see RolloutEngine.generate), with `weight_version`."""
        parts, newest = [], self.version + rollout.ahead
        for index in rollout.rows:
            while True:
                try:
                    part = ray.get(rollout.answers[index])
                    break
                except RayError as error:
                    if isinstance(error, RayTaskError) and isinstance(error.cause, (ValueError, TypeError)):
                        raise  # a mistake in prompts or settings, which another try would only repeat
                    self._ask_again(rollout, index, error)
            if not (self.version <= part["weight_version"]).all() or (part["weight_version"] > newest).any():
                raise RuntimeError(f"rollout replica {index} has weights of another version than {self.version}")
            parts.append(part)
        self.failures = 0
        return in_order(parts, list(rollout.rows.values()), rollout.sampling, self.pad_token_id)

    def sync_weights(self, actor: ActorGroup) -> None:
        """Give every replica the actor's weights, as the next version."""
        self.actor = actor
        self.version += 1
        self._sync(list(range(len(self.replicas))))
        self.failures = 0

    def sleep(self) -> None:
        """Let the trainer have the GPUs that it shares with the engines, until the next sync."""
        ray.get([replica.sleep.remote() for replica in self.replicas])

    def stop(self) -> None:
        """End all replicas, at once."""
        for replica in self.replicas:
            ray.kill(replica)

    def _start(self, index: int) -> ray.actor.ActorHandle:
        layout, seat = self.layout, self.seats[index]
        # vLLM on CPU makes torch's C++ side warn of how it binds memory, at every start.
        quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"} if layout.device == "cpu" else {}
        options = actor_options(layout, self.placement, seat.bundle, seat.gpu_share, layout.rollout_threads, **quiet)
        worker = ray.remote(RolloutWorker).options(**options)
        return worker.remote(self.config, layout.device, layout.rollout_threads, index, seat.visible_gpus)

    def _ask(self, rollout: Rollout, index: int, replica: int | None = None) -> None:
        """Ask for the share of the replica `index`, by default that one."""
        rows = rollout.rows[index]
        sampling = [rollout.sampling[row] for row in rows]
        rollout.answers[index] = self.replicas[index if replica is None else replica].generate.remote(
            rollout.prompts.rows(torch.tensor(rows)), sampling
        )

    def _ask_again(self, rollout: Rollout, index: int, error: Exception) -> None:
        """Have a failed replica's share generated, by the same weights where anybody has them: the trainer, or, ahead
        of an update, another replica. Without one the newer weights do it, which the responses' version says."""
        if rollout.ahead and len(self.replicas) > 1:
            self._count_failure(f"rollout replica {index} failed while generating", error)
            logger.warning("rollout replica %d failed while generating, and another takes its share: %s", index, error)
            self._ask(rollout, index, (index + self.failures) % len(self.replicas))
            return
        self._restart([index], error, "generating")
        if self.actor is not None:
            if rollout.ahead:
                logger.warning("its share is drawn by the new weights: the old ones went with it")
            self.version += rollout.ahead
            self._sync([index])
            self.version -= rollout.ahead
        self._ask(rollout, index)

    def _restart(self, indices: list[int], error: Exception, doing: str) -> None:
        """Start replicas again after `error`. Raises RuntimeError, with it, where that has happened too often."""
        while True:
            what = f"rollout replica {', '.join(map(str, indices))} failed while {doing}"
            limit = self._count_failure(what, error)
            logger.warning("%s and is started again (failure %d of %d): %s", what, self.failures, limit, error)
            self.connected = None
            for index in indices:
                ray.kill(self.replicas[index])
            if self.actor is not None and self.layout.shares_gpus:
                self.actor.free_cache()  # an engine that starts asks how much memory its GPU has left
            for index in indices:
                self.replicas[index] = self._start(index)
            try:
                ray.get([self.replicas[index].ready.remote() for index in indices])
                return
            except RayError as again:
                error, doing = again, "starting"

    def _count_failure(self, what: str, error: Exception) -> int:
        """Count one more failure in a row; returns how many stop the run. Raises RuntimeError where they are that
        many."""
        self.failures += 1
        limit = self.config.worker.rollout.max_failures
        if self.failures >= limit:
            raise RuntimeError(
                f"{what}, failure {self.failures} in a row (worker.rollout.max_failures={limit}). The engine's own "
                f"error:\n{error}"
            ) from error
        return limit

    def _sync(self, indices: list[int]) -> None:
        """Send the weights until all of these replicas have them."""
        while indices:
            lost = self._send(indices)
            if lost:
                self._restart(list(lost), next(iter(lost.values())), "taking weights")
            indices = list(lost)

    def _send(self, indices: list[int]) -> dict[int, Exception]:
        """Send the weights to these replicas; returns those that died meanwhile. While they load one bucket, the
        training ranks gather the next."""
        receivers = Receivers({index: self.replicas[index] for index in indices})
        carrier, actor = CARRIERS[self.carrier], self.actor
        layouts = actor.plan_weights()
        receivers.call(RolloutWorker.ready)  # one that is dead already must not be waited for at a meeting
        if not receivers.alive:
            return receivers.lost
        try:
            if self.connected != (self.carrier, receivers.alive):
                self._connect(receivers)
            receivers.call(RolloutWorker.wake_weights)
            receivers.call(RolloutWorker.begin_weights)
            for layout in layouts:
                payloads = actor.send_bucket(layout, self._senders(receivers) if carrier.every_rank else [0])
                receivers.start(RolloutWorker.load_bucket, layout, *([] if carrier.together else payloads))
                if carrier.together:
                    ray.get(payloads)
            receivers.call(RolloutWorker.finish_weights, self.version)
            actor.end_sending()  # before the caches wake: they take all the memory that there is
            receivers.call(RolloutWorker.wake_cache)
        except RayTaskError as error:
            self.connected = None
            # Where all must be there together, the death of one is an error of the others: all begin anew.
            if carrier.together and self._some_died(indices):
                return dict.fromkeys(indices, error)
            raise
        return receivers.lost

    def _senders(self, receivers: Receivers) -> list[int]:
        """The training ranks on the GPUs of those replicas that live."""
        return sorted({bundle for index in receivers.alive for bundle in self.seats[index].bundles})

    def _some_died(self, indices: list[int]) -> bool:
        asked = Receivers({index: self.replicas[index] for index in indices})
        asked.call(RolloutWorker.ready)
        return bool(asked.lost)

    def _connect(self, receivers: Receivers) -> None:
        """Open the carrier at both ends."""
        width = self.layout.gpus_per_replica
        size = 1 + width * len(receivers.alive)
        meeting = self.actor.send_through(self.carrier)
        host, port = meeting or (None, 0)
        for place, index in enumerate(receivers.alive):
            receivers.start_one(index, RolloutWorker.receive_from, self.carrier, host, port, 1 + place * width, size)
        if meeting:
            self.actor.meet_receivers(host, port, size)
        receivers.wait()
        self.connected = (self.carrier, receivers.alive)


class Receivers:
    """The replicas of one sync. Those that die drop out into `lost`; what they raise is raised."""

    def __init__(self, replicas: dict[int, ray.actor.ActorHandle]) -> None:
        self.replicas = replicas
        self.lost: dict[int, Exception] = {}
        self.calls: dict[int, ray.ObjectRef] = {}

    @property
    def alive(self) -> list[int]:
        return [index for index in self.replicas if index not in self.lost]

    def call(self, method: Callable, *arguments: Any) -> list[Any]:
        """Call `method` on every replica, behind what it is at, and wait for all; returns what those that live say."""
        self.start(method, *arguments)
        return self.wait()

    def start(self, method: Callable, *arguments: Any) -> None:
        self.wait()
        for index in self.alive:
            self.start_one(index, method, *arguments)

    def start_one(self, index: int, method: Callable, *arguments: Any) -> None:
        self.calls[index] = getattr(self.replicas[index], method.__name__).remote(*arguments)

    def wait(self) -> list[Any]:
        calls, self.calls, found = self.calls, {}, []
        for index, call in calls.items():
            try:
                found.append(ray.get(call))
            except RayActorError as error:
                self.lost[index] = error
        return found


def choose_carrier(name: str, layout: Layout) -> str:
    """The carrier that `worker.rollout.weight_sync` asks for; `auto` takes the shortest way.

    Raises ValueError for one that cannot work where the engines are.
    """
    if name == "auto":
        if layout.device == "cpu":
            return "object_store"
        return "collective" if layout.dedicated_gpus else "ipc"
    CARRIERS[name]
    if layout.device == "cuda" and name == "ipc" and layout.dedicated_gpus:
        raise ValueError("worker.rollout.weight_sync=ipc: engines on GPUs of their own need collective (or auto)")
    if name == "collective" and layout.shares_gpus:
        raise ValueError("worker.rollout.weight_sync=collective: NCCL cannot reach the GPU it sends from; use ipc")
    return name


def spread(lengths: Sequence[int], sampling: Sequence[SamplingParams], replicas: int) -> list[list[int]]:
    """The rows of each replica, in order: the longest first, always to the one with the fewest tokens so far.

    Args:
        lengths: of the prompts, in tokens.
        sampling: of the prompts; how long responses will get is not known, so each counts as the longest.
    """
    costs = [length + params.n * params.max_tokens for length, params in zip(lengths, sampling, strict=True)]
    shares: list[list[int]] = [[] for _ in range(replicas)]
    heap = [(0, index) for index in range(replicas)]
    for row in sorted(range(len(costs)), key=lambda row: -costs[row]):
        load, index = heapq.heappop(heap)
        shares[index].append(row)
        heapq.heappush(heap, (load + costs[row], index))
    return [sorted(rows) for rows in shares]
