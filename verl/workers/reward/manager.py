"""The rule-based reward manager: users' functions in processes of their own, checked, added up, and never trusted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import closing

from verl.config.worker import RewardConfig, RewardType
from verl.workers.reward.base import Failure, Outcome, RewardError, RewardInput, RewardScore, cut, readable, shown
from verl.workers.reward.pool import GraderPool, Task

logger = logging.getLogger(__name__)

MAIN = "worker.reward"
# Fewer failures than this stop no run, unless none is allowed: of a few responses one is a large share.
MIN_FAILURES = 3


class RewardManager:
    """Grades responses by `worker.reward`. Its processes start at once; `start` waits for them."""

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self.functions = config.functions()
        self.pool = GraderPool(config)
        self.begin(0)

    def begin(self, expected: int) -> None:
        """A step or a validation begins, in which `expected` responses or more will be graded."""
        self.expected, self.seen, self.failed = expected, 0, 0

    def start(self) -> None:
        """Wait until every process is ready. Raises RewardError where the functions cannot be loaded."""
        self.kinds = self.pool.start()

    def close(self) -> None:
        self.pool.close()

    def score(self, inputs: list[RewardInput]) -> list[Outcome]:
        """One outcome per input.

        Raises:
            RewardError: a function returned another number of scores, a score without `overall`, a value that is no
                number, or components that differ between responses; or too many of the responses since `begin` could
                not be graded (see `allowed_failures`). The message shows a sample.
        """
        self.seen += len(inputs)
        scores: list[dict[str, RewardScore]] = [{} for _ in inputs]
        seconds = [0.0] * len(inputs)
        failures: dict[int, Failure] = {}
        with closing(self.pool.grade(self._tasks(inputs))) as answers:
            for index, key, answer in answers:
                seconds[index] += answer.seconds
                if not isinstance(answer.score, Failure):
                    scores[index][key] = answer.score
                    continue
                detail = f"{self._name(key)}: {answer.score.detail}"
                failures.setdefault(index, Failure(answer.score.reason, detail))
                if self.failed + len(failures) > self.allowed_failures():
                    raise self._too_many(failures, inputs)
        self.failed += len(failures)
        first: dict[str, RewardScore] = {}
        outcomes = []
        for index, reward_input in enumerate(inputs):
            self._check_components(scores[index], first, reward_input)
            if index in failures:
                outcomes.append(Outcome(None, failures[index], seconds[index]))
            else:
                outcomes.append(Outcome(self._sum(scores[index]), None, seconds[index]))
        slowest = max(range(len(inputs)), key=seconds.__getitem__, default=0)
        if inputs and seconds[slowest] > self.config.timeout_s / 2:
            text = "grading a response took %.1f s (worker.reward.timeout_s=%g):\n%s"
            logger.warning(text, seconds[slowest], self.config.timeout_s, shown(inputs[slowest]))
        return outcomes

    def allowed_failures(self) -> float:
        """The share `worker.reward.max_failure_frac` of the responses of this step or validation, of a share above 0 at
        least MIN_FAILURES; but never all of them."""
        share, total = self.config.max_failure_frac, max(self.expected, self.seen)
        return min(max(share * total, MIN_FAILURES if share else 0), total - 1)

    def _tasks(self, inputs: list[RewardInput]) -> list[Task]:
        tasks = []
        for key, (kind, concurrent) in self.kinds.items():
            size = max(1, len(inputs)) if kind == RewardType.batch else 1
            size = self.config.async_concurrency if concurrent else size
            for start in range(0, len(inputs), size):
                chosen = inputs[start : start + size]
                tasks.append(Task(key, list(range(start, start + len(chosen))), chosen))
        return tasks

    def _sum(self, scores: Mapping[str, RewardScore]) -> RewardScore:
        """The components of the main reward by their names, those of others as NAME/COMPONENT, and the weighted sum."""
        if len(self.functions) == 1 and self.config.weight == 1:
            return scores[MAIN]
        total = RewardScore(overall=sum(self.functions[key].weight * score["overall"] for key, score in scores.items()))
        for key, score in scores.items():
            name = "main" if key == MAIN else key.rpartition(".")[2]
            total[name] = score["overall"]
            total |= {c if key == MAIN else f"{name}/{c}": v for c, v in score.items() if c != "overall"}
        return total

    def _check_components(
        self, scores: Mapping[str, RewardScore], first: dict[str, RewardScore], reward_input: RewardInput
    ) -> None:
        for key, score in scores.items():
            expected = first.setdefault(key, score)
            if set(score) != set(expected):
                raise RewardError(
                    f"{self._name(key)} returned {cut(repr(score))} (components differ: {sorted(score)} here and "
                    f"{sorted(expected)} for another response) for\n{shown(reward_input)}"
                )

    def _name(self, key: str) -> str:
        return self.functions[key].reward_function

    def _too_many(self, failures: dict[int, Failure], inputs: list[RewardInput]) -> RewardError:
        reasons = ", ".join(
            f"{reason} {count}" for reason, count in Counter(f.reason for f in failures.values()).items()
        )
        index, failure = next(iter(failures.items()))
        total = max(self.expected, self.seen)
        return RewardError(
            f"{self.failed + len(failures)} of {total} responses of this step or validation could not be graded "
            f"({reasons}), more than worker.reward.max_failure_frac={self.config.max_failure_frac:g} allows. One of "
            f"them, {failure.reason}:\n"
            f"{failure.detail}\n{shown(inputs[index])}",
            [record(inputs[index], failure) for index, failure in failures.items()],
        )


def record(reward_input: RewardInput, failure: Failure) -> dict:
    """A sample that was not graded, for reward_failures.jsonl."""
    return {"reason": failure.reason, "detail": failure.detail, **readable(reward_input)}
