"""All trackers of a run as one."""

from __future__ import annotations

import logging
from collections.abc import Callable

from verl.config.config import Config
from verl.tracking.registry import TRACKERS, Row, Tracker

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
