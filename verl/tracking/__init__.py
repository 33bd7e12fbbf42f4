"""Where metrics go."""

from verl.tracking.console import ConsoleTracker
from verl.tracking.jsonl import JsonlTracker
from verl.tracking.registry import TRACKERS, Tracker

__all__ = ["TRACKERS", "ConsoleTracker", "JsonlTracker", "Tracker"]
