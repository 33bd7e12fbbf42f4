"""Users' reward functions: how they are loaded, called and checked. All of it but loading runs in a grader process."""

from __future__ import annotations

import asyncio
import inspect
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from verl.config.worker import RewardConfig, RewardType
from verl.utils.imports import import_file, import_function
from verl.workers.reward.base import Failure, RewardInput, RewardScore, cut, shown

LONGEST_TRACEBACK = 4000  # characters


class ContractError(Exception):
    """A reward function returned what no reward function may return; no sample is to blame."""


@dataclass(frozen=True)
class Answer:
    """The checked score of one response, or the reason why there is none."""

    score: RewardScore | Failure
    seconds: float


@dataclass(frozen=True)
class RewardFunction:
    """One function as configured under `key`."""

    key: str
    name: str
    function: Callable[..., Any]
    kwargs: dict[str, Any]
    type: RewardType

    @property
    def concurrent(self) -> bool:
        """Whether calls for several responses can be under way at one time."""
        return self.type == RewardType.sequential and inspect.iscoroutinefunction(self.function)

    def __call__(self, inputs: list[RewardInput], runner: asyncio.Runner, timeout_s: float) -> list[Answer]:
        """An answer to each input.

        Args:
            inputs: one, unless it is a batch function or a concurrent one.
            runner: where coroutines run.
            timeout_s: for each call of a concurrent function. All others are timed, and killed, from outside.

        Raises:
            ContractError: see `check_score`; or another number of scores than inputs.
        """
        if self.concurrent:
            return runner.run(self._all(inputs, timeout_s))
        started = time.perf_counter()
        answers: list[RewardScore | Failure]
        try:
            found = self.function(inputs if self.type == RewardType.batch else inputs[0], **self.kwargs)
            found = runner.run(found) if inspect.iscoroutine(found) else found
        except BaseException as error:  # a grader that calls sys.exit() has failed like any other
            answers = [_raised(error, shared=len(inputs) > 1)] * len(inputs)
        else:
            scores = found if self.type == RewardType.batch else [found]
            if not isinstance(scores, (list, tuple)) or len(scores) != len(inputs):
                count = len(scores) if isinstance(scores, (list, tuple)) else f"a {type(scores).__name__}, not a list"
                raise ContractError(
                    f"{self.name} returned {count} for {len(inputs)} inputs; the first:\n{shown(inputs[0])}"
                )
            answers = [self.checked(*pair) for pair in zip(scores, inputs, strict=True)]
        seconds = (time.perf_counter() - started) / len(inputs)
        return [Answer(answer, seconds) for answer in answers]

    async def _all(self, inputs: list[RewardInput], timeout_s: float) -> list[Answer]:
        return await asyncio.gather(*(self._one(i, timeout_s, shared=len(inputs) > 1) for i in inputs))

    async def _one(self, reward_input: RewardInput, timeout_s: float, shared: bool) -> Answer:
        started = time.perf_counter()
        answer: RewardScore | Failure
        try:
            async with asyncio.timeout(timeout_s) as limit:
                found = await self.function(reward_input, **self.kwargs)
            answer = self.checked(found, reward_input)
        except ContractError:
            raise
        except BaseException as error:
            if limit.expired():  # shared: another call may have held up the event loop
                answer = Failure("timeout", f"no score within worker.reward.timeout_s={timeout_s:g} seconds", shared)
            else:
                answer = _raised(error, shared=False)
        return Answer(answer, time.perf_counter() - started)

    def checked(self, score: Any, reward_input: RewardInput) -> RewardScore | Failure:
        """The score in plain floats, or the failure that a value that is not finite is.

        Raises:
            ContractError: it is no dict with `overall`, or holds what is no number.
        """
        if not isinstance(score, dict) or "overall" not in score:
            problem = "a score is a dict with at least 'overall'"
        elif score["overall"] is None or not all(isinstance(v, Real) for v in score.values() if v is not None):
            problem = "`overall` is a number, and every component a number or None"
        elif not all(math.isfinite(value) for value in score.values() if value is not None):
            return Failure("not_finite", f"{self.name} returned {cut(repr(score))}")
        else:
            return {str(name): None if value is None else float(value) for name, value in score.items()}
        raise ContractError(f"{self.name} returned {cut(repr(score))} ({problem}) for\n{shown(reward_input)}")


def _raised(error: BaseException, shared: bool) -> Failure:
    # The first frame is that of the call here.
    frames = "".join(
        traceback.format_exception(type(error), error, error.__traceback__ and error.__traceback__.tb_next)
    )
    reason = "memory" if isinstance(error, MemoryError) else "raised"
    return Failure(reason, frames[-LONGEST_TRACEBACK:].rstrip(), shared)


def load_functions(config: RewardConfig) -> dict[str, RewardFunction]:
    """Import every function of the config, by its key, the main one first.

    Raises:
        ValueError, FileNotFoundError: a mistyped name (see `import_function`), or a `REWARD_TYPE` that is none.
    """
    found = {}
    for key, part in config.functions().items():
        name = part.reward_function
        function = import_function(name, f"{key}.reward_function")
        module = import_file(name.rpartition(":")[0], f"{key}.reward_function")
        kind = getattr(module, "REWARD_TYPE", part.reward_type)
        if kind not in list(RewardType):
            raise ValueError(f"{name} has REWARD_TYPE = {kind!r}: one of {', '.join(RewardType)} is needed")
        found[key] = RewardFunction(key, name, function, dict(part.reward_function_kwargs), RewardType(kind))
    return found
