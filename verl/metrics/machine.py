"""Time and memory of a step, and the speed of a device, as metrics."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timings:
    """`with timings("update"): ...` adds to the phase's seconds; phases that run side by side overlap."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


class Overlap:
    """The share of a step in which its two sides work at one time, where the next responses are generated during the
    updates."""

    def __init__(self, timings: Timings) -> None:
        self.timings = timings
        self.start = time.perf_counter()

    def trained(self) -> None:
        """The updates are done."""
        self.training = time.perf_counter() - self.start

    def metrics(self, engine_seconds: float) -> dict[str, float]:
        """Seconds in which both worked, and the share of the step in which either had nothing to do; `engine_seconds`
        is the duration of the generation that began with the step."""
        step = self.timings.seconds["step"]
        return {
            "timing_s/overlap": min(self.training, engine_seconds),
            "perf/idle_engine_frac": 1 - min(engine_seconds / step, 1.0),
            "perf/idle_trainer_frac": 1 - min((self.training + self.timings.seconds["weight_sync"]) / step, 1.0),
        }


GIB = 2**30
# Dense bfloat16 TFLOP/s by a part of the device's name, from the makers' data sheets; the first that fits counts.
PEAK_TFLOPS = {
    "B200": 2250,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "RTX 4090": 165,
}


def peak_flops(device: str, override: float | None) -> float | None:
    """FLOP/s of the device with this name; `override` is in TFLOP/s. None for one that is not in the table."""
    found = override or next((peak for name, peak in PEAK_TFLOPS.items() if name in device), None)
    return found and found * 1e12


def host_memory() -> dict[str, float]:
    """`perf/host_memory_gb`, used on the driver's node by all processes, and `perf/driver_memory_gb`, by the driver and
    its loader processes, pages that they share counted once; in GiB. Nothing where the system does not say it."""
    if not os.path.exists("/proc/meminfo"):
        return {}
    sizes = _fields("/proc/meminfo")
    driver = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    return {
        "perf/host_memory_gb": (sizes["MemTotal"] - sizes["MemAvailable"]) / GIB,
        "perf/driver_memory_gb": sum(_proportional(pid) for pid in driver) / GIB,
    }


def _proportional(pid: int) -> int:
    try:
        return _fields(f"/proc/{pid}/smaps_rollup")["Pss"]
    except (FileNotFoundError, ProcessLookupError):  # a loader process that has just ended
        return 0


def _fields(path: str) -> dict[str, int]:
    """The sizes of such a file, in bytes."""
    with open(path, encoding="utf-8") as file:
        pairs = (line.split(":") for line in file if line.rstrip().endswith("kB"))
        return {name: int(size.split()[0]) * 1024 for name, size in pairs}
