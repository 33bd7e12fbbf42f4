"""Parking: tensors that wait in main memory while somebody else needs their device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor


class Parking:
    """Moves tensors' storages to main memory and back; the tensors, and whatever else looks at their memory, stay.

    A tensor that is parked must not be read. The copies in main memory are made once and kept, page-locked where the
    tensors are on a GPU, so that they travel at the full speed of the bus.
    """

    def __init__(self) -> None:
        self.copies: dict[int, torch.Tensor] = {}
        self.parked: dict[int, torch.UntypedStorage] = {}

    @torch.no_grad()
    def park(self, tensors: Iterable[torch.Tensor]) -> None:
        """Free the device memory of these tensors, of a sharded one that of its shard."""
        leaving = {}
        for tensor in tensors:
            storage = _storage(tensor)
            if storage.nbytes() and storage._cdata not in self.parked:
                leaving[storage._cdata] = storage
        for key, storage in leaving.items():
            if key not in self.copies or self.copies[key].nbytes != storage.nbytes():
                pin = storage.device.type == "cuda"
                self.copies[key] = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pin)
            self.copies[key].copy_(_bytes_of(storage), non_blocking=True)
        _wait()
        for storage in leaving.values():
            storage.resize_(0)
        self.parked |= leaving

    @torch.no_grad()
    def take_back(self, tensors: Iterable[torch.Tensor] | None = None) -> None:
        """Bring back these tensors, or everything that is parked."""
        keys = self.parked if tensors is None else {_storage(tensor)._cdata for tensor in tensors} & self.parked.keys()
        for key in list(keys):
            storage = self.parked.pop(key)
            storage.resize_(self.copies[key].nbytes)
            _bytes_of(storage).copy_(self.copies[key], non_blocking=True)
        _wait()

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, or its copy in main memory while it is parked; the next `park` overwrites that."""
        key, local = _storage(tensor)._cdata, _local(tensor)
        if key not in self.parked:
            return tensor
        place = (local.storage_offset(), local.size(), local.stride())
        copy = torch.empty(0, dtype=local.dtype).set_(self.copies[key].untyped_storage(), *place)
        return DTensor(copy, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else copy


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return _local(tensor).untyped_storage()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
