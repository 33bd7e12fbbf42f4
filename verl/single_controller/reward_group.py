"""The reward as the driver sees it: asked first and waited for later."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from dataclasses import dataclass

import ray
from ray.exceptions import RayTaskError

from verl.config.config import Config
from verl.single_controller.resources import Layout, actor_options
from verl.utils.process import WITHOUT_MODEL
from verl.workers.reward.base import Outcome, RewardError, RewardInput
from verl.workers.reward.manager import record
from verl.workers.reward.worker import RewardWorker

logger = logging.getLogger(__name__)

FAILURES = "reward_failures.jsonl"


@dataclass
class Scoring:
    """Responses that are being graded, and the list[Outcome] to come."""

    inputs: list[RewardInput]
    outcomes: ray.ObjectRef


class RewardGroup:
    """The actor whose processes grade. Responses that could not be graded are counted and reported, and written to
    reward_failures.jsonl in `trainer.output_dir`, with the step that `begin` names."""

    def __init__(self, config: Config, layout: Layout) -> None:
        self.file = os.path.join(os.path.abspath(config.trainer.output_dir), FAILURES)
        worker = ray.remote(RewardWorker).options(**actor_options(layout, None, 0, 0, 1, **{WITHOUT_MODEL: "1"}))
        self.worker = worker.remote(config.worker.reward)
        self.step, self.graded, self.reasons = 0, 0, Counter[str]()

    def build(self) -> None:
        """Wait until everything is ready. Raises RewardError where a reward function cannot be loaded."""
        _get(self.worker.ready.remote())

    def begin(self, step: int, expected: int) -> None:
        """Step `step`, or a validation behind it, begins; it will have `expected` responses or more."""
        self.step, self.graded, self.reasons = step, 0, Counter()
        self.worker.begin.remote(expected)

    def failures(self) -> dict[str, float]:
        """`failed_frac`, and `failed/REASON` for each reason: shares of all that was graded since `begin`."""
        shares = {f"failed/{reason}": count / self.graded for reason, count in self.reasons.items()}
        return {"failed_frac": self.reasons.total() / self.graded, **shares}

    def start(self, inputs: list[RewardInput]) -> Scoring:
        """Begin to grade; `result` waits for the end."""
        return Scoring(inputs, self.worker.score.remote(inputs))

    def result(self, scoring: Scoring) -> list[Outcome]:
        """One outcome per input. Raises RewardError as RewardManager.score does."""
        try:
            outcomes = _get(scoring.outcomes)
        except RewardError as error:
            self._write(error.failures)
            raise
        failed = [(i, o.failure) for i, o in zip(scoring.inputs, outcomes, strict=True) if o.failure]
        self.graded += len(outcomes)
        self.reasons.update(failure.reason for _, failure in failed)
        if failed:
            self._write([record(*pair) for pair in failed])
            logger.warning(
                "%d of %d responses could not be graded and are left out (%s): %s",
                len(failed),
                len(outcomes),
                ", ".join(f"{reason} {count}" for reason, count in Counter(f.reason for _, f in failed).items()),
                self.file,
            )
        return outcomes

    def _write(self, records: list[dict]) -> None:
        os.makedirs(os.path.dirname(self.file), exist_ok=True)
        with open(self.file, "a", encoding="utf-8") as file:
            for one in records:
                file.write(json.dumps({"step": self.step, **one}, ensure_ascii=False) + "\n")


def _get(reference: ray.ObjectRef) -> list[Outcome]:
    """What the actor returned; its RewardErrors without Ray's traceback of them."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, RewardError):
            raise error.cause from None
        raise
