"""Launch of a run: checks first, then training or a dry run, and the lines that a person reads at the end."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import ExitStack

from verl.checkpoint.tensors import SaveFailed
from verl.config.config import Config
from verl.single_controller.preflight import ClusterError
from verl.trainer.checkpoints import ResumeError
from verl.trainer.dry_run import dry_run, in_small
from verl.trainer.plan import make_plan
from verl.trainer.ray_trainer import RayTrainer
from verl.utils.files import hold_folder
from verl.utils.interrupts import RunInterrupted
from verl.workers.memory import OutOfDeviceMemory
from verl.workers.reward.base import RewardError

logger = logging.getLogger("verl")


def launch(config: Config, dry: bool) -> None:
    """Check the config against what it names, and train, or try that with the largest sample (`dry`).

    Exits with 1 and a line that says why where the config, a file that it names, the cluster or a reward is at fault.
    """
    with ExitStack() as held:
        try:
            plan = make_plan(in_small(config) if dry else config)
            if not dry:
                held.enter_context(hold_folder(plan.config.trainer.output_dir))
            trainer = None if dry else RayTrainer(plan)
            if trainer:
                trainer.open()
        except (ValueError, FileNotFoundError) as error:
            logger.debug("where it was found", exc_info=True)
            sys.exit(f"error: {error}")
        try:
            lines = describe(trainer.fit(), trainer.run_dir.path) if trainer else dry_run(plan)
        except RunInterrupted as ended:
            logger.info("%s", ended)
            return
        except (ClusterError, ConnectionError, OutOfDeviceMemory, ResumeError, RewardError, SaveFailed) as error:
            sys.exit(f"error: {getattr(error, 'cause', error)}")  # the cause: without Ray's account of its calls
        for line in lines:
            logger.info(line)


def describe(summary: dict[str, float], run_dir: str) -> list[str]:
    """The end of a run in a few lines: what changed, and where everything is."""
    lines = [f"done: {summary['steps']} steps in {summary['seconds']:.0f} s"]
    before, after = summary.get("val_accuracy_before"), summary.get("val_accuracy_after")
    if before is not None and after is not None:
        lines.append(
            f"validation accuracy: {before:.1%} before, {after:.1%} after ({100 * (after - before):+.1f} points)"
        )
    for name, form in (("val_accuracy", ".1%"), ("val_reward", ".4f")):  # of a run that only validates
        if name in summary:
            lines.append(f"{name.replace('val_', 'validation ')}: {summary[name]:{form}}")
    names = ("summary.json", "curves.png", "metrics.jsonl", "samples.jsonl", "events.jsonl", "config.yaml")
    names += ("model", "checkpoints")
    found = [os.path.relpath(os.path.join(run_dir, n)) for n in names if os.path.exists(os.path.join(run_dir, n))]
    return [*lines, *(f"  {path}" for path in found)]
