"""`algorithm.*`: the advantage, the loss terms and the views."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import ClassVar

from omegaconf import MISSING

from verl.config.option import option


class LossAverage(StrEnum):
    """The mean that makes per-token values one number: over all valid tokens, over sequences of token means, or over
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
    """The path of a coefficient from 1 to `end` times its value."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass
class ScheduleConfig:
    """A factor on a coefficient, a function of the step alone, so that a resumed run continues it."""

    shape: Shape = option(Shape.constant, "course from 1 to `end`: constant (no change), linear, cosine")
    end: float = option(0.0, "last factor", least=0)
    steps: int | None = option(None, "step at which `end` is reached; null: the last step of the run", least=1)
    warmup_steps: int = option(0, "steps over which the factor rises linearly from 0 to 1 at first", least=0)

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
        if self.steps is not None and self.steps <= self.warmup_steps:
            raise ValueError(f"{key}.steps={self.steps}: more than {key}.warmup_steps={self.warmup_steps} are needed")


@dataclass
class LossTermConfig:
    """Base of every loss term's options. A term that is listed is computed; with coefficient 0 it is a metric.

    A term with a new set of options subclasses this, sets `kind` to its registered name, and may add a `check(key)`
    that raises ValueError naming the key. Whether a term is minimised or maximised belongs to the term, not to the sign
    of its coefficient.
    """

    kind: str = MISSING
    coef: float = option(0.0, "coefficient in the loss, never negative; 0: a metric only", least=0)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


class ViewStage(StrEnum):
    """The stage at which a view changes a picture: as it is in the data, or resized as the model will see it."""

    raw = "raw"
    resized = "resized"


class ViewPer(StrEnum):
    """Scope of a mask: one per prompt, shared by its responses, or one per response."""

    prompt = "prompt"
    response = "response"


@dataclass
class ViewConfig:
    """Base of every view's options."""

    kind: str = MISSING
    grad: bool = option(
        False,
        "true: live, the view's forward is part of the update and gradient flows through it; false: stored, one pass "
        "without gradient before the updates",
    )
    stage: ViewStage = option(
        ViewStage.raw, "raw: change the picture before it is resized, as PAPO's code does; resized: after, so that "
        "squares of the tower's patch size are its patches"
    )  # fmt: skip
    per: ViewPer = option(
        ViewPer.prompt, "prompt: one mask for all responses; response: one each, and as many image tensors"
    )
    column: str | None = option(None, "dataset column with the pictures to change; null: the prompt's own")
    STRENGTH: ClassVar[str] = ""  # the option that says how much it changes

    def scaled(self, factor: float) -> ViewConfig:
        """The view with `factor` times its strength. Raises ValueError for one that has none."""
        if factor == 1:
            return self
        if not self.STRENGTH:
            raise ValueError(f"a view of kind {self.kind} has no strength that a schedule could change")
        return replace(self, **{self.STRENGTH: factor * getattr(self, self.STRENGTH)})


class WatchdogAction(StrEnum):
    """Reaction to a sign of collapse."""

    off = "off"
    warn = "warn"
    reduce = "reduce"
    stop = "stop"


@dataclass
class WatchdogConfig:
    """See `verl.trainer.watchdog.Watchdog`."""

    action: WatchdogAction = option(
        WatchdogAction.warn,
        "on a sign of collapse: off, warn (log and events.jsonl), reduce (also smaller coefficients of maximised "
        "terms), stop (end the run and save the model)",
    )
    window: int = option(20, "healthy values that make a band; a longer one sees slower runaways", least=1)
    warmup_steps: int = option(0, "first steps that are not watched", least=0)
    tolerance: float = option(4.0, "half-width of the band in standard deviations", least=0)
    relative: float = option(0.5, "least half-width as a share of the median", least=0)
    patience: int = option(3, "steps in a row outside the band that make an event", least=1)
    reduce_factor: float = option(0.5, "factor of action=reduce, per event", least=0, below=1)


class OldLogProbs(StrEnum):
    """Source of the log-probs that the policy's ratio compares with.

    `recompute`: a pass of the trainer before the updates. `rollout`: the engine's own, without a pass; what engine
    and trainer differ by is then part of the ratio. `auto`: recompute, but where a step has one update its own
    forward gives them, which is exact and costs nothing; and the engine's for responses that waited for this step
    (`online_filtering`), which older weights have drawn.
    """

    auto = "auto"
    recompute = "recompute"
    rollout = "rollout"


class Estimator(StrEnum):
    """The estimate of KL(pi || other): from the sampled token (k1, k2, k3), or over the whole vocabulary (full); see
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
    """A KL to the reference inside the reward instead of the loss. See verl.algorithms.rewards.RewardKL."""

    coef: float = option(0.0, "coefficient of a KL to the reference inside the reward; 0: none", least=0)
    estimator: Estimator = option(Estimator.k1, "estimate from the sampled token: k1, k2 or k3")
    controller: KLController = option(KLController.fixed, "fixed, or adaptive: the coefficient follows the KL")
    target: float = option(0.1, "KL that the adaptive controller steers to, nats per token", above=0)
    horizon: int = option(10000, "responses over which the adaptive coefficient changes by 20 %", above=0)

    def check(self, key: str) -> None:
        if self.estimator == Estimator.full:
            raise ValueError(f"{key}.estimator=full: a reward is that of the sampled token, k1, k2 or k3")


@dataclass
class ViewRewardConfig:
    """A reward for depending on the image, for estimators that do not divide by a group's std, such as dr_grpo. See
    verl.algorithms.rewards.view_reward."""

    view: str = option("masked", "name of the corrupted view")
    coef: float = option(0.0, "coefficient of a response's KL to that view in its reward; 0: none", least=0)
    cap: float = option(0.2, "largest such reward", above=0)


@dataclass
class RolloutViewConfig:
    """Responses that are drawn given a view of the images, and trained on given the images themselves (NoisyRollout,
    arXiv 2504.13055)."""

    view: str | None = option(None, "view under which some responses of each prompt are drawn; null: none")
    share: float = option(0.5, "share of a prompt's responses that are", above=0, below=1)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def drawn(self, responses: int) -> int:
        """The number of a prompt's `responses` that are drawn under the view: with one, some and not all."""
        return min(max(round(self.share * responses), 1), responses - 1) if self.view is not None else 0


@dataclass
class ShaperConfig:
    """Base of the options of a function that changes advantages before the updates."""

    kind: str = MISSING


@dataclass
class AlgorithmConfig:
    """`terms`, `views` and `shapers` are filled by name from the Hydra groups `term`, `view` and `shaper`."""

    adv_estimator: str = option(
        "grpo",
        "advantage: grpo, dr_grpo, rloo, reinforce_plus_plus, reinforce_plus_plus_baseline, remax (a greedy baseline) "
        "or gae (PPO, with a critic)",
    )
    gamma: float = option(1.0, "discount of rewards", least=0, most=1)
    lam: float = option(1.0, "weight of longer sums in gae", least=0, most=1)
    reward_kl: RewardKLConfig = field(default_factory=RewardKLConfig)
    view_reward: ViewRewardConfig = field(default_factory=ViewRewardConfig)
    rollout_view: RolloutViewConfig = field(default_factory=RolloutViewConfig)
    old_log_probs: OldLogProbs = option(
        OldLogProbs.auto, "source of the old log-probs: auto (no pass where a step has one update), recompute, rollout"
    )
    online_filtering: bool = option(False, "DAPO's dynamic sampling: keep only groups that are mixed")
    filter_key: str = option("accuracy", "component of the reward whose group mean decides")
    filter_low: float = option(0.01, "groups whose mean is not above this are dropped")
    filter_high: float = option(0.99, "groups whose mean is not below this are dropped")
    overlong_buffer: int = option(0, "last tokens of max_response_length over which a penalty rises; 0: none", least=0)
    overlong_penalty: float = option(1.0, "largest penalty of a response that is too long", least=0)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    terms: dict[str, LossTermConfig] = field(default_factory=dict)
    views: dict[str, ViewConfig] = field(default_factory=dict)
    shapers: dict[str, ShaperConfig] = field(default_factory=dict)

    def check(self, key: str) -> None:
        if not self.filter_low < self.filter_high:
            raise ValueError(f"{key}.filter_low={self.filter_low} is not below {key}.filter_high={self.filter_high}")
        for name, term in self.terms.items():
            if self.old_log_probs == OldLogProbs.rollout and getattr(term, "tis", Truncation.off) != Truncation.off:
                raise ValueError(
                    f"{key}.terms.{name}.tis corrects old log-probs of the trainer, and {key}.old_log_probs=rollout "
                    "takes the engine's: use one of the two"
                )
        if self.rollout_view.view is not None:
            self._check_rollout_view(f"{key}.rollout_view")
        if not any(term.coef for term in self.terms.values()):
            raise ValueError(f"{key}.terms has no term with a coefficient above 0: there is nothing to train on")

    def _check_rollout_view(self, key: str) -> None:
        name = self.rollout_view.view
        if name not in self.views:
            raise ValueError(f"{key}.view={name}: algorithm.views has {', '.join(self.views) or 'none'}")
        if self.views[name].per == ViewPer.response:
            raise ValueError(f"{key}.view={name}: it has per=response, and a prompt's responses share one picture")
        if self.rollout_view.schedule != ScheduleConfig():
            self.views[name].scaled(0.5)
        # The engine's log-probs are those given the view, and the gradient is that of the policy given the images.
        tis = [n for n, term in self.terms.items() if getattr(term, "tis", Truncation.off) != Truncation.off]
        if tis or self.old_log_probs == OldLogProbs.rollout:
            wrong = f"algorithm.terms.{tis[0]}.tis" if tis else "algorithm.old_log_probs=rollout"
            raise ValueError(f"{key}.view={name} with {wrong}: the engine's log-probs are those of another image")
