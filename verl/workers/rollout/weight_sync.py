"""Weights from the actor's shards to the rollout engines: how they are cut, and three ways to carry them.

The weights travel in buckets whose contents all sides know beforehand, so that one interface serves carriers that
move bytes (the object store), that move only a handle (memory of the same machine or GPU), and that need sender and
receivers at the same time (a broadcast).
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from verl.registry import Registry
from verl.utils.process import prepare_gloo

ALIGNMENT = 16  # bytes; a view needs every weight aligned to its dtype
CONNECT_TIMEOUT = timedelta(minutes=5)
# Of one bucket. An engine that dies in a broadcast leaves the sender waiting: NCCL itself gives up after ten minutes,
# and then takes the process with it.
BROADCAST_TIMEOUT = timedelta(minutes=2)


@dataclass(frozen=True)
class Entry:
    """One weight's place in a bucket: `start` is its first byte."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class BucketLayout:
    """The places of weights in one array of bytes."""

    entries: tuple[Entry, ...]
    num_bytes: int

    def empty(self, device: torch.device) -> torch.Tensor:
        return torch.empty(self.num_bytes, dtype=torch.uint8, device=device)

    def unpack(self, data: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, weight) of each entry, as views of `data`; copy them, never write."""
        for entry in self.entries:
            yield entry.name, _view(data, entry)

    def pack(self, weights: Iterable[torch.Tensor], data: torch.Tensor) -> None:
        """Write the weights, in the order of the entries and converted to their dtypes, into `data`."""
        for entry, weight in zip(self.entries, weights, strict=True):
            _view(data, entry).copy_(weight)


def _view(data: torch.Tensor, entry: Entry) -> torch.Tensor:
    num_bytes = int(np.prod(entry.shape, dtype=np.int64)) * entry.dtype.itemsize
    return data[entry.start : entry.start + num_bytes].view(entry.dtype).view(entry.shape)


def plan_buckets(shapes: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], bucket_bytes: int) -> list[BucketLayout]:
    """Layouts of about `bucket_bytes` for weights in this order; a larger weight gets a bucket of its own."""
    layouts: list[BucketLayout] = []
    entries: list[Entry] = []
    end = 0
    for name, dtype, shape in shapes:
        num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        start = -(-end // ALIGNMENT) * ALIGNMENT
        if entries and start + num_bytes > bucket_bytes:
            layouts.append(BucketLayout(tuple(entries), end))
            entries, start = [], 0
        entries.append(Entry(name, dtype, tuple(shape), start))
        end = start + num_bytes
    if entries:
        layouts.append(BucketLayout(tuple(entries), end))
    return layouts


class Carrier(Protocol):
    """Moves one bucket at a time from training ranks to engine processes; each end has an instance.

    `every_rank`: whether each training rank on a receiver's GPU sends its copy, or rank 0 alone. `together`: whether
    `send` returns only when all receivers have called `receive`, which then get no payload.
    """

    every_rank: bool
    together: bool

    def __init__(self, device: torch.device) -> None: ...

    def connect(self, host: str, port: int, rank: int, size: int) -> None:
        """Meet the other end; rank 0 of `size` sends and has opened a TCPStore at host:port."""
        ...

    def send(self, data: torch.Tensor) -> Any:
        """Hand over a bucket; returns what receivers need, small or shared enough to travel through Ray. The
        bucket may be freed, and must not be written, after the second send behind this one."""
        ...

    def receive(self, layout: BucketLayout, payloads: list[Any]) -> torch.Tensor:
        """The bucket, from what every sending rank returned."""
        ...

    def release(self) -> None:
        """All receivers have everything: free what was kept for them."""
        ...


CARRIERS: Registry[type[Carrier]] = Registry("weight carrier (worker.rollout.weight_sync)")


@CARRIERS.register("object_store")
class ObjectStoreCarrier:
    """Any two processes of a Ray cluster; on one machine they read the same shared memory."""

    every_rank = False
    together = False

    def __init__(self, device: torch.device) -> None:
        pass

    def connect(self, host: str, port: int, rank: int, size: int) -> None:
        pass

    def send(self, data: torch.Tensor) -> np.ndarray:
        return data.cpu().numpy()

    def receive(self, layout: BucketLayout, payloads: list[np.ndarray]) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given (buffer|NumPy array) is not writable")
            return torch.from_numpy(payloads[0])

    def release(self) -> None:
        pass


@CARRIERS.register("ipc")
class IPCCarrier:
    """Processes on the same GPU (CUDA IPC), or on the same machine where models are on CPU (shared memory).

    Each training rank on a receiver's GPU sends the handle of its own copy, and an engine process opens the one on its
    GPU. A handle that nobody opens would keep its memory for ever.
    """

    every_rank = True
    together = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.held: deque[torch.Tensor] = deque(maxlen=2)  # what receivers may still have to open

    def connect(self, host: str, port: int, rank: int, size: int) -> None:
        pass

    def send(self, data: torch.Tensor) -> tuple[str, tuple]:
        self.held.append(data)
        if self.device.type == "cpu":
            return _device_name(self.device), _share(data)
        from torch.multiprocessing.reductions import reduce_tensor

        torch.cuda.current_stream(self.device).synchronize()  # the other process does not know this stream
        return _device_name(self.device), reduce_tensor(data)[1]

    def receive(self, layout: BucketLayout, payloads: list[tuple[str, tuple]]) -> torch.Tensor:
        name = _device_name(self.device)
        handles = dict(reversed(payloads))  # on CPU all ranks have one name: the first is as good as any
        if name not in handles:
            raise ValueError(
                f"weight_sync=ipc: this engine runs on {name} and the training ranks on {', '.join(sorted(handles))}; "
                "use worker.rollout.weight_sync=collective"
            )
        if self.device.type == "cpu":
            storage = _open_shared(handles[name])
            return torch.empty(0, dtype=torch.uint8).set_(storage)[: layout.num_bytes]
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        arguments = list(handles[name])
        arguments[6] = self.device.index or 0  # the GPU's number there need not be its number here
        return rebuild_cuda_tensor(*arguments)

    def release(self) -> None:
        self.held.clear()
        if self.device.type == "cuda":
            torch.cuda.ipc_collect()


def _share(data: torch.Tensor) -> tuple:
    """The handle of a CPU tensor whose memory other processes can open."""
    storage = data.untyped_storage()
    try:
        return storage._share_filename_cpu_()
    except RuntimeError as error:
        if "timed out" not in str(error):
            raise
        return storage._share_filename_cpu_()  # torch's helper process has a second to start: a busy machine takes more


def _open_shared(handle: tuple) -> torch.UntypedStorage:
    """Another process's memory. torch's manager of such memory answers within a second or not at all, and on a machine
    that is busy it may need longer."""
    for _ in range(4):
        try:
            return torch.UntypedStorage._new_shared_filename_cpu(*handle)
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
    return torch.UntypedStorage._new_shared_filename_cpu(*handle)


def _device_name(device: torch.device) -> str:
    """A name that is the same in every process."""
    return "cpu" if device.type == "cpu" else f"GPU {torch.cuda.get_device_properties(device).uuid}"


@CARRIERS.register("collective")
class CollectiveCarrier:
    """Engines on other GPUs: rank 0 broadcasts to all of them, with NCCL, or gloo on CPU."""

    every_rank = False
    together = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.group: Any = None

    def connect(self, host: str, port: int, rank: int, size: int) -> None:
        # A group of its own: the default one is the trainer's, and in the engine vLLM's.
        store = dist.TCPStore(host, port, is_master=False, timeout=CONNECT_TIMEOUT)
        if self.device.type == "cpu":
            prepare_gloo(host)
            self.group = dist.ProcessGroupGloo(store, rank, size, CONNECT_TIMEOUT)
        else:
            torch.cuda.set_device(self.device)
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = 10 * BROADCAST_TIMEOUT  # `_broadcast` is first
            self.group = dist.ProcessGroupNCCL(store, rank, size, options)

    def send(self, data: torch.Tensor) -> None:
        self._broadcast(data)

    def receive(self, layout: BucketLayout, payloads: list[None]) -> torch.Tensor:
        data = layout.empty(self.device)
        self._broadcast(data)
        return data

    def _broadcast(self, data: torch.Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        work = self.group.broadcast([data], options)
        deadline = time.monotonic() + BROADCAST_TIMEOUT.total_seconds()
        while not work.is_completed():
            if time.monotonic() > deadline:
                self.group.abort()
                raise TimeoutError(f"weight_sync=collective: a bucket was not received within {BROADCAST_TIMEOUT}")
            time.sleep(0.0005)
        try:
            work.wait()
        except RuntimeError:  # an end has died
            self.group = None  # closes the connections: the others would wait until their own time is out
            raise

    def release(self) -> None:
        pass
