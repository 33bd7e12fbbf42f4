"""What a tracker is."""

from __future__ import annotations

from typing import Protocol

from verl.registry import Registry


class Tracker(Protocol):
    """Made as `Tracker(output_dir)`; takes the metrics of each step once, in order."""

    def __init__(self, output_dir: str) -> None: ...

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


TRACKERS: Registry[type[Tracker]] = Registry("tracker (trainer.logger)")
