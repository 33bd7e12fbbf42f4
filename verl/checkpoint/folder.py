"""The folder of a run's checkpoints: `global_step_<N>/` each, and `latest`, which names the newest whole one.

A checkpoint is written under a hidden name, brought to the disk, and renamed; `latest` moves last. So a crash at any
moment leaves the ones before it as they were.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
from collections.abc import Mapping
from typing import Any

from verl.checkpoint.files import FileEntry, files_in, seal, sync, write_manifest
from verl.utils.files import atomic_path

logger = logging.getLogger(__name__)

LATEST = "latest"
NAME = re.compile(r"global_step_(\d+)")
UNFINISHED = re.compile(r"\.global_step_\d+\.tmp|latest\.tmp\d+")


class CheckpointFolder:
    """`<run>/checkpoints`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def checkpoint(self, step: int) -> str:
        return os.path.join(self.path, f"global_step_{step}")

    def unfinished(self, step: int) -> str:
        return os.path.join(self.path, f".global_step_{step}.tmp")

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, whole or not, the newest first."""
        names = os.listdir(self.path) if os.path.isdir(self.path) else []
        return sorted((int(match[1]) for name in names if (match := NAME.fullmatch(name))), reverse=True)

    def latest(self) -> str | None:
        """The checkpoint that `latest` names; None where there is no such file."""
        path = os.path.join(self.path, LATEST)
        if not os.path.isfile(path):
            return None
        with open(path, encoding="utf-8") as file:
            return os.path.join(self.path, os.path.basename(file.read().strip()))

    def begin(self, step: int) -> str:
        """An empty folder to write the checkpoint of `step` into."""
        path = self.unfinished(step)
        shutil.rmtree(path, ignore_errors=True)
        os.makedirs(path)
        return path

    def commit(self, step: int, about: Mapping[str, Any], entries: Mapping[str, FileEntry]) -> str:
        """Make what was written for `step` the newest checkpoint; returns its path.

        `entries` are of files that their writers have sealed; the others are sealed here. Raises OSError, with
        everything as it was before, where the disk does not take it or a file is not to be seen from here. Where only
        `latest` cannot be written, that is a warning: the checkpoint is whole, and found by its name.
        """
        unfinished, path = self.unfinished(step), self.checkpoint(step)
        found = files_in(unfinished)
        if absent := sorted(set(entries) - set(found)):
            raise FileNotFoundError(
                f"{os.path.join(unfinished, absent[0])} was written by another node and is not to be seen from here: "
                "trainer.output_dir must be a folder that all nodes share"
            )
        rest = seal(unfinished, [name for name in found if name not in entries])
        write_manifest(unfinished, dict(about), dict(sorted({**entries, **rest}.items())))
        for folder, _, _ in os.walk(unfinished):
            sync(folder)
        os.rename(unfinished, path)
        try:
            sync(self.path)
            self._point_at(os.path.basename(path))
        except OSError as error:
            logger.warning("%s is whole, but %s/%s could not be written: %s", path, self.path, LATEST, error)
        return path

    def abandon(self, step: int) -> None:
        """Remove what was written for `step`."""
        shutil.rmtree(self.unfinished(step), ignore_errors=True)

    def remove_unfinished(self) -> None:
        """Remove what saves have left that were killed."""
        for name in sorted(os.listdir(self.path)) if os.path.isdir(self.path) else ():
            if UNFINISHED.fullmatch(name):
                path = os.path.join(self.path, name)
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
                logger.info("removed %s, which a save that was cut short had left", path)

    def prune(self, limit: int, keep: set[int]) -> None:
        """Remove all but the newest `limit` checkpoints (0: none is removed) and those of the steps in `keep`."""
        for step in self.steps()[limit:] if limit else ():
            if step not in keep:
                # Under this name it is no checkpoint, even where the removal is cut short.
                os.rename(self.checkpoint(step), self.unfinished(step))
                self.abandon(step)

    def set_aside(self, step: int) -> str:
        """Rename the checkpoint of `step`, so that it is none of this run's; returns its new path."""
        path = self.checkpoint(step)
        number = next(n for n in itertools.count(1) if not os.path.exists(f"{path}.aside-{n}"))
        os.rename(path, f"{path}.aside-{number}")
        return f"{path}.aside-{number}"

    def _point_at(self, name: str) -> None:
        with atomic_path(os.path.join(self.path, LATEST)) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write(name + "\n")
            file.flush()
            os.fsync(file.fileno())
        sync(self.path)
