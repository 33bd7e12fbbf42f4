"""What the driver carries from step to step, and how a checkpoint holds it: tensors and plain values alone."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

from verl.config.algorithm import KLController
from verl.protocol import DataProto
from verl.trainer.collect import Collector
from verl.trainer.prompts import PromptStream
from verl.trainer.run import Run
from verl.trainer.watchdog import Watchdog
from verl.utils.rng import rng_state, set_rng_state

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: The last one that is done.
        stopped: Whether the watchdog has ended the run there.
        validations: What summary.json says of them so far.
        best, best_step: The highest `trainer.save_best` so far, and where that was.
        seconds: What earlier starts of this run took.
    """

    step: int = 0
    stopped: bool = False
    validations: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    best_step: int | None = None
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def is_best(self, name: str | None, metrics: dict[str, float]) -> bool:
        """Whether this step's metric `name` is the highest so far. Raises ValueError where a validation lacks it."""
        if name is None or "val/reward" not in metrics:
            return False
        if name not in metrics:
            known = ", ".join(sorted(key for key in metrics if key.startswith("val/")))
            raise ValueError(f"trainer.save_best='{name}' is no metric of this run's validation, which has {known}")
        if self.best is not None and metrics[name] <= self.best:
            return False
        self.best, self.best_step = metrics[name], self.step
        return True

    def total_seconds(self) -> float:
        return self.seconds + time.perf_counter() - self.started


@dataclass
class Driver:
    """Every part of the driver that a step changes."""

    run: Run
    progress: Progress
    prompts: PromptStream
    collector: Collector
    watchdog: Watchdog

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors and plain values."""
        progress, waiting = self.progress, self.collector.waiting
        return {
            "step": progress.step,
            "stopped": progress.stopped,
            "validations": progress.validations,
            "best": progress.best,
            "best_step": progress.best_step,
            "seconds": progress.total_seconds(),
            "prompts": self.prompts.state_dict(),
            "waiting": None if waiting is None else rows_to_plain(waiting),
            "watchdog": self.watchdog.state_dict(),
            "reward_kl_coef": self.run.reward_kl.coef,
            "weight_version": self.run.workers.rollout.version,
            "rng": rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any], changed: set[str]) -> None:
        """Go on from there; `changed` are the keys of the config that are no longer what they were."""
        for name in ("step", "stopped", "validations", "best", "best_step", "seconds"):
            setattr(self.progress, name, state[name])
        place = state["prompts"]
        other_data = changed & {"data.train_files", "data.shuffle", "data.seed"}
        if other_data or place["prompts"] != len(self.prompts.loader.dataset):
            logger.warning(
                "the prompts are others than before (%s): epoch %d begins anew",
                ", ".join(sorted(other_data)) or f"{place['prompts']} then, {len(self.prompts.loader.dataset)} now",
                place["epoch"] + 1,
            )
            place = {**place, "drawn": 0}
        self.prompts.load_state_dict(place)
        if state["waiting"] is not None:
            self._take_waiting(state["waiting"], changed)
        self.watchdog.load_state_dict(state["watchdog"])
        if self.run.config.algorithm.reward_kl.controller == KLController.adaptive:
            self.run.reward_kl.coef = state["reward_kl_coef"]
        # The engines have not got these weights yet: the sync that follows brings them to this version.
        self.run.workers.rollout.version = state["weight_version"] - 1
        set_rng_state(state["rng"])

    def _take_waiting(self, waiting: dict[str, Any], changed: set[str]) -> None:
        other = sorted(k for k in changed if k.startswith(("algorithm.", "data.", "worker.rollout.n")))
        if other:
            logger.warning("responses that waited for the next step are dropped, since %s changed", ", ".join(other))
        else:
            self.collector.waiting = rows_from_plain(waiting)


def rows_to_plain(rows: DataProto) -> dict[str, Any]:
    """A batch as tensors, lists and dicts. Tensors are copied: a view would bring all that it is a view of."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in rows.tensors.items()},
        "objects": {name: list(column) for name, column in rows.objects.items()},
        "meta": dict(rows.meta),
    }


def rows_from_plain(plain: dict[str, Any]) -> DataProto:
    return DataProto.from_dict(plain["tensors"], plain["objects"], plain["meta"])
