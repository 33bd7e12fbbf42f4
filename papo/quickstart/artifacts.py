"""Folders that are either complete and described by their settings, or absent.

A folder is written under a temporary name and renamed when it is whole, so an interrupted run leaves no
half-written data behind. The settings that made it lie next to its files; equal settings mean it is reused.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from verl.utils.files import atomic_path

SETTINGS_FILE = "quickstart_settings.json"


def is_current(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether `folder` is complete and was made with exactly these settings (anything JSON can hold)."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return False
    return json.loads(path.read_text()) == json.loads(json.dumps(settings))


@contextmanager
def new_folder(final: Path, settings: Mapping[str, Any]) -> Iterator[Path]:
    """Give a temporary folder to fill; it takes the place of `final` when the block ends without an error.

    Raises:
        ValueError: `final` holds files that the quickstart did not make. They are never deleted.
    """
    if final.is_dir() and any(final.iterdir()) and not (final / SETTINGS_FILE).is_file():
        raise ValueError(f"{final} holds files that the quickstart did not make: give another folder or empty it.")
    with atomic_path(str(final)) as temporary:
        os.mkdir(temporary)
        yield Path(temporary)
        (Path(temporary) / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")
