"""Weights from the actor's shards to the rollout engine, through Ray's shared-memory object store."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import ray
import torch


@dataclass(frozen=True)
class Bucket:
    """Some weights as one array of bytes, which the object store shares between processes without a copy."""

    data: np.ndarray  # uint8
    entries: tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]  # name, dtype, shape, first byte

    def unpack(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, weight) of each; the weights are views of the shared, read-only memory: copy, never write."""
        for name, dtype, shape, start in self.entries:
            num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given buffer is not writable")
                flat = torch.frombuffer(self.data, dtype=torch.uint8, count=num_bytes, offset=start)
            yield name, flat.view(dtype).view(shape)


def pack(weights: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int) -> Iterator[Bucket]:
    """Weights in buckets of about `bucket_bytes`; a larger weight gets a bucket of its own."""
    pending: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, weight in weights:
        if pending and size + weight.nbytes > bucket_bytes:
            yield _bucket(pending)
            pending, size = [], 0
        pending.append((name, weight.detach().cpu().contiguous()))
        size += weight.nbytes
    if pending:
        yield _bucket(pending)


def _bucket(weights: list[tuple[str, torch.Tensor]]) -> Bucket:
    entries, pieces, at = [], [], 0
    for name, weight in weights:
        at_aligned = -(-at // 16) * 16  # frombuffer and view need each weight aligned to its dtype
        pieces += [np.zeros(at_aligned - at, np.uint8), weight.reshape(-1).view(torch.uint8).numpy()]
        entries.append((name, weight.dtype, tuple(weight.shape), at_aligned))
        at = at_aligned + weight.nbytes
    return Bucket(np.concatenate(pieces), tuple(entries))


class ObjectStoreSync:
    """Carrier for any two processes of a Ray cluster. Only one bucket is ever whole outside the store."""

    def __init__(self, bucket_bytes: int) -> None:
        self.bucket_bytes = bucket_bytes

    def send(self, weights: Iterator[tuple[str, torch.Tensor]], is_source: bool) -> list[ray.ObjectRef]:
        """Put the weights into the store and return where. All ranks call it, since gathering a weight takes all
        of them; only the source packs and returns."""
        if is_source:
            return [ray.put(bucket) for bucket in pack(weights, self.bucket_bytes)]
        for _ in weights:
            pass
        return []

    def receive(self, references: list[ray.ObjectRef]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, weight) of everything that was sent."""
        for reference in references:
            yield from ray.get(reference).unpack()
