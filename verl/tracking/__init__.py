"""Where metrics go. Importing this registers every tracker and imports none of their packages."""

from verl.tracking.console import ConsoleTracker
from verl.tracking.jsonl import JsonlTracker
from verl.tracking.mlflow import MLflowTracker
from verl.tracking.registry import TRACKERS, Row, Tracker, check_trackers
from verl.tracking.swanlab import SwanLabTracker
from verl.tracking.tensorboard import TensorBoardTracker
from verl.tracking.trackers import Trackers
from verl.tracking.wandb import WandbTracker

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
