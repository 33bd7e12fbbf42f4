"""`papo compare`: trains several presets over several seeds and says what difference they make.

Finished runs in the output folder are kept: after an interruption, or with more seeds, only the missing ones run. What
was made by other code, or from other data or another model, is made anew.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from tqdm import tqdm

from papo.evaluation.statistics import mean_and_interval, percent
from verl.config.compose import compose_config
from verl.utils.files import atomic_path

logger = logging.getLogger("compare")
SMOOTHING = 5  # steps
REPOSITORY = Path(__file__).resolve().parents[2]
CODE = ("verl/**/*.py", "papo/**/*.py", "configs/**/*.yaml", "examples/reward_function/*.py", "examples/**/*.jinja")


@dataclass(frozen=True)
class Variant:
    """A preset under a name, with overrides of its own."""

    name: str
    preset: str
    overrides: tuple[str, ...] = ()

    @staticmethod
    def parse(text: str) -> Variant:
        name, _, rest = text.rpartition(": ")
        words = shlex.split(rest)
        return Variant(name or words[0], words[0], tuple(words[1:]))


class Comparison:
    """Runs of variants over seeds on a task of configs/task, in folders of their own under `out`.

    Args:
        common: overrides of all variants.
        jobs: runs at a time, each on an equal share of the cores.

    Raises ValueError naming the variant or key at fault.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        seeds: Sequence[int],
        task: str,
        out: Path,
        common: Sequence[str] = (),
        jobs: int = 1,
    ) -> None:
        self.variants, self.seeds, self.task, self.out = list(variants), list(seeds), task, out.resolve()
        if len({self.folder(variant, 1) for variant in variants}) < len(variants):
            raise ValueError("two variants have the same name; give them names: 'NAME: PRESET key=value ...'")
        self.common, self.jobs = list(common), jobs
        # A mistake in the last variant is found before the first one trains.
        self.inputs = {variant.name: self._inputs(variant) for variant in self.variants}

    def folder(self, variant: Variant, seed: int) -> Path:
        return self.out / re.sub(r"[^a-zA-Z0-9.-]+", "_", variant.name) / f"seed{seed}"

    def overrides(self, variant: Variant, seed: int) -> list[str]:
        return [
            *(f"+task={self.task}", "trainer.val_before_train=false", "trainer.val_freq=0", "trainer.save_model=false"),
            *("trainer.save_freq=0", "trainer.logger=[jsonl]", f"trainer.seed={seed}", *self.common),
            *(*variant.overrides, f"trainer.output_dir={self.folder(variant, seed)}"),
        ]

    def _inputs(self, variant: Variant) -> str:
        """A digest of the local data and model that the variant's runs read."""
        config = compose_config(variant.preset, self.overrides(variant, 1))
        named = f"{config.data.train_files},{config.data.val_files},{config.worker.actor.model.model_path}"
        return digest_of([Path(name) for name in named.split(",") if os.path.exists(name)])

    def train(self) -> None:
        """Train what is missing, seed by seed, so that an interrupted comparison has all variants of the first seeds.

        Raises RuntimeError naming the runs that failed, after all others have ended.
        """
        todo = [(v, s) for s in self.seeds for v in self.variants if not self._is_done(v, s)]
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        shares: SimpleQueue[list[int]] = SimpleQueue()
        for job in range(self.jobs):
            shares.put(cores[job :: self.jobs])
        failed: list[str] = []

        def run(item: tuple[Variant, int]) -> None:
            share = shares.get()
            try:
                if share:
                    os.sched_setaffinity(0, share)  # of this thread, and of what it starts
                self._run(*item)
            except RuntimeError as error:
                failed.append(str(error))
            finally:
                shares.put(share)

        with ThreadPoolExecutor(self.jobs) as pool:
            list(tqdm(pool.map(run, todo), total=len(todo), unit="run", desc=self.task))
        if failed:
            raise RuntimeError("\n".join(failed))

    def _record(self, variant: Variant, seed: int) -> tuple[Path, dict[str, Any]]:
        """The file in which a finished run says what made it, and what that is now."""
        made_by = {"preset": variant.preset, "overrides": self.overrides(variant, seed)}
        made_by |= {"code": code_digest(), "inputs": self.inputs[variant.name]}
        return self.folder(variant, seed).with_suffix(".made_by.json"), made_by

    def _is_done(self, variant: Variant, seed: int) -> bool:
        path, made_by = self._record(variant, seed)
        return path.is_file() and json.loads(path.read_text()) == made_by

    def _run(self, variant: Variant, seed: int) -> None:
        """One run in a process of its own. Raises RuntimeError."""
        path, made_by = self._record(variant, seed)
        path.unlink(missing_ok=True)
        log = path.with_name(f"seed{seed}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "verl.trainer.main", "--config-name", variant.preset, *made_by["overrides"]]
        with open(log, "w", encoding="utf-8") as file:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False, cwd=REPOSITORY)
        if done.returncode != 0:
            raise RuntimeError(f"'{variant.name}' with seed {seed} failed with exit code {done.returncode}: see {log}")
        with atomic_path(str(path)) as temporary:
            Path(temporary).write_text(json.dumps(made_by))

    def metrics(self, variant: Variant, seed: int) -> list[dict[str, float]]:
        """The metrics of a run, step by step."""
        lines = (self.folder(variant, seed) / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def values(self, variant: Variant, metric: str) -> list[float]:
        """The last value of a metric in the run of each seed. Raises ValueError where a run has none."""
        found = []
        for seed in self.seeds:
            recorded = [record[metric] for record in self.metrics(variant, seed) if metric in record]
            if not recorded:
                raise ValueError(f"'{variant.name}' with seed {seed} has no metric {metric}")
            found.append(recorded[-1])
        return found

    def step_seconds(self, variant: Variant) -> float:
        """The median time of a step over all seeds."""
        records = [record for seed in self.seeds for record in self.metrics(variant, seed)]
        return float(np.median([record["timing_s/step"] for record in records if "timing_s/step" in record]))

    def first_event(self, variant: Variant, seed: int) -> int | None:
        """The step of the watchdog's first event, if there is one."""
        events = self.folder(variant, seed) / "events.jsonl"
        return json.loads(events.read_text().splitlines()[0])["step"] if events.is_file() else None

    def evaluate(self, metrics: Sequence[str]) -> list[dict[str, Any]]:
        """A row per variant: seconds of a step, and of each metric the values by seed, their mean and 95 % interval,
        and the difference to the first variant, paired by seed."""
        rows: list[dict[str, Any]] = []
        for variant in self.variants:
            row: dict[str, Any] = {"variant": variant.name, "step_seconds": self.step_seconds(variant)}
            for metric in metrics:
                values = self.values(variant, metric)
                found: dict[str, Any] = {"values": values}
                found["mean"], found["interval"] = mean_and_interval(values)
                if rows:
                    paired = np.subtract(values, rows[0][metric]["values"]).tolist()
                    found["difference"], found["difference_interval"] = mean_and_interval(paired)
                row[metric] = found
            rows.append(row)
        return rows


@functools.cache
def code_digest() -> str:
    """A digest of all code that a run's numbers follow from."""
    found = [path for pattern in CODE for path in REPOSITORY.glob(pattern)]
    return digest_of([path for path in found if REPOSITORY / "papo/tools" not in path.parents])


def digest_of(paths: Sequence[Path]) -> str:
    """A digest of files, and of all files in folders, by content and name."""
    files = {file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()}
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def table(rows: list[dict[str, Any]], metric: str) -> str:
    """A metric of all variants, in percent, as a Markdown table."""
    seeds = len(rows[0][metric]["values"])
    lines = [f"| | {metric}, % ({seeds} seeds) | against {rows[0]['variant']} | by seed |", "|---|---|---|---|"]
    for row in rows:
        found = row[metric]
        difference = percent(found["difference"], found["difference_interval"], "+") if "difference" in found else ""
        by_seed = ", ".join(percent(value) for value in found["values"])
        lines.append(f"| {row['variant']} | {percent(found['mean'], found['interval'])} | {difference} | {by_seed} |")
    return "\n".join(lines)


def draw(comparison: Comparison, metrics: Sequence[str], path: Path) -> None:
    """Each metric's running mean over steps, its mean over the seeds and the range they span; a dotted line is where
    the watchdog first spoke."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(metrics), figsize=(5.2 * len(metrics), 3.4), squeeze=False)
    for variant, color in zip(comparison.variants, plt.rcParams["axes.prop_cycle"].by_key()["color"] * 9, strict=False):
        runs = [comparison.metrics(variant, seed) for seed in comparison.seeds]
        events = [comparison.first_event(variant, seed) for seed in comparison.seeds]
        for axis, metric in zip(axes.flat, metrics, strict=True):
            curves = [running_mean([record[metric] for record in run if metric in record]) for run in runs]
            length = min(map(len, curves))
            if length == 0:
                continue
            curves = np.array([curve[:length] for curve in curves])
            steps = np.arange(1, length + 1)
            axis.plot(steps, curves.mean(0), color=color, label=variant.name)
            axis.fill_between(steps, curves.min(0), curves.max(0), color=color, alpha=0.15, linewidth=0)
            for step in filter(None, events):
                axis.axvline(step, color=color, linestyle=":", linewidth=1)
    for axis, metric in zip(axes.flat, metrics, strict=True):
        axis.set_title(metric, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    with atomic_path(str(path)) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


def running_mean(values: Sequence[float]) -> list[float]:
    return [float(np.mean(values[max(0, i - SMOOTHING + 1) : i + 1])) for i in range(len(values))]


def add_compare(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command to `papo`."""
    command = commands.add_parser("compare", help="train presets over several seeds and compare them")
    command.description = (
        "A variant is a preset, or 'NAME: PRESET key=value ...' for a preset with overrides of its own. Each is "
        "trained on the quickstart's digits (run `bash scripts/quickstart.sh` once before) or on another task. Prints, "
        "and writes to results.json, the metrics of validation after training: mean over seeds and its 95 % interval "
        "(Student's t), and the difference to the first variant, paired by seed; curves.png has the training curves. "
        "Finished runs are kept, and only what is missing or was made by other code or data runs."
    )
    command.add_argument("variants", nargs="+", metavar="VARIANT")
    command.add_argument("--seeds", type=seeds_of, default=seeds_of("5"), help="5 for 1 to 5, or 101,102 (default: 5)")
    command.add_argument("--task", default="digits", help="one of configs/task (default: %(default)s)")
    command.add_argument("--set", nargs="*", default=[], metavar="key=value", help="overrides of all variants")
    command.add_argument("--metrics", nargs="+", default=["val/accuracy"], metavar="METRIC", help="(default: accuracy)")
    command.add_argument("--plot", nargs="+", default=["train/reward", "actor/entropy"], metavar="METRIC")
    command.add_argument("--jobs", type=int, default=1, help="runs at a time, on an equal share of the cores each")
    command.add_argument("--out", type=Path, default=Path("outputs/compare"), help="(default: %(default)s)")
    command.set_defaults(run=compare)


def seeds_of(text: str) -> list[int]:
    """`5` is 1 to 5, `101,102` these."""
    seeds = [int(part) for part in text.split(",")]
    if min(seeds) < 1 or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"'{text}': a number of seeds, or different seeds such as 101,102")
    return seeds if len(seeds) > 1 else list(range(1, seeds[0] + 1))


def compare(options: argparse.Namespace) -> None:
    """Train, write results.json and curves.png, and print a table for each metric."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    variants = [Variant.parse(text) for text in options.variants]
    comparison = Comparison(variants, options.seeds, options.task, options.out, options.set, options.jobs)
    try:
        comparison.train()
    except RuntimeError as error:
        raise ValueError(error) from error
    rows = comparison.evaluate(options.metrics)
    with atomic_path(str(comparison.out / "results.json")) as temporary:
        Path(temporary).write_text(json.dumps(rows, indent=2) + "\n")
    draw(comparison, options.plot, comparison.out / "curves.png")
    for metric in options.metrics:
        logger.info("%s\n", table(rows, metric))
    logger.info("%s", os.path.relpath(comparison.out / "curves.png"))
