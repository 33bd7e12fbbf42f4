"""Trackers: the base class, the table of those there are, and all of a run as one."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable

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


logger = logging.getLogger(__name__)


class Trackers:
    """The trackers that `trainer.logger` names.

    One that fails while the run goes on is switched off, and the log says why: a server that is away must not cost
    days of training. The record's own failure is raised.

    Raises ValueError for one that does not start.
    """

    def __init__(self, output_dir: str, config: Config) -> None:
        self.active: dict[str, Tracker] = {}
        for name in config.trainer.logger:
            try:
                self.active[name] = TRACKERS[name](output_dir, config)
            except Exception as error:
                self.close(succeeded=False)
                raise ValueError(f"trainer.logger: '{name}' does not start: {in_words(error)}") from error

    @property
    def show_generations(self) -> bool:
        """Whether there is any use in making thumbnails."""
        return any(type(t).log_generations is not Tracker.log_generations for t in self.active.values())

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._each(lambda tracker: tracker.log(step, metrics))

    def log_generations(self, step: int, rows: list[Row]) -> None:
        self._each(lambda tracker: tracker.log_generations(step, rows))

    def close(self, succeeded: bool) -> None:
        self._each(lambda tracker: tracker.close(succeeded))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.active.items()):
            try:
                call(tracker)
            except Exception as error:
                if tracker.is_record:
                    raise
                del self.active[name]
                logger.warning(
                    "the tracker '%s' has failed and is switched off for the rest of the run, which goes on: %s",
                    name,
                    in_words(error),
                    exc_info=True,
                )


def in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
