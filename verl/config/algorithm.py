"""`algorithm.*`: the advantage, the loss terms and the views."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING


class LossAverage(StrEnum):
    """How per-token values become one number: over all valid tokens, over sequences of token means, or over
    sequences of token sums divided by data.max_response_length."""

    token = "token"
    seq = "seq"
    seq_sum = "seq_sum"


class Truncation(StrEnum):
    """Importance weights of responses that the engine drew from a policy which is not quite the trainer's."""

    off = "off"
    token = "token"
    sequence = "sequence"


class Shape(StrEnum):
    """How a coefficient goes from 1 to `end` times its value."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass
class ScheduleConfig:
    """A factor on a coefficient, a function of the step alone, so that a resumed run continues it.

    It rises linearly from 0 over `warmup_steps`, then goes from 1 to `end` until step `steps` (default: the last of
    the run), where it stays.
    """

    shape: Shape = Shape.constant
    end: float = 0.0
    steps: int | None = None
    warmup_steps: int = 0

    def factor(self, step: int, total_steps: int) -> float:
        """The factor in step `step`, counted from 1, of a run of `total_steps`."""
        if step <= self.warmup_steps:
            return step / (self.warmup_steps + 1)
        if self.shape == Shape.constant:
            return 1.0
        last = self.steps or total_steps
        progress = min(1.0, (step - self.warmup_steps - 1) / max(1, last - self.warmup_steps - 1))
        if self.shape == Shape.cosine:
            progress = 0.5 * (1 - math.cos(math.pi * progress))
        return 1.0 + (self.end - 1.0) * progress

    def check(self, key: str) -> None:
        """Raise ValueError, naming `key`, where a value has no meaning."""
        if not math.isfinite(self.end) or self.end < 0:
            raise ValueError(f"{key}.end={self.end}: a factor of 0 or more is needed")
        if self.warmup_steps < 0:
            raise ValueError(f"{key}.warmup_steps={self.warmup_steps}: 0 or more is needed")
        if self.steps is not None and self.steps <= self.warmup_steps:
            raise ValueError(f"{key}.steps={self.steps}: more than {key}.warmup_steps={self.warmup_steps} are needed")


@dataclass
class LossTermConfig:
    """Base of every loss term's options. A term that is listed is computed; with coefficient 0 it is a metric.

    A term with a new set of options subclasses this, sets `kind` to its registered name, and may extend `check`.
    """

    kind: str = MISSING
    coef: float = 0.0
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def check(self, key: str) -> None:
        """Raise ValueError, naming `key`, where a value has no meaning."""
        if not math.isfinite(self.coef) or self.coef < 0:
            raise ValueError(
                f"{key}.coef={self.coef}: a finite value of 0 or more is needed; whether a term is minimised or "
                "maximised belongs to the term, not to its sign here"
            )
        self.schedule.check(f"{key}.schedule")


class ViewStage(StrEnum):
    """When a view changes a picture: as it is in the data, or resized as the model will see it."""

    raw = "raw"
    resized = "resized"


class ViewPer(StrEnum):
    """What has random numbers of its own: a prompt, whose responses then share its images, or each response."""

    prompt = "prompt"
    response = "response"


@dataclass
class ViewConfig:
    """Base of every view's options. `grad: true` makes the view's forward part of the update, so that gradient
    flows through it; otherwise one pass without gradient runs before the updates of a step.

    `stage: resized` aligns patches with those of the vision tower, where the sizes agree; `raw` is what the paper's
    released code does. `per: response` costs as many image tensors as there are responses. `column` names the
    dataset column whose pictures the view changes, as many as the prompt has; null: the prompt's own.
    """

    kind: str = MISSING
    grad: bool = False
    stage: ViewStage = ViewStage.raw
    per: ViewPer = ViewPer.prompt
    column: str | None = None

    def check(self, key: str) -> None:
        """Raise ValueError, naming `key`, where a value has no meaning."""


class WatchdogAction(StrEnum):
    """What follows from a sign of collapse: a line in the log and in events.jsonl (`warn`); also smaller coefficients
    of the maximised terms (`reduce`); or the end of the run, with the model saved (`stop`)."""

    off = "off"
    warn = "warn"
    reduce = "reduce"
    stop = "stop"


@dataclass
class WatchdogConfig:
    """See `verl.trainer.watchdog.Watchdog`. It looks away for the first `warmup_steps`; a longer `window` follows
    slower, and so sees a slower runaway."""

    action: WatchdogAction = WatchdogAction.warn
    window: int = 20
    warmup_steps: int = 0
    tolerance: float = 4.0
    relative: float = 0.5
    patience: int = 3
    reduce_factor: float = 0.5

    def check(self, key: str) -> None:
        """Raise ValueError, naming `key`, where a value has no meaning."""
        for name in ("window", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{key}.{name}={getattr(self, name)}: 1 or more is needed")
        for name in ("warmup_steps", "tolerance", "relative"):
            if getattr(self, name) < 0:
                raise ValueError(f"{key}.{name}={getattr(self, name)}: 0 or more is needed")
        if not 0 <= self.reduce_factor < 1:
            raise ValueError(f"{key}.reduce_factor={self.reduce_factor}: from 0 up to, not including, 1")


class OldLogProbs(StrEnum):
    """Where the log-probs come from that the policy's ratio compares with.

    `recompute`: a pass of the trainer before the updates. `rollout`: the engine's own, without a pass; what engine
    and trainer differ by is then part of the ratio. `auto`: recompute, but where a step has one update its own
    forward gives them, which is exact and costs nothing; and the engine's for responses that waited for this step
    (`online_filtering`), which older weights have drawn.
    """

    auto = "auto"
    recompute = "recompute"
    rollout = "rollout"


class Estimator(StrEnum):
    """How KL(pi || other) is found: from the sampled token (k1, k2, k3), or over the whole vocabulary (full); see
    verl/algorithms/losses/estimators.py."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"
    full = "full"


class KLController(StrEnum):
    """Whether the coefficient of a KL in the reward stays or follows the KL."""

    fixed = "fixed"
    adaptive = "adaptive"


@dataclass
class RewardKLConfig:
    """A KL to the reference inside the reward instead of the loss; 0 is off. See verl.algorithms.rewards.RewardKL.

    `target` in nats per token, `horizon` in responses, both of the adaptive controller.
    """

    coef: float = 0.0
    estimator: Estimator = Estimator.k1
    controller: KLController = KLController.fixed
    target: float = 0.1
    horizon: int = 10000

    def check(self, key: str) -> None:
        """Raise ValueError, naming `key`, where a value has no meaning."""
        if not math.isfinite(self.coef) or self.coef < 0:
            raise ValueError(f"{key}.coef={self.coef}: a finite value of 0 or more is needed")
        if self.estimator == Estimator.full:
            raise ValueError(f"{key}.estimator=full: a reward is that of the sampled token, k1, k2 or k3")
        if self.target <= 0 or self.horizon < 1:
            raise ValueError(f"{key}: target={self.target} and horizon={self.horizon} must be above 0")


@dataclass
class ShaperConfig:
    """Base of the options of a function that changes advantages before the updates."""

    kind: str = MISSING

    def check(self, key: str) -> None:
        """Raise ValueError, naming `key`, where a value has no meaning."""


@dataclass
class AlgorithmConfig:
    """`terms`, `views` and `shapers` are filled by name from the Hydra groups `term`, `view` and `shaper`.

    `gamma` and `lam` are the discount of rewards and the weight of longer sums in `gae`.

    `online_filtering` keeps only groups whose mean of the reward's component `filter_key` lies strictly between
    `filter_low` and `filter_high` (DAPO). `overlong_buffer`: a response loses up to `overlong_penalty` of its reward
    over the last so many tokens of data.max_response_length; 0 is off.
    """

    adv_estimator: str = "grpo"
    gamma: float = 1.0
    lam: float = 1.0
    reward_kl: RewardKLConfig = field(default_factory=RewardKLConfig)
    old_log_probs: OldLogProbs = OldLogProbs.auto
    online_filtering: bool = False
    filter_key: str = "accuracy"
    filter_low: float = 0.01
    filter_high: float = 0.99
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    terms: dict[str, LossTermConfig] = field(default_factory=dict)
    views: dict[str, ViewConfig] = field(default_factory=dict)
    shapers: dict[str, ShaperConfig] = field(default_factory=dict)
