"""RayTrainer: builds what a plan describes and runs it from the first step to the summary."""

from __future__ import annotations

import logging
from typing import Any, NoReturn

import ray
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from verl.algorithms.losses.compose import build_terms
from verl.algorithms.rewards import RewardKL
from verl.config.algorithm import WatchdogAction
from verl.data.thumbnails import views_to_show
from verl.single_controller.resources import start_ray
from verl.tracking import Trackers
from verl.trainer.checkpointer import Checkpointer
from verl.trainer.collect import Collector
from verl.trainer.interrupts import Interrupts, RunInterrupted
from verl.trainer.plan import Plan
from verl.trainer.progress import Driver, Progress
from verl.trainer.prompts import PromptStream
from verl.trainer.resume import (
    checkpoints_of,
    find_resume_point,
    refuse_another_experiment,
    restore,
    set_aside_later,
)
from verl.trainer.run import Run
from verl.trainer.run_dir import RunDir
from verl.trainer.step import run_step
from verl.trainer.validation import validate
from verl.trainer.watchdog import Watchdog
from verl.trainer.workers import Workers

logger = logging.getLogger(__name__)

LENGTH = {"trainer.max_steps", "trainer.total_epochs"}


class RayTrainer:
    """Runs a plan. The driver keeps the order; workers hold every model."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.trainer = plan.config.trainer
        self.point = find_resume_point(plan.config)
        if self._is_complete() and self.point.changed.keys() - LENGTH:
            logger.warning(
                "the run in %s is complete and had other settings: this one begins anew", self.trainer.output_dir
            )
            self.point = None
        elif self.point is not None:
            refuse_another_experiment(self.point, plan.config)
        self.run_dir = RunDir(plan.config, self.point.step if self.point and self.point.own else None)
        self.complete = self._summary_of_complete_run()
        self.trackers = None if self.complete else Trackers(self.run_dir.path, plan.config)
        views = plan.config.algorithm.views
        shows = self.trackers is not None and self.trackers.show_generations
        self.shown = self.trainer.val_generations_to_log if shows else 0
        self.shown_views = views_to_show({v: views[v] for v in plan.requirements.views}) if self.shown else {}

    def fit(self) -> dict[str, float]:
        """Train, or only validate; returns what summary.json holds.

        Raises SaveFailed where the last checkpoint could not be saved, ResumeError where the first one does not fit,
        RunInterrupted where a signal ended the run.
        """
        if self.complete:
            logger.info("%s is complete: trainer.max_steps=N goes on to step N", self.run_dir.path)
            return self.complete
        if self.point is not None:
            set_aside_later(self.point, self.plan.config)
        succeeded = False
        try:
            start_ray(self.plan.layout, self.trainer.nnodes)  # first: Ray has a handler of its own for SIGTERM
            with Interrupts(self.trainer.on_signal) as interrupts:
                found = self._run(interrupts)
            succeeded = True
        except RunInterrupted:
            succeeded = True
            raise
        finally:
            self.trackers.close(succeeded)
            ray.shutdown()
            self.run_dir.draw_curves()
        summary = {"steps": found.step, "seconds": round(found.total_seconds(), 1), "seed": self.trainer.seed}
        summary |= found.validations
        self.run_dir.write_summary(summary)
        return summary

    def _is_complete(self) -> bool:
        """Whether the checkpoint of this run that there is leaves nothing to do."""
        if self.point is None or not self.point.own:
            return False
        halted = self.point.state["stopped"] and self.plan.config.algorithm.watchdog.action == WatchdogAction.stop
        return halted or self.point.step >= self.plan.total_steps

    def _summary_of_complete_run(self) -> dict[str, float] | None:
        """That of this very run, where there is nothing left to do."""
        if self._is_complete():
            return self.run_dir.read_summary()
        if self.point is not None and self.point.own:
            self.run_dir.remove_summary()
        return None

    def _run(self, interrupts: Interrupts) -> Progress:
        """Start the workers and train or validate. Raises RunInterrupted."""
        plan = self.plan
        try:
            workers = Workers.build(plan)
            reward_kl = RewardKL(plan.config.algorithm.reward_kl)
            self.run = Run(
                plan.config, plan.sizes, plan.requirements, plan.vision, workers, plan.total_steps, reward_kl
            )
            with logging_redirect_tqdm():
                return self._validate_only() if self.trainer.val_only else self._train(interrupts)
        except KeyboardInterrupt:
            raise RunInterrupted(f"ended by {interrupts.requested}; no step had been done since the start") from None

    def _train(self, interrupts: Interrupts) -> Progress:
        """All steps that are left, and the model as a Hugging Face folder. Raises RunInterrupted."""
        driver = self._driver()
        interrupts.begin_training()
        progress, keeper = driver.progress, Checkpointer(checkpoints_of(self.plan.config), driver)
        left = range(progress.step + 1, self.plan.total_steps + 1)
        bar = tqdm(
            left, initial=progress.step, total=self.plan.total_steps, desc="training", unit="step", smoothing=0.1
        )
        try:
            for step in bar:
                if progress.stopped:
                    break
                self._step(driver, step, keeper, interrupts)
                if interrupts.requested and step < self.plan.total_steps and not progress.stopped:
                    self._end(keeper, interrupts, driver.state_dict())
            if self.trainer.save_model:
                self.run.workers.actor.save_huggingface(self.run_dir.file("model"))
        except Exception:
            keeper.rescue()
            raise
        keeper.close()
        return progress

    def _driver(self) -> Driver:
        """All parts as they are before the first step, or as they were when the checkpoint was saved."""
        algorithm = self.plan.config.algorithm
        prompts = PromptStream(self.plan.train_loader)
        watchdog = Watchdog(algorithm.watchdog, build_terms(algorithm.terms))
        driver = Driver(self.run, Progress(), prompts, Collector(self.run, prompts), watchdog)
        if self.point is not None:
            restore(self.point, driver)
            if algorithm.watchdog.action != WatchdogAction.stop:
                driver.progress.stopped = False
        elif self.trainer.val_before_train:
            metrics = self._validate(0)
            self.trackers.log(0, metrics)
            driver.progress.validations |= _for_summary(metrics, "before")
        return driver

    def _step(self, driver: Driver, step: int, keeper: Checkpointer, interrupts: Interrupts) -> None:
        """One step, and what follows from it: events, validation, records, a checkpoint."""
        progress = driver.progress
        before = driver.state_dict() if interrupts.stops_now else {}
        try:
            interrupts.begin_step()  # from here on a signal may come as KeyboardInterrupt
            result = run_step(self.run, driver.collector, step, driver.watchdog.scale, interrupts.begin_update)
            interrupts.begin_update()  # a step without rows has not come to it
        except KeyboardInterrupt:
            self._end(keeper, interrupts, before)
        self.run_dir.add_samples(step, "train", result.samples)
        verdict = driver.watchdog.observe(step, result.metrics)
        self.run_dir.add_events(verdict.events)
        progress.step, progress.stopped = step, verdict.stop
        last = step == self.plan.total_steps or verdict.stop
        due = self.trainer.val_freq and step % self.trainer.val_freq == 0
        if (last and self.trainer.val_after_train) or (due and not last):
            result.metrics.update(self._validate(step))
        best = progress.is_best(self.trainer.save_best, result.metrics)
        if last and self.trainer.val_after_train:
            progress.validations |= _for_summary(result.metrics, "after")
        self.trackers.log(step, result.metrics)
        if verdict.stop:
            logger.warning("the watchdog has stopped the run after step %d", step)
        if best or (self.trainer.save_freq and (last or step % self.trainer.save_freq == 0)):
            self.run_dir.sync()
            keeper.save()
        else:
            keeper.poll()

    def _end(self, keeper: Checkpointer, interrupts: Interrupts, state: dict[str, Any]) -> NoReturn:
        """Save where the run stands, if no checkpoint has that yet. Raises RunInterrupted, or SaveFailed."""
        if state["step"]:
            self.run_dir.sync()
            keeper.save_once(state)
        keeper.close()
        raise RunInterrupted(
            f"ended by {interrupts.requested} after step {state['step']}; the same command goes on from there"
        )

    def _validate_only(self) -> Progress:
        metrics = self._validate(0)
        self.trackers.log(0, metrics)
        return Progress(validations=_for_summary(metrics))

    def _validate(self, step: int) -> dict[str, float]:
        found = validate(self.run, self.plan.val_loader, step, self.shown_views, self.shown)
        self.run_dir.add_samples(step, "val", found.samples)
        if found.generations:
            self.trackers.log_generations(step, found.generations)
        return found.metrics


def _for_summary(metrics: dict[str, float], when: str = "") -> dict[str, float]:
    """Accuracy and reward of a validation. A reward function need not have a component `accuracy`."""
    suffix = when and f"_{when}"
    names = ("accuracy", "reward")
    return {f"val_{name}{suffix}": metrics[f"val/{name}"] for name in names if f"val/{name}" in metrics}
