"""Saves checkpoints of a run. One that fails leaves those before it as they are, and training goes on."""

from __future__ import annotations

import logging
import os
import shutil
import time
from dataclasses import dataclass

import ray

from verl.checkpoint.files import save_plain
from verl.checkpoint.folder import CheckpointFolder
from verl.checkpoint.tensors import SaveFailed
from verl.single_controller.worker_group import WorkerGroup
from verl.tracking.run_info import settings
from verl.trainer.progress import Driver

logger = logging.getLogger(__name__)

STATE = "trainer.pt"


@dataclass
class Pending:
    """A checkpoint that is being written."""

    step: int
    best_step: int | None
    started: float


class Checkpointer:
    """Writes checkpoints into `folder`, one at a time. With `trainer.async_save` a save goes on beside training, until
    `poll` or the next save finds its end."""

    def __init__(self, folder: CheckpointFolder, driver: Driver) -> None:
        self.folder = folder
        self.driver = driver
        self.config = driver.run.config
        workers = driver.run.workers
        groups = {"actor": workers.actor, "critic": workers.critic}
        self.groups: dict[str, WorkerGroup] = {role: group for role, group in groups.items() if group is not None}
        self.pending: Pending | None = None
        self.failure = ""  # of the last save

    def save(self) -> None:
        """Begin a checkpoint of the step that is done, after the end of the one before."""
        self.finish()
        trainer, progress = self.config.trainer, self.driver.progress
        self.pending = Pending(progress.step, progress.best_step, time.perf_counter())
        state = self.driver.state_dict()
        try:
            path = self.folder.begin(progress.step)
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
            "world_size": self.driver.run.sizes.ranks,
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
