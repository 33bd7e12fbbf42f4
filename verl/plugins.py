"""Loads the packages and files that extend verl, before Hydra composes and first thing in every Ray worker."""

from __future__ import annotations

import importlib.metadata
import logging
import os

from verl.utils.imports import import_file
from verl.utils.process import WITHOUT_MODEL, quiet_libraries

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "verl.plugins"
ENVIRONMENT_VARIABLE = "VERL_PLUGINS"

_loaded: set[str] = set()


def load_plugins() -> None:
    """Call every entry point of the group `verl.plugins` and import every file named in `VERL_PLUGINS`.

    `VERL_PLUGINS` is a comma-separated list of Python files; Ray workers inherit it, so a loss term in a
    user's own file is known everywhere. Calling this again does nothing.

    Raises:
        FileNotFoundError: a file in `VERL_PLUGINS` does not exist.
    """
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        if entry_point.value not in _loaded:
            _loaded.add(entry_point.value)
            entry_point.load()()
    paths = [os.path.abspath(p.strip()) for p in os.environ.get(ENVIRONMENT_VARIABLE, "").split(",") if p.strip()]
    os.environ[ENVIRONMENT_VARIABLE] = ",".join(paths)  # workers may start in another folder
    for path in paths:
        if path not in _loaded:
            _loaded.add(path)
            import_file(path, named_by=f"the environment variable {ENVIRONMENT_VARIABLE}")


def prepare_worker() -> None:
    """The first thing in every Ray worker, before it unpickles anything: a config may hold classes of a plugin."""
    if os.environ.get(WITHOUT_MODEL) == "1":
        return
    quiet_libraries()
    load_plugins()
