"""Trackers that need no package: the console, and metrics.jsonl."""

from __future__ import annotations

import json
import math
import os

from tqdm import tqdm

from verl.algorithms.losses.compose import build_terms
from verl.config.config import Config
from verl.tracking.trackers import TRACKERS, Tracker

# (metric, label, format): what a person watches, with every loss term between; everything else is in metrics.jsonl.
BEFORE_TERMS = (
    ("train/reward", "reward", "{:.3f}"),
    ("train/accuracy", "acc", "{:.3f}"),
    ("val/accuracy", "VAL", "{:.3f}"),
)
BEHIND_TERMS = (
    ("actor/grad_norm", "grad", "{:.2f}"),
    ("rollout/response_length_mean", "len", "{:.0f}"),
    ("rollout/log_prob_diff_max", "engine_diff", "{:.0e}"),
    ("timing_s/step", "s", "{:.1f}"),
)


@TRACKERS.register("console")
class ConsoleTracker(Tracker):
    """Prints through tqdm, which keeps the bar below the text."""

    def __init__(self, output_dir: str, config: Config) -> None:
        terms = [(term.metric, term.name, "{:.4f}") for term in build_terms(config.algorithm.terms)]
        self.columns = [*BEFORE_TERMS, *terms, *BEHIND_TERMS]

    def log(self, step: int, metrics: dict[str, float]) -> None:
        parts = [f"{label} {form.format(metrics[name])}" for name, label, form in self.columns if name in metrics]
        tqdm.write(f"step {step:>4}  " + "  ".join(parts))


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
