"""RayTrainer: builds what a plan describes and runs it from the first step to the summary."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator

import ray
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from verl.algorithms.losses.compose import build_terms
from verl.algorithms.rewards import RewardKL
from verl.data.thumbnails import views_to_show
from verl.protocol import DataProto
from verl.single_controller.resources import start_ray
from verl.tracking import Trackers
from verl.trainer.collect import Collector
from verl.trainer.plan import Plan
from verl.trainer.run import Run
from verl.trainer.run_dir import RunDir
from verl.trainer.step import run_step
from verl.trainer.validation import validate
from verl.trainer.watchdog import Verdict, Watchdog
from verl.trainer.workers import Workers

logger = logging.getLogger(__name__)


class RayTrainer:
    """Runs a plan. The driver keeps the order; workers hold every model."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.trainer = plan.config.trainer
        self.run_dir = RunDir(plan.config)
        self.trackers = Trackers(self.run_dir.path, plan.config)
        views = plan.config.algorithm.views
        self.shown = self.trainer.val_generations_to_log if self.trackers.show_generations else 0
        self.shown_views = views_to_show({v: views[v] for v in plan.requirements.views}) if self.shown else {}

    def fit(self) -> dict[str, float]:
        """Train, or only validate; returns what summary.json holds."""
        started, succeeded = time.perf_counter(), False
        try:
            plan = self.plan
            start_ray(plan.layout, self.trainer.nnodes)
            workers = Workers.build(plan)
            reward_kl = RewardKL(plan.config.algorithm.reward_kl)
            self.run = Run(
                plan.config, plan.sizes, plan.requirements, plan.vision, workers, plan.total_steps, reward_kl
            )
            with logging_redirect_tqdm():
                validations = self._validate_only() if self.trainer.val_only else self._train()
            if self.trainer.save_model and not self.trainer.val_only:
                workers.actor.save_huggingface(self.run_dir.file("model"))
            succeeded = True
        finally:
            self.trackers.close(succeeded)
            ray.shutdown()
            self.run_dir.draw_curves()
        summary = {
            "steps": validations.pop("steps", plan.total_steps),
            "seconds": round(time.perf_counter() - started, 1),
            "seed": self.trainer.seed,
            **validations,
        }
        self.run_dir.write_summary(summary)
        return summary

    def _train(self) -> dict[str, float]:
        """All steps; returns val_accuracy_before and val_accuracy_after (and the same of the reward), as measured."""
        validations = {}
        if self.trainer.val_before_train:
            metrics = self._validate(0)
            self.trackers.log(0, metrics)
            validations |= _for_summary(metrics, "before")
        collector = Collector(self.run, self._prompts())
        algorithm = self.plan.config.algorithm
        watchdog, verdict = Watchdog(algorithm.watchdog, build_terms(algorithm.terms)), Verdict()
        for step in tqdm(range(1, self.plan.total_steps + 1), desc="training", unit="step", smoothing=0.1):
            result = run_step(self.run, collector, step, verdict.scale)
            self.run_dir.add_samples(step, "train", result.samples)
            verdict = watchdog.observe(step, result.metrics)
            self.run_dir.add_events(verdict.events)
            last = step == self.plan.total_steps or verdict.stop
            due = self.trainer.val_freq and step % self.trainer.val_freq == 0
            if (last and self.trainer.val_after_train) or (due and not last):
                result.metrics.update(self._validate(step))
            self.trackers.log(step, result.metrics)
            if verdict.stop:
                logger.warning("the watchdog has stopped the run after step %d", step)
                validations["steps"] = step
                break
        if self.trainer.val_after_train:
            validations |= _for_summary(result.metrics, "after")
        return validations

    def _validate_only(self) -> dict[str, float]:
        metrics = self._validate(0)
        self.trackers.log(0, metrics)
        return _for_summary(metrics)

    def _prompts(self) -> Iterator[tuple[int, DataProto]]:
        """(epoch, prompts), epoch after epoch without end."""
        loader = self.plan.train_loader
        for epoch in itertools.count():
            loader.sampler.set_epoch(epoch)
            for prompts in loader:
                yield epoch, prompts

    def _validate(self, step: int) -> dict[str, float]:
        found = validate(self.run, self.plan.val_loader, self.shown_views, self.shown)
        self.run_dir.add_samples(step, "val", found.samples)
        if found.generations:
            self.trackers.log_generations(step, found.generations)
        return found.metrics


def _for_summary(metrics: dict[str, float], when: str = "") -> dict[str, float]:
    """Accuracy and reward of a validation. A reward function need not have a component `accuracy`."""
    suffix = when and f"_{when}"
    names = ("accuracy", "reward")
    return {f"val_{name}{suffix}": metrics[f"val/{name}"] for name in names if f"val/{name}" in metrics}
