"""Grader processes that can be killed: a sample that breaks its process costs no other sample its score."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

from verl.config.worker import RewardConfig, RewardType
from verl.utils.process import usable_cores
from verl.workers.reward.base import Failure, RewardError, RewardInput
from verl.workers.reward.functions import Answer

logger = logging.getLogger(__name__)

START_LIMIT_S = 600  # a function may load a model when it is imported
WATCH_S = 0.05  # between two looks at the clock and the memory of busy processes
END_S = 5.0  # from a closed pipe to the end of its process; a crash may be written to disk first
GRACE_S = 1.0  # a concurrent function ends its own calls; after this it is one that holds up its event loop
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Task:
    """One call: of the function `key` for some inputs, `indices` of them among those to grade."""

    key: str
    indices: list[int]
    inputs: list[RewardInput]

    def alone(self, position: int) -> Task:
        return Task(self.key, [self.indices[position]], [self.inputs[position]])


class GraderProcess:
    """One process and what it is doing. `kinds` is None until it has loaded the functions."""

    def __init__(self, config: RewardConfig) -> None:
        self.connection, child = Pipe()
        ended, self.lifeline = os.pipe()  # closed when this process ends, however that happens
        # The child imports from where its parent does, and is the head of a group, which is killed as a whole.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        words = [sys.executable, "-m", "verl.workers.reward.process", str(child.fileno()), str(ended)]
        self.process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            env=environment,
            pass_fds=[child.fileno(), ended],
            start_new_session=True,
        )
        child.close()
        os.close(ended)
        self.connection.send(config)
        self.kinds: dict[str, tuple[RewardType, bool]] | None = None
        self.task: Task | None = None
        self.started = time.monotonic()
        self.limit, self.too_late = float(START_LIMIT_S), f"not ready within {START_LIMIT_S} seconds"

    def begin(self, task: Task, limit: float, too_late: str) -> None:
        """Raises OSError where the process has died while it was idle."""
        self.connection.send((task.key, task.inputs))
        self.task, self.started = task, time.monotonic()
        self.limit, self.too_late = limit, too_late

    @property
    def seconds(self) -> float:
        """Since it began with its task, or to load the functions."""
        return time.monotonic() - self.started

    def memory(self) -> int:
        """Resident bytes; 0 where the system does not say."""
        try:
            with open(f"/proc/{self.process.pid}/statm", encoding="ascii") as file:
                return int(file.read().split()[1]) * PAGE
        except (OSError, IndexError):
            return 0

    def kill(self) -> None:
        """End it and all that it has started."""
        if self.process.returncode is None:  # until it has been waited for, its number is no other process's
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()
        os.close(self.lifeline)

    def death(self) -> str:
        """Its end, in words, once its pipe is closed. It is not waited for: `kill` has to come first."""
        deadline = time.monotonic() + END_S
        while True:
            ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if ended is not None:
                break
            if time.monotonic() > deadline:
                return "its process closed the pipe"
            time.sleep(0.01)
        if ended.si_code == os.CLD_EXITED:
            return f"its process exited with {ended.si_status}"
        return f"its process died of {signal.Signals(ended.si_status).name}"


class GraderPool:
    """`worker.reward.num_workers` processes, each with one task at a time. The clock of a task runs while its process
    works on it, not while it waits for one, nor while a process starts. A process that is killed or dies is replaced.
    """

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        count = config.num_workers or max(1, min(8, usable_cores() // 2))
        self.graders = [GraderProcess(config) for _ in range(count)]

    def start(self) -> dict[str, tuple[RewardType, bool]]:
        """Wait until every process has loaded the functions; (type, concurrent) of each by its key.

        Raises:
            RewardError: a process could not load them.
        """
        while any(grader.kinds is None for grader in self.graders):
            list(self._collect())
        return self.graders[0].kinds or {}

    def grade(self, tasks: list[Task]) -> Iterator[tuple[int, str, Answer]]:
        """(index, key, answer) as they come. Where a call for several inputs fails, each of them is tried alone, so
        that only the guilty one fails. Closing the iterator early ends what is under way.

        Raises:
            RewardError: a function returned what no reward function may return, or can no longer be loaded.
        """
        waiting = deque(tasks)
        try:
            while waiting or any(grader.task for grader in self.graders):
                for position, grader in enumerate(self.graders):
                    if waiting and grader.kinds is not None and grader.task is None:
                        try:
                            self._begin(grader, waiting[0])
                            waiting.popleft()
                        except OSError:
                            self._replace(position)
                for task, answers in self._collect():
                    if len(task.inputs) > 1 and any(_is_shared(answer) for answer in answers):
                        logger.warning(
                            "a call of %s for %d responses failed: trying them alone", task.key, len(answers)
                        )
                    for position, answer in enumerate(answers):
                        if len(task.inputs) > 1 and _is_shared(answer):
                            waiting.append(task.alone(position))
                        else:
                            yield task.indices[position], task.key, answer
        finally:
            for position, grader in enumerate(self.graders):
                if grader.task:
                    self._replace(position)

    def close(self) -> None:
        for grader in self.graders:
            grader.kill()

    def _begin(self, grader: GraderProcess, task: Task) -> None:
        assert grader.kinds is not None
        kind, concurrent = grader.kinds[task.key]
        whole = kind == RewardType.batch and len(task.inputs) > 1
        name = "batch_timeout_s" if whole else "timeout_s"
        limit = getattr(self.config, name)
        grader.begin(task, limit + GRACE_S * concurrent, f"no score within worker.reward.{name}={limit:g} seconds")

    def _collect(self) -> Iterator[tuple[Task, list[Answer]]]:
        """Answers that arrived within WATCH_S, and failures of processes that had to be killed."""
        active = {g.connection: i for i, g in enumerate(self.graders) if g.task or g.kinds is None}
        for connection in wait(list(active), timeout=WATCH_S):
            position = active.pop(connection)
            yield from self._receive(position)
        for position in active.values():
            grader = self.graders[position]
            if grader.seconds > grader.limit:
                yield from self._fail(position, "timeout", grader.too_late)
            elif grader.memory() > self.config.max_memory_gb * 2**30:
                text = f"its process grew beyond worker.reward.max_memory_gb={self.config.max_memory_gb:g}"
                yield from self._fail(position, "memory", text)

    def _receive(self, position: int) -> Iterator[tuple[Task, list[Answer]]]:
        grader = self.graders[position]
        try:
            message: Any = grader.connection.recv()
        except (EOFError, OSError):
            yield from self._fail(position, "died", grader.death())
            return
        if isinstance(message, str):
            raise RewardError(message)
        if grader.task is None:
            grader.kinds = message
            return
        task, grader.task = grader.task, None
        if any(isinstance(a.score, Failure) and a.score.reason == "memory" for a in message):
            self._replace(position)  # what it still holds is not to be the next sample's
        yield task, message

    def _fail(self, position: int, reason: str, detail: str) -> Iterator[tuple[Task, list[Answer]]]:
        """Replace a process that has died or has to. Raises RewardError where it was still loading the functions."""
        grader = self.graders[position]
        if grader.task is None:
            names = ", ".join(part.reward_function for part in self.config.functions().values())
            raise RewardError(f"a grader process could not load {names}: {detail}")
        failure = Failure(reason, detail, shared=len(grader.task.inputs) > 1)
        answers = [Answer(failure, grader.seconds)] * len(grader.task.inputs)
        task = grader.task
        self._replace(position)
        yield task, answers

    def _replace(self, position: int) -> None:
        self.graders[position].kill()
        self.graders[position] = GraderProcess(self.config)


def _is_shared(answer: Answer) -> bool:
    return isinstance(answer.score, Failure) and answer.score.shared
