"""Checkpoints of a run: saving them while training goes on, and finding and restoring the one a run goes on from.

A save that fails leaves the checkpoints before it as they are, and training goes on.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from omegaconf import OmegaConf

from verl.checkpoint.files import BrokenCheckpoint, load_plain, save_plain, verify
from verl.checkpoint.folder import CheckpointFolder
from verl.checkpoint.tensors import SaveFailed
from verl.config.config import Config
from verl.single_controller.worker_group import WorkerGroup
from verl.tracking.run_info import settings
from verl.trainer.state import TrainState
from verl.trainer.workers import Workers

logger = logging.getLogger(__name__)

STATE = "trainer.pt"


@dataclass
class Save:
    """A checkpoint that is being written."""

    step: int
    best_step: int | None
    started: float


class Checkpointer:
    """Writes the run's checkpoints, one at a time. With `trainer.async_save` a save goes on beside training, until
    `poll` or the next save finds its end."""

    def __init__(self, config: Config, workers: Workers, state: TrainState) -> None:
        self.folder = checkpoints_of(config)
        self.config, self.workers, self.state = config, workers, state
        groups = {"actor": workers.actor, "critic": workers.critic}
        self.groups: dict[str, WorkerGroup] = {role: group for role, group in groups.items() if group is not None}
        self.pending: Save | None = None
        self.failure = ""  # of the last save

    def driver_state(self) -> dict[str, Any]:
        """The content of trainer.pt."""
        return {**self.state.state_dict(), "weight_version": self.workers.rollout.version}

    def save_once(self, state: dict[str, Any]) -> None:
        """Save, unless there is a checkpoint of that step."""
        self.finish()
        if not os.path.exists(self.folder.checkpoint(state["step"])):
            self.save(state)

    def save(self, state: dict[str, Any] | None = None) -> None:
        """Begin a checkpoint of the step that is done, after the end of the one before.

        Args:
            state: The content of trainer.pt; by default the current state.
        """
        self.finish()
        trainer, state = self.config.trainer, state or self.driver_state()
        step = state["step"]
        self.pending = Save(step, state["best_step"], time.perf_counter())
        try:
            path = self.folder.begin(step)
            for role in self.groups:
                os.mkdir(os.path.join(path, role))
            save_plain(os.path.join(path, STATE), state)
        except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
            self._fail([str(error)])
            return
        for role, group in self.groups.items():
            group.start_save(os.path.join(path, role), not trainer.save_model_only, trainer.async_save)
        if not trainer.async_save:
            self.finish()

    def poll(self) -> None:
        """Make the checkpoint that is being written the newest one, where all have written their part."""
        if self.pending is not None and all(group.save_is_done() for group in self.groups.values()):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and make it the newest one."""
        if self.pending is None:
            return
        files, reasons = {}, []
        for role, group in self.groups.items():
            written, failed = group.finish_save()
            files |= {f"{role}/{name}": entry for name, entry in written.items()}
            reasons += [f"{role}, {reason}" for reason in failed]
        if reasons:
            self._fail(reasons)
            return
        pending, trainer = self.pending, self.config.trainer
        about = {
            "step": pending.step,
            "world_size": self.workers.actor.size,
            "model_only": trainer.save_model_only,
            "config": settings(self.config),
        }
        try:
            path = self.folder.commit(pending.step, about, files)
        except OSError as error:
            self._fail([str(error)])
            return
        self.pending, self.failure = None, ""
        logger.info("saved %s (%.1f s)", path, time.perf_counter() - pending.started)
        self.folder.prune(trainer.save_limit, keep={pending.best_step} - {None})

    def close(self) -> None:
        """Wait for the last save. Raises SaveFailed where it failed: the run would end without its last steps."""
        self.finish()
        if self.failure:
            raise SaveFailed(self.failure)

    def rescue(self) -> None:
        """After an error in training: what is being written becomes a checkpoint, where its writers are still there."""
        try:
            self.finish()
        except ray.exceptions.RayError as error:
            logger.warning("the checkpoint of step %d is lost with its writers: %s", self.pending.step, error)

    def _fail(self, reasons: list[str]) -> None:
        step, self.pending = self.pending.step, None
        self.folder.abandon(step)
        free = shutil.disk_usage(os.path.dirname(self.folder.path)).free
        self.failure = (
            f"the checkpoint of step {step} could not be saved in {self.folder.path} ({free / 2**30:.1f} GiB free): "
            f"{'; '.join(reasons)}. Newest whole checkpoint: {self.folder.latest() or 'none'}"
        )
        logger.error("%s. Training goes on; the next save tries again", self.failure)


AUTO, NEVER = "auto", "never"

# Names and outputs change no number of a run.
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

# Settings that identify an experiment.
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
    """The checkpoint that `trainer.resume` asks for; None for a new run. Leftovers of killed saves are removed.

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


def restore(point: ResumePoint, config: Config, workers: Workers, state: TrainState) -> None:
    """Bring workers, driver and engines to where the checkpoint was saved. Raises ResumeError where it does not fit."""
    workers.rollout.sleep()  # optimizer states need the memory that engines have taken
    try:
        for role, group in (("actor", workers.actor), ("critic", workers.critic)):
            if group is not None:
                group.load_state(point.folder(role))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise ResumeError(str(error.cause)) from error
        raise
    state.load_state_dict(point.state, config, set(point.changed))
    # The engines have not got these weights yet: the sync that follows brings them to this version.
    workers.rollout.version = point.state["weight_version"] - 1
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
