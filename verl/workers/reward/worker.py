"""RewardWorker: the reward manager in a Ray actor, so that scoring overlaps with the log-prob passes."""

from __future__ import annotations

from verl.config.worker import RewardConfig
from verl.utils.process import start_logging
from verl.workers.reward.base import Outcome, RewardInput
from verl.workers.reward.manager import RewardManager


class RewardWorker:
    def __init__(self, config: RewardConfig) -> None:
        start_logging("reward")
        self.manager = RewardManager(config)

    def ready(self) -> bool:
        """Returns when every grader process is ready. Raises RewardError where the functions cannot be loaded."""
        self.manager.start()
        return True

    def begin(self, expected: int) -> None:
        """See RewardManager.begin."""
        self.manager.begin(expected)

    def score(self, inputs: list[RewardInput]) -> list[Outcome]:
        """See RewardManager.score."""
        return self.manager.score(inputs)
