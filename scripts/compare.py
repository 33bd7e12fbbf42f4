"""Trains several presets over several seeds and says what difference they make.

    python scripts/compare.py grpo papo_grpo dapo papo_dapo --seeds 5 [--set key=value ...]

A variant is a preset, or "NAME: PRESET key=value ..." for a preset with overrides of its own. Each is trained on the
quickstart's digits (run `bash scripts/quickstart.sh` once before) or, with `--task NAME`, on configs/task/NAME.yaml.
Finished runs in the output folder are kept: after an interruption, or with more seeds, only the missing ones run. What
was made by other code (verl, papo, configs, examples) or from other data is made anew.

Prints, and writes to results.json, the validation accuracy after training: mean over seeds and its 95 % interval
(Student's t), and the difference to the first variant, paired by seed. curves.png has the training curves; a dotted
line is where the watchdog first spoke.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)
import numpy as np  # noqa: E402
from scipy.stats import t as student  # noqa: E402
from tqdm import tqdm  # noqa: E402

from verl.config.compose import compose_config  # noqa: E402
from verl.utils.files import atomic_path  # noqa: E402

logger = logging.getLogger("compare")
SMOOTHING = 5  # steps
REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Variant:
    """A preset under a name, with overrides of its own."""

    name: str
    preset: str
    overrides: tuple[str, ...]

    @staticmethod
    def parse(text: str) -> Variant:
        name, _, rest = text.rpartition(": ")
        words = shlex.split(rest)
        return Variant(name or words[0], words[0], tuple(words[1:]))

    def arguments(self, seed: int, task: str, common: Sequence[str], out: Path) -> list[str]:
        """The command line of one run, without the interpreter."""
        return [
            *("-m", "verl.trainer.main", "--config-name", self.preset, f"+task={task}"),
            *(
                "trainer.val_before_train=false",
                "trainer.val_freq=0",
                "trainer.save_model=false",
                "trainer.save_freq=0",
            ),
            *("trainer.logger=[jsonl]", f"trainer.seed={seed}", *common, *self.overrides),
            f"trainer.output_dir={self.folder(out, seed)}",
        ]

    def folder(self, out: Path, seed: int) -> Path:
        return out / re.sub(r"[^\w.-]+", "_", self.name) / f"seed{seed}"


@functools.cache
def code_digest() -> str:
    """A digest of all files that a run's numbers follow from, besides its command."""
    digest = hashlib.sha256()
    for folder in ("verl", "papo", "configs", "examples", "outputs/quickstart_assets"):
        for path in sorted(p for p in (REPOSITORY / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts):
            digest.update(f"{path.relative_to(REPOSITORY)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def train(variant: Variant, seed: int, arguments: list[str], out: Path) -> None:
    """One run in a process of its own, or nothing where the same command has finished before. Raises RuntimeError."""
    folder = variant.folder(out, seed)
    record, log = folder.with_suffix(".command.json"), folder.with_suffix(".log")
    made_by = {"arguments": arguments, "code": code_digest()}
    if record.is_file() and json.loads(record.read_text()) == made_by:
        return
    record.unlink(missing_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, *arguments], stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"'{variant.name}' with seed {seed} failed with exit code {done.returncode}: see {log}")
    with atomic_path(str(record)) as temporary:
        Path(temporary).write_text(json.dumps(made_by))


def train_all(variants: list[Variant], options: argparse.Namespace) -> None:
    """All runs one after the other, each with the whole machine; the first failure ends the comparison."""
    # Seed by seed, so that an interrupted comparison has all variants of the first seeds.
    todo = [(variant, seed) for seed in options.seeds for variant in variants]
    for variant, seed in (bar := tqdm(todo, unit="run")):
        bar.set_postfix_str(f"{variant.name}, seed {seed}")
        train(variant, seed, variant.arguments(seed, options.task, options.set, options.out), options.out)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half the width of its 95 % interval, by Student's t; nan for a single value."""
    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(student.ppf(0.975, len(values) - 1) * error)


def evaluate(variants: list[Variant], seeds: Sequence[int], out: Path) -> list[dict[str, Any]]:
    """A row per variant: the accuracies by seed, their mean, the difference to the first variant, and seconds."""
    rows: list[dict[str, Any]] = []
    for variant in variants:
        summaries = [json.loads((variant.folder(out, seed) / "summary.json").read_text()) for seed in seeds]
        accuracy = [100 * summary["val_accuracy_after"] for summary in summaries]
        row = {"variant": variant.name, "accuracy": accuracy, "seconds": [s["seconds"] for s in summaries]}
        row["mean"], row["interval"] = mean_and_interval(accuracy)
        if rows:
            paired = np.subtract(accuracy, rows[0]["accuracy"]).tolist()
            row["difference"], row["difference_interval"] = mean_and_interval(paired)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], seeds: Sequence[int]) -> str:
    """The rows as a Markdown table."""
    lines = [f"| | accuracy, % ({len(seeds)} seeds) | against {rows[0]['variant']} | by seed |", "|---|---|---|---|"]
    for row in rows:
        difference = f"{row['difference']:+.1f} ± {row['difference_interval']:.1f}" if "difference" in row else ""
        by_seed = ", ".join(f"{value:.1f}" for value in row["accuracy"])
        lines.append(f"| {row['variant']} | {row['mean']:.1f} ± {row['interval']:.1f} | {difference} | {by_seed} |")
    return "\n".join(lines)


def draw(variants: list[Variant], seeds: Sequence[int], metrics: Sequence[str], out: Path) -> None:
    """curves.png: each metric's running mean over steps, its mean over the seeds and the range they span."""
    figure, axes = plt.subplots(1, len(metrics), figsize=(5.2 * len(metrics), 3.4), squeeze=False)
    for variant, color in zip(variants, plt.rcParams["axes.prop_cycle"].by_key()["color"] * 9, strict=False):
        folders = [variant.folder(out, seed) for seed in seeds]
        runs = [[json.loads(line) for line in open(f / "metrics.jsonl", encoding="utf-8")] for f in folders]
        spoken = [step for folder in folders if (step := first_event(folder)) is not None]
        for axis, metric in zip(axes.flat, metrics, strict=True):
            curves = [running_mean([record[metric] for record in run if metric in record]) for run in runs]
            length = min(map(len, curves))
            if length == 0:
                continue
            curves = np.array([curve[:length] for curve in curves])
            steps = np.arange(1, length + 1)
            axis.plot(steps, curves.mean(0), color=color, label=variant.name)
            axis.fill_between(steps, curves.min(0), curves.max(0), color=color, alpha=0.15, linewidth=0)
            for step in spoken:
                axis.axvline(step, color=color, linestyle=":", linewidth=1)
    for axis, metric in zip(axes.flat, metrics, strict=True):
        axis.set_title(metric, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    with atomic_path(str(out / "curves.png")) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def running_mean(values: Sequence[float]) -> list[float]:
    return [float(np.mean(values[max(0, i - SMOOTHING + 1) : i + 1])) for i in range(len(values))]


def first_event(folder: Path) -> int | None:
    """The step of the watchdog's first event, if there is one."""
    events = folder / "events.jsonl"
    return json.loads(events.read_text().splitlines()[0])["step"] if events.is_file() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", help="PRESET, or 'NAME: PRESET key=value ...'")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 1 (default: %(default)s)")
    parser.add_argument("--task", default="digits", help="one of configs/task (default: %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="overrides of all variants")
    parser.add_argument("--plot", nargs="+", default=["train/reward", "actor/entropy"], metavar="METRIC")
    parser.add_argument("--out", type=Path, default=Path("outputs/compare"), help="(default: %(default)s)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.seeds < 1:
        parser.error("--seeds: 1 or more")
    options.seeds, options.out = range(1, options.seeds + 1), options.out.resolve()
    variants = [Variant.parse(text) for text in options.variants]
    if len({variant.name for variant in variants}) < len(variants):
        parser.error("two variants have the same name; give them names: 'NAME: PRESET key=value ...'")
    try:
        for variant in variants:  # a mistake in the last one is found before the first one trains
            compose_config(variant.preset, variant.arguments(1, options.task, options.set, options.out)[4:])
        train_all(variants, options)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    rows = evaluate(variants, options.seeds, options.out)
    with atomic_path(str(options.out / "results.json")) as temporary:
        Path(temporary).write_text(json.dumps(rows, indent=2) + "\n")
    draw(variants, options.seeds, options.plot, options.out)
    logger.info("%s\n\n%s", table(rows, options.seeds), os.path.relpath(options.out / "curves.png"))


if __name__ == "__main__":
    main()
