"""RewardWorker: the reward manager in a process of its own, so that scoring overlaps with the log-prob passes."""

from __future__ import annotations

from verl.config.worker import RewardConfig
from verl.utils.process import start_logging
from verl.workers.reward.manager import RewardInput, RewardManager, RewardScore


class RewardWorker:
    def __init__(self, config: RewardConfig) -> None:
        start_logging("reward")
        self.manager = RewardManager(config)

    def score(self, inputs: list[RewardInput]) -> list[RewardScore]:
        """See RewardManager.score."""
        return self.manager.score(inputs)

    def ready(self) -> bool:
        """Returns when the reward function has been loaded."""
        return True
