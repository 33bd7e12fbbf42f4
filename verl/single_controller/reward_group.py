"""The reward as the driver sees it: asked first and waited for later."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

import ray
from ray.exceptions import RayTaskError

from verl.config.config import Config
from verl.single_controller.resources import Layout, actor_options
from verl.utils.process import WITHOUT_MODEL
from verl.workers.reward.base import Outcome, RewardError, RewardInput
from verl.workers.reward.manager import record
from verl.workers.reward.worker import RewardWorker

logger = logging.getLogger(__name__)


@dataclass
class Tally:
    """Counts of all responses that were graded for a step or a validation, and of those that could not be."""

    graded: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def metrics(self) -> dict[str, float]:
        """`failed_frac`, and `failed/REASON` for each reason: shares of what was graded."""
        shares = {f"failed/{reason}": count / self.graded for reason, count in self.reasons.items()}
        return {"failed_frac": self.reasons.total() / self.graded, **shares}


@dataclass
class Scoring:
    """Responses that are being graded, the list[Outcome] to come, and where they are counted."""

    inputs: list[RewardInput]
    outcomes: ray.ObjectRef
    tally: Tally


class RewardGroup:
    """The actor whose processes grade. Responses that could not be graded are counted, reported, and kept as records
    until `take_failures`."""

    def __init__(self, config: Config, layout: Layout) -> None:
        worker = ray.remote(RewardWorker).options(**actor_options(layout, None, 0, 0, 1, **{WITHOUT_MODEL: "1"}))
        self.worker = worker.remote(config.worker.reward)
        self.tally = Tally()
        self.failed: list[dict] = []

    def build(self) -> None:
        """Wait until everything is ready. Raises RewardError where a reward function cannot be loaded."""
        _get(self.worker.ready.remote())

    def begin(self, expected: int) -> Tally:
        """A step or a validation begins, in which `expected` responses or more will be graded; returns where all that
        is graded from now on, until the next call, will be counted."""
        self.tally = Tally()
        self.worker.begin.remote(expected)
        return self.tally

    def take_failures(self) -> list[dict]:
        """Records of the responses that could not be graded since the last call."""
        failed, self.failed = self.failed, []
        return failed

    def start(self, inputs: list[RewardInput]) -> Scoring:
        """Begin to grade; `result` waits for the end."""
        return Scoring(inputs, self.worker.score.remote(inputs), self.tally)

    def result(self, scoring: Scoring) -> list[Outcome]:
        """One outcome per input. Raises RewardError as RewardManager.score does."""
        try:
            outcomes = _get(scoring.outcomes)
        except RewardError as error:
            self.failed += error.failures
            raise
        failed = [(i, o.failure) for i, o in zip(scoring.inputs, outcomes, strict=True) if o.failure]
        scoring.tally.graded += len(outcomes)
        scoring.tally.reasons.update(failure.reason for _, failure in failed)
        if failed:
            self.failed += [record(*pair) for pair in failed]
            logger.warning(
                "%d of %d responses could not be graded and are left out (%s): see reward_failures.jsonl",
                len(failed),
                len(outcomes),
                ", ".join(f"{reason} {count}" for reason, count in Counter(f.reason for _, f in failed).items()),
            )
        return outcomes


def _get(reference: ray.ObjectRef) -> list[Outcome]:
    """The actor's result; its RewardErrors come without Ray's traceback."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, RewardError):
            raise error.cause from None
        raise
