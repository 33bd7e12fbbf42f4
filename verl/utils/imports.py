"""Functions and modules from files that users name."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType


def import_file(path: str, named_by: str) -> ModuleType:
    """Execute the Python file at `path` as a module of its own. `named_by` says in errors who asked for it."""
    path = os.path.abspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{named_by} names '{path}', and there is no such file")
    # The name carries the folder too: two files called math.py must not replace each other.
    digest = hashlib.sha1(path.encode()).hexdigest()[:8]
    name = f"verl_user_{os.path.splitext(os.path.basename(path))[0]}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{named_by} names '{path}', which is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def import_function(reference: str, key: str) -> Callable:
    """The function that `reference`, written `path/to/file.py:function`, names.

    Raises:
        ValueError: no function part, or the file has no such function; the message names the config `key`.
        FileNotFoundError: no such file.
    """
    path, separator, name = reference.rpartition(":")
    if not separator or not path or not name:
        raise ValueError(f"{key}='{reference}': write it as path/to/file.py:function")
    module = import_file(path, named_by=key)
    function = getattr(module, name, None)
    if not callable(function):
        known = ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_")) or "none"
        raise ValueError(f"{key}: '{path}' has no function '{name}'; functions there: {known}")
    return function
