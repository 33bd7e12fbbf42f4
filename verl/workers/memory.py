"""Device memory: how much a worker has taken at most, and an error that names the way out where there is none left."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class OutOfDeviceMemory(RuntimeError):
    """A GPU is full; the message names what filled it and the keys that change that."""


@contextmanager
def explain_oom(what: str, settings: dict[str, object]) -> Iterator[None]:
    """Turn a GPU's out-of-memory error in `what` into one that names `settings`, by config key."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        keys = ", ".join(f"{key}={value}" for key, value in settings.items())
        reason = str(error).split(". ")[0]
        raise OutOfDeviceMemory(f"no GPU memory is left for {what} ({reason}). What decides on it: {keys}") from error


def peak_memory(device: torch.device) -> tuple[int, int | None]:
    """(bytes this process has held at most, bytes its GPU has): of GPU memory, or of main memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, None
