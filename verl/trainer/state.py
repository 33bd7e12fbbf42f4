"""TrainState: all that a step changes in the driver. A checkpoint holds it as tensors and plain values."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from verl.algorithms.rewards import RewardKL
from verl.config.algorithm import KLController
from verl.config.config import Config
from verl.data.loader import PromptStream
from verl.models.families.base import Images
from verl.protocol import DataProto
from verl.trainer.plan import Plan
from verl.trainer.watchdog import Watchdog
from verl.utils.rng import rng_state, set_rng_state
from verl.workers.reward.base import Failure, Outcome

if TYPE_CHECKING:
    from verl.trainer.collect import Rows

logger = logging.getLogger(__name__)

PROGRESS = ("step", "stopped", "validations", "best", "best_step", "seconds")


@dataclass
class TrainState:
    """The state of a run: how far it is, and what goes on from step to step.

    Attributes:
        waiting: Rows that were generated and not trained on yet (`algorithm.online_filtering`).
        ahead: Rows of the next step, which older weights have drawn (`trainer.ahead`); from a checkpoint, their parts.
        step: The last one that is done.
        stopped: Whether the watchdog has ended the run there.
        validations: Their entries of summary.json so far.
        best, best_step: The highest `trainer.save_best` so far, and its step.
        seconds: Duration of earlier starts of this run.
    """

    prompts: PromptStream
    watchdog: Watchdog
    reward_kl: RewardKL
    waiting: DataProto | None = None
    ahead: Rows | dict[str, Any] | None = None
    step: int = 0
    stopped: bool = False
    validations: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    best_step: int | None = None
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def new(cls, plan: Plan) -> TrainState:
        """The state before the first step."""
        algorithm = plan.config.algorithm
        watchdog = Watchdog(algorithm.watchdog, plan.terms)
        return cls(PromptStream(plan.train_loader), watchdog, RewardKL(algorithm.reward_kl))

    def total_seconds(self) -> float:
        return self.seconds + time.perf_counter() - self.started

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

    def state_dict(self) -> dict[str, Any]:
        """The whole state and the random numbers, as tensors and plain values."""
        return {
            **{name: getattr(self, name) for name in PROGRESS},
            "seconds": self.total_seconds(),
            "prompts": self.prompts.state_dict(),
            "waiting": None if self.waiting is None else rows_to_plain(self.waiting),
            "ahead": self._ahead_to_plain(),
            "watchdog": self.watchdog.state_dict(),
            "reward_kl_coef": self.reward_kl.coef,
            "rng": rng_state(),
        }

    def _ahead_to_plain(self) -> dict[str, Any] | None:
        rows = self.ahead
        if rows is None:
            return None
        if isinstance(rows, dict):  # from a checkpoint, and not taken yet
            return {**rows, "batch": rows_to_plain(rows["batch"])}
        names = ("mini_batches", "metrics", "failures", "step")
        plain = {"batch": rows_to_plain(rows.batch), **{name: getattr(rows, name) for name in names}}
        return {**plain, "graded": rows.tally.graded, "reasons": dict(rows.tally.reasons)}

    def load_state_dict(self, state: dict[str, Any], config: Config, changed: set[str]) -> None:
        """Go on from there; `changed` are the keys of the config that are no longer what they were."""
        for name in PROGRESS:
            setattr(self, name, state[name])
        place, prompts = state["prompts"], len(self.prompts.loader.dataset)
        other_data = changed & {"data.train_files", "data.shuffle", "data.seed"}
        if other_data or place["prompts"] != prompts:
            logger.warning(
                "the prompts are not those of the checkpoint (%s): epoch %d begins anew",
                ", ".join(sorted(other_data)) or f"{place['prompts']} then, {prompts} now",
                place["epoch"] + 1,
            )
            place = {**place, "drawn": 0}
        self.prompts.load_state_dict(place)
        other = sorted(k for k in changed if k.startswith(("algorithm.", "data.", "worker.rollout.n")))
        kept = {name: state.get(name) for name in ("waiting", "ahead") if state.get(name) is not None}
        if kept and other:
            logger.warning("responses that waited for the next step are dropped, since %s changed", ", ".join(other))
            kept = {}
        if "waiting" in kept:
            self.waiting = rows_from_plain(kept["waiting"])
        if "ahead" in kept:
            self.ahead = {**kept["ahead"], "batch": rows_from_plain(kept["ahead"]["batch"])}
        self.watchdog.load_state_dict(state["watchdog"])
        if config.algorithm.reward_kl.controller == KLController.adaptive:
            self.reward_kl.coef = state["reward_kl_coef"]
        set_rng_state(state["rng"])


def rows_to_plain(rows: DataProto) -> dict[str, Any]:
    """A batch as tensors, lists and dicts. Tensors are copied: a view would bring all that it is a view of."""
    plain: dict[int, Any] = {}  # by identity, so that rows that share an object go on sharing it

    def convert(value: Any) -> Any:
        if id(value) not in plain:
            if isinstance(value, Images):
                items = [{name: tensor.clone() for name, tensor in item.items()} for item in value.items]
                plain[id(value)] = {"images": items, "digests": list(value.digests)}
            else:
                plain[id(value)] = asdict(value) if isinstance(value, Outcome) else value
        return plain[id(value)]

    return {
        "tensors": {name: tensor.clone() for name, tensor in rows.tensors.items()},
        "objects": {name: [convert(value) for value in column] for name, column in rows.objects.items()},
    }


def rows_from_plain(plain: dict[str, Any]) -> DataProto:
    """The batch that `rows_to_plain` made, here or in a version before 0.2, which kept images as dicts of tensors."""
    from verl.models.families.qwen_vl import QwenVL  # the only family with images that those versions knew

    made: dict[int, Any] = {}

    def images(value: dict[str, Any]) -> Images:
        if id(value) not in made:
            if not value:
                made[id(value)] = Images()
            elif "images" in value:
                made[id(value)] = Images(tuple(value["images"]), tuple(value["digests"]))
            else:
                made[id(value)] = Images.of(QwenVL("").split_images(value, None), value.get("image_ids"))
        return made[id(value)]

    def outcome(value: dict[str, Any]) -> Outcome:
        return Outcome(**{**value, "failure": value["failure"] and Failure(**value["failure"])})

    objects = {
        name: [images(v) if name.endswith("mm_inputs") else outcome(v) if name == "outcome" else v for v in column]
        for name, column in plain["objects"].items()
    }
    return DataProto.from_dict(plain["tensors"], objects)
