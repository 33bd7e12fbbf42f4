"""What stays the same over a run."""

from __future__ import annotations

from dataclasses import dataclass

from verl.algorithms.requirements import Requirements
from verl.algorithms.rewards import RewardKL
from verl.config.config import Config
from verl.config.sizes import Sizes
from verl.data.vision import VisionProcessor
from verl.trainer.workers import Workers


@dataclass(frozen=True)
class Run:
    config: Config
    sizes: Sizes
    requirements: Requirements
    vision: VisionProcessor
    workers: Workers
    total_steps: int
    reward_kl: RewardKL
