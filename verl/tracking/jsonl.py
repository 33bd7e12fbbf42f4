"""metrics.jsonl: one JSON object per step; a value that is not finite is null, since JSON has no NaN."""

from __future__ import annotations

import json
import math
import os

from verl.config.config import Config
from verl.tracking.registry import TRACKERS, Tracker


@TRACKERS.register("jsonl")
class JsonlTracker(Tracker):
    """Appends whole lines and flushes each, so that a run that dies leaves every step it finished."""

    is_record = True

    def __init__(self, output_dir: str, config: Config) -> None:
        self.file = open(os.path.join(output_dir, "metrics.jsonl"), "a", encoding="utf-8")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in sorted(metrics.items())}
        self.file.write(json.dumps({"step": step, **finite}) + "\n")
        self.file.flush()

    def close(self, succeeded: bool) -> None:
        self.file.close()
