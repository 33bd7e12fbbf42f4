"""What a tracker is, and which there are."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from PIL import Image

from verl.config.config import Config
from verl.registry import Registry

# One validated response: its texts by name, numbers `score/...`, and thumbnails. Rows may differ in their columns.
Row = dict[str, str | float | Image.Image]


class Tracker:
    """Base of every tracker. It is made when a run starts, and takes the metrics of each step once, in order.

    `package` is what it imports: also the name of its extra in setup.py. It is imported only in `__init__`, so that
    nobody needs it who does not name the tracker. The failure of a tracker that `is_record` ends the run.
    """

    package: str | None = None
    is_record = False

    def __init__(self, output_dir: str, config: Config) -> None:
        pass

    def log(self, step: int, metrics: dict[str, float]) -> None:
        raise NotImplementedError

    def log_generations(self, step: int, rows: list[Row]) -> None:
        """Show some responses of a validation. Nothing by default: samples.jsonl has their texts in any case."""

    def close(self, succeeded: bool) -> None:
        """Nothing is logged any more."""


TRACKERS: Registry[type[Tracker]] = Registry("tracker (trainer.logger)")


def check_trackers(names: Iterable[str]) -> None:
    """Raise ValueError where `trainer.logger` names a tracker that is unknown or whose package is not installed."""
    for name in names:
        package = TRACKERS[name].package
        if package and not is_installed(package):
            raise ValueError(
                f"trainer.logger names '{name}', and the package {package} is not installed: run "
                f"`pip install -e '.[{package}]'`, or take '{name}' out of trainer.logger"
            )


def is_installed(package: str) -> bool:
    """Whether `package` can be imported. A folder of that name is none: some trackers leave one where they ran."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
