"""Files that several processes may want: writing so that nobody sees half a file, and locks on folders."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


class FolderInUse(ValueError):
    """Another process holds the folder; the message says which."""


@contextmanager
def hold_folder(path: str) -> Iterator[None]:
    """Hold the folder `path`, which need not exist yet, against every other process that calls this.

    The lock is the kernel's, on the file `.NAME.lock` beside the folder, so it ends with the process, however that
    ends, and the folder can be renamed under it. A file system without locks is a warning.

    Raises FolderInUse naming the process that holds it, its machine and its start.
    """
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    lock = os.path.join(folder, f".{name}.lock")
    while True:
        file = open(lock, "a+", encoding="utf-8")
        try:
            # A lock of fcntl, not of flock, which forks such as a loader's processes would hold on to.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise FolderInUse(f"'{path}' is in use by {holder}: wait for its end, or name another folder") from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): start no second run in it", path, error)
            break
        if os.path.exists(lock) and os.path.samestat(os.stat(lock), os.fstat(file.fileno())):
            break
        file.close()  # its last holder has removed it since
    holder = os.getpid()
    try:
        file.truncate(0)
        file.write(f"process {holder} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield
    finally:
        if os.getpid() == holder:  # and not a fork of it
            os.remove(lock)  # before the lock ends, so that whoever waits for this file sees that it is gone
        file.close()


@contextmanager
def atomic_path(path: str) -> Iterator[str]:
    """A temporary name beside `path`, for a file or a folder, renamed to `path` when the block succeeds.

    A folder that stands at `path` is replaced. When the block fails, what it wrote is removed and `path` is
    left as it was.
    """
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary, old = f"{path}.tmp{os.getpid()}", f"{path}.old{os.getpid()}"
    try:
        yield temporary
        if os.path.isdir(path):
            os.rename(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if os.path.isdir(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
        elif os.path.exists(temporary):
            os.remove(temporary)
        raise


def check_model_path(model_path: str) -> None:
    """Raise FileNotFoundError for what is meant as a folder and is none, before a hub is asked for it."""
    looks_local = model_path.startswith(("/", ".", "~")) or model_path.count("/") > 1
    if looks_local and not os.path.isfile(os.path.join(model_path, "config.json")):
        raise FileNotFoundError(
            f"worker.actor.model.model_path='{os.path.abspath(model_path)}' is no Hugging Face folder: "
            "it has no config.json"
        )
