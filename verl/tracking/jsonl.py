"""metrics.jsonl: one JSON object per step; a value that is not finite is null, since JSON has no NaN."""

from __future__ import annotations

import json
import math
import os

from verl.tracking.registry import TRACKERS


@TRACKERS.register("jsonl")
class JsonlTracker:
    """Appends whole lines and flushes each, so that a run that dies leaves every step it finished."""

    def __init__(self, output_dir: str) -> None:
        self.file = open(os.path.join(output_dir, "metrics.jsonl"), "a", encoding="utf-8")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in sorted(metrics.items())}
        self.file.write(json.dumps({"step": step, **finite}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()
