"""Where a run goes on: the newest whole checkpoint of its folder, or the one that is named."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field
from typing import Any

import ray
from omegaconf import OmegaConf

from verl.checkpoint.files import BrokenCheckpoint, load_plain, verify
from verl.checkpoint.folder import CheckpointFolder
from verl.config.config import Config
from verl.tracking.run_info import settings
from verl.trainer.checkpointer import STATE
from verl.trainer.progress import Driver

logger = logging.getLogger(__name__)

AUTO, NEVER = "auto", "never"

# What a run leaves behind or is called changes none of its numbers.
WITHOUT_EFFECT = (
    "trainer.project_name",
    "trainer.experiment_name",
    "trainer.output_dir",
    "trainer.logger",
    "trainer.resume",
    "trainer.save_",
    "trainer.async_save",
    "trainer.samples_per_step",
    "trainer.val_generations_to_log",
    "trainer.cluster_timeout_s",
)

# What makes a run the experiment that it is: with other settings of these it is another one.
EXPERIMENT = (
    "algorithm.adv_estimator",
    "algorithm.shapers.",
    "algorithm.terms.",
    "algorithm.views.",
    "worker.actor.model.lora.",
    "worker.actor.model.model_path",
    "worker.critic.model_path",
    "worker.ref.model_path",
)


class ResumeError(ValueError):
    """A checkpoint that this run cannot go on from; the message names the key or the file."""


@dataclass
class ResumePoint:
    """A whole checkpoint that the run goes on from.

    Attributes:
        own: Whether it is in this run's folder, whose records go on too.
        changed: {key: (then, now)} of settings that are no longer what they were and matter.
    """

    path: str
    step: int
    state: dict[str, Any]
    own: bool
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def folder(self, role: str) -> str:
        """The checkpoint's folder of a role. Raises ResumeError where it has none."""
        path = os.path.join(self.path, role)
        if not os.path.isdir(path):
            raise ResumeError(
                f"{self.path} has no {role}, which this run has (algorithm.adv_estimator): begin anew with "
                "trainer.resume=never"
            )
        return path


def checkpoints_of(config: Config) -> CheckpointFolder:
    return CheckpointFolder(os.path.join(os.path.abspath(config.trainer.output_dir), "checkpoints"))


def find_resume_point(config: Config) -> ResumePoint | None:
    """What `trainer.resume` asks for; None where the run begins anew. What killed saves have left is removed.

    Raises BrokenCheckpoint for a checkpoint that is named and cannot be used.
    """
    folder, wanted = checkpoints_of(config), config.trainer.resume
    folder.remove_unfinished()
    if wanted == NEVER or config.trainer.val_only:
        return None
    if wanted != AUTO and not _began_with(config, wanted):
        point = _open(os.path.abspath(wanted), config)
    else:
        point = _newest(folder, config) or (_open(os.path.abspath(wanted), config) if wanted != AUTO else None)
    if point is not None:
        logger.info("going on from %s, after step %d", point.path, point.step)
    return point


def refuse_another_experiment(point: ResumePoint, config: Config) -> None:
    """Raise ResumeError where a checkpoint that nobody has named is of another model, other terms or other views."""
    if point.path == os.path.abspath(config.trainer.resume):
        return
    differs = {key: pair for key, pair in point.changed.items() if key.startswith(EXPERIMENT)}
    if differs:
        lines = "".join(f"\n  {key}: {json.dumps(then)} -> {json.dumps(now)}" for key, (then, now) in differs.items())
        raise ResumeError(
            f"the run in {config.trainer.output_dir} is another experiment, and this one would go on from its step "
            f"{point.step}:{lines}\ntrainer.resume=never begins anew and moves that run aside; "
            f"trainer.resume={point.path} goes on from it with the new settings; another trainer.experiment_name or "
            "trainer.output_dir leaves it alone"
        )


def set_aside_later(point: ResumePoint, config: Config) -> None:
    """Rename what this run's folder has of later steps: broken checkpoints, and those of another course."""
    folder = checkpoints_of(config)
    for step in folder.steps():
        if point.own and step > point.step:
            logger.warning("the checkpoint of step %d is not gone on from and is now %s", step, folder.set_aside(step))


def restore(point: ResumePoint, driver: Driver) -> None:
    """Bring workers, driver and engines to where the checkpoint was saved. Raises ResumeError where it does not fit."""
    workers = driver.run.workers
    try:
        for role, group in (("actor", workers.actor), ("critic", workers.critic)):
            if group is not None:
                group.load_state(point.folder(role))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise ResumeError(str(error.cause)) from error
        raise
    driver.load_state_dict(point.state, set(point.changed))
    workers.rollout.sleep()
    workers.rollout.sync_weights(workers.actor)


def _began_with(config: Config, path: str) -> bool:
    """Whether the folder is of a run that was started with this very `trainer.resume`: it goes on, then."""
    own = os.path.join(os.path.abspath(config.trainer.output_dir), "config.yaml")
    if os.path.dirname(os.path.abspath(path)) == checkpoints_of(config).path or not os.path.isfile(own):
        return False
    return OmegaConf.select(OmegaConf.load(own), "trainer.resume") == path


def _newest(folder: CheckpointFolder, config: Config) -> ResumePoint | None:
    """The newest checkpoint that can be gone on from; those that cannot are said by name."""
    for step in folder.steps():
        try:
            return _open(folder.checkpoint(step), config)
        except BrokenCheckpoint as error:
            logger.warning("skipped a checkpoint: %s", error)
    if folder.steps():
        logger.warning("%s has no checkpoint that can be gone on from: the run begins anew", folder.path)
    return None


def _open(path: str, config: Config) -> ResumePoint:
    """Check a checkpoint's files and read the driver's part."""
    logger.info("checking the files of %s", path)
    manifest = verify(path)
    if manifest["model_only"]:
        raise BrokenCheckpoint(f"{path} was saved with trainer.save_model_only=true: it can be exported, not resumed")
    state = load_plain(os.path.join(path, STATE))
    changed = changes(manifest["config"], settings(config))
    for key, (old, new) in changed.items():
        logger.warning("changed since the checkpoint: %s: %s -> %s", key, json.dumps(old), json.dumps(new))
    own = os.path.dirname(path) == checkpoints_of(config).path
    return ResumePoint(path, manifest["step"], state, own, changed)


def changes(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """{key: (old, new)} of all settings that differ and may change numbers; a key that is missing counts as null."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted({*old, *new}):
        key, before, after = f"{prefix}{name}", old.get(name), new.get(name)
        if key.startswith(WITHOUT_EFFECT):
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            found |= changes(before, after, f"{key}.")
        elif before != after:
            found[key] = (before, after)
    return found
