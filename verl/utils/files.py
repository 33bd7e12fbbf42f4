"""Writing so that a reader, or a crash, never sees half a file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager


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
