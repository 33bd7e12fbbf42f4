"""Trackers of metrics. Importing this registers every tracker and imports none of their packages."""

from verl.tracking.local import ConsoleTracker, JsonlTracker
from verl.tracking.services import MLflowTracker, SwanLabTracker, TensorBoardTracker, WandbTracker
from verl.tracking.trackers import TRACKERS, Row, Tracker, Trackers, check_trackers

__all__ = [
    "TRACKERS",
    "ConsoleTracker",
    "JsonlTracker",
    "MLflowTracker",
    "Row",
    "SwanLabTracker",
    "TensorBoardTracker",
    "Tracker",
    "Trackers",
    "WandbTracker",
    "check_trackers",
]
