"""SIGTERM and SIGINT: the first ends a run well, the second at once."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

from verl.config.trainer import OnSignal

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class RunInterrupted(Exception):
    """A signal has ended the run, and nothing is lost; the message says where it stands."""


class Interrupts:
    """Inside this context a first signal is a request to end, whose name is in `requested`.

    Where work may be abandoned, the signal also raises KeyboardInterrupt in the main thread: before training
    begins, and with OnSignal.stop_now in a step until its updates begin. It is a KeyboardInterrupt since Ray lets no
    other exception through while it waits. A second signal ends the process.
    """

    def __init__(self, on_signal: OnSignal) -> None:
        self.stops_now = on_signal == OnSignal.stop_now
        self.requested = ""
        self.may_leave = True

    def __enter__(self) -> Interrupts:
        here = threading.current_thread() is threading.main_thread()  # no other thread may set a handler
        self.earlier: dict[int, Any] = {n: signal.signal(n, self._handle) for n in SIGNALS} if here else {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def begin_training(self) -> None:
        """Keep everything that is done from here on."""
        self.may_leave = False

    def begin_step(self) -> None:
        """Generation and passes change nothing that a checkpoint holds."""
        self.may_leave = self.stops_now

    def begin_update(self) -> None:
        """Do not interrupt: until the next step, weights, records and the driver's state must agree."""
        self.may_leave = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested:
            logger.warning("%s again: ending at once, nothing is saved", name)
            os._exit(128 + number)
        self.requested = name
        if self.may_leave:
            logger.warning("%s: ending", name)
            raise KeyboardInterrupt
        logger.warning("%s: ending after this step; a second signal ends the run at once", name)
