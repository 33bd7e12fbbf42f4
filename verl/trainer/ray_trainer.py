"""RayTrainer: runs a plan from the first step to the summary. Its `_step` is the whole of a training step."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import ray
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from verl.config.algorithm import WatchdogAction
from verl.metrics.machine import Overlap, Timings, host_memory
from verl.single_controller.resources import start_ray
from verl.tracking import Trackers
from verl.trainer.checkpoints import (
    Checkpointer,
    ResumePoint,
    find_resume_point,
    refuse_another_experiment,
    restore,
    set_aside_later,
)
from verl.trainer.collect import Collector
from verl.trainer.plan import Plan
from verl.trainer.run_dir import RunDir
from verl.trainer.state import TrainState
from verl.trainer.step import Batch, prepare, speed, sync, update
from verl.trainer.validation import Validation, for_summary
from verl.trainer.workers import Workers
from verl.utils.interrupts import Interrupts, RunInterrupted

logger = logging.getLogger(__name__)

LENGTH = {"trainer.max_steps", "trainer.total_epochs"}


class Listener:
    """Is told of a run's events, in the driver and between steps. The base does nothing."""

    def begin(self, step: int, total: int) -> None:
        """Training begins after `step` of `total` steps."""

    def done(self, step: int, metrics: dict[str, float], saved: bool) -> bool:
        """A step is done and recorded, or, with step 0, the validation before the first. Returns whether the run ends
        here, after a checkpoint.

        Args:
            metrics: What trackers get; with `val/*` where the step was validated.
            saved: Whether a checkpoint was begun.
        """
        return False


class RayTrainer:
    """Runs a plan. The driver keeps the order; workers hold every model."""

    def __init__(self, plan: Plan, listener: Listener | None = None) -> None:
        self.plan = plan
        self.listener = listener or Listener()
        self.config = plan.config.trainer
        self.complete: dict[str, float] | None = None  # the summary, where there is nothing left to do

    def open(self) -> None:
        """Find where the run goes on, and open its folder and trackers. Raises ValueError naming the key or folder."""
        point = find_resume_point(self.plan.config)
        ended = self._has_ended(point)
        if ended and point.changed.keys() - LENGTH:
            logger.warning(
                "the run in %s is complete and had other settings: this one begins anew", self.config.output_dir
            )
            point, ended = None, False
        elif point is not None:
            refuse_another_experiment(point, self.plan.config)
        self.point = point
        self.run_dir = RunDir(self.plan.config, point.step if point and point.own else None)
        if ended:
            self.complete = self.run_dir.read_summary()
        elif point is not None and point.own:
            self.run_dir.remove_summary()
        if not self.complete:
            self.trackers = Trackers(self.run_dir.path, self.plan.config)

    def _has_ended(self, point: ResumePoint | None) -> bool:
        """Whether the checkpoint of this run that there is leaves nothing to do."""
        if point is None or not point.own:
            return False
        stops = self.plan.config.algorithm.watchdog.action == WatchdogAction.stop
        return (point.state["stopped"] and stops) or point.step >= self.plan.total_steps

    def fit(self) -> dict[str, float]:
        """Train, or only validate, after `open`; returns what summary.json holds.

        Raises SaveFailed where the last checkpoint could not be saved, ResumeError where the first one does not fit,
        RunInterrupted where a signal ended the run.
        """
        if self.complete:
            logger.info("%s is complete: trainer.max_steps=N goes on to step N", self.run_dir.path)
            return self.complete
        if self.point is not None:
            set_aside_later(self.point, self.plan.config)
        succeeded, started = False, time.perf_counter()
        own_ray, self.workers = True, None
        try:
            own_ray = start_ray(self.plan.layout, self.config.nnodes)  # first: Ray has a handler for SIGTERM
            with Interrupts(self.config.on_signal) as interrupts, logging_redirect_tqdm():
                try:
                    self._start()
                    found = for_summary(self._validate()) if self.config.val_only else self._train(interrupts)
                except KeyboardInterrupt:
                    text = f"ended by {interrupts.requested}; no step had been done since the start"
                    raise RunInterrupted(text) from None
            succeeded = True
        except RunInterrupted:
            succeeded = True
            raise
        finally:
            self.trackers.close(succeeded)
            if own_ray:
                ray.shutdown()
            elif self.workers is not None:
                self.workers.close()
            self.run_dir.draw_curves()
        steps = 0 if self.config.val_only else self.state.step
        seconds = time.perf_counter() - started if self.config.val_only else self.state.total_seconds()
        summary = {"steps": steps, "seconds": round(seconds, 1), "seed": self.config.seed, **found}
        self.run_dir.write_summary(summary)
        return summary

    def _start(self) -> None:
        """Start the workers, and validate before the first step or take the state of the checkpoint."""
        plan = self.plan
        self.workers = Workers.build(plan)
        self.validation = Validation(plan, self.workers, self.run_dir, self.trackers)
        if self.config.val_only:
            return
        self.state = TrainState.new(plan)
        self.collector = Collector(plan, self.workers, self.state)
        self.keeper = Checkpointer(plan.config, self.workers, self.state)
        if self.point is not None:
            restore(self.point, plan.config, self.workers, self.state)
            if plan.config.algorithm.watchdog.action != WatchdogAction.stop:
                self.state.stopped = False
        elif self.config.val_before_train:
            self.state.validations |= for_summary(self._validate(), "before")

    def _validate(self) -> dict[str, float]:
        """Validate before any step."""
        metrics = self.validation.run(0)
        self.trackers.log(0, metrics)
        self.listener.done(0, metrics, saved=False)
        return metrics

    def _train(self, interrupts: Interrupts) -> dict[str, float]:
        """Run the remaining steps and save the model as a Hugging Face folder. Raises RunInterrupted."""
        interrupts.begin_training()
        state, total = self.state, self.plan.total_steps
        self.listener.begin(state.step, total)
        left = range(state.step + 1, total + 1)
        try:
            for step in tqdm(left, initial=state.step, total=total, desc="training", unit="step", smoothing=0.1):
                if state.stopped:
                    break
                batch, metrics = self._step(step, interrupts)
                if self._record(step, batch, metrics):
                    interrupts.requested = interrupts.requested or "a callback"
                if interrupts.requested and step < total and not state.stopped:
                    self._end(interrupts, self.keeper.driver_state())
            if self.config.save_model:
                self.workers.rollout.sleep()  # gathering whole weights takes memory on GPUs that engines may fill
                self.workers.actor.save_huggingface(self.run_dir.file("model"))
        except Exception:
            self.keeper.rescue()
            raise
        finally:
            self._write_failures(state.step + 1)  # of a step that was not finished
        self.keeper.close()
        return state.validations

    def _step(self, step: int, interrupts: Interrupts) -> tuple[Batch | None, dict[str, float]]:
        """Generate, score, compute log-probs and advantages, update, and give the engines the new weights; with
        `trainer.ahead` also generate for the next step, before they have them."""
        plan, workers, state, timings = self.plan, self.workers, self.state, Timings()
        looks_ahead = self.config.ahead and step < plan.total_steps
        before = self.keeper.driver_state() if interrupts.stops_now else {}
        try:
            interrupts.begin_step()  # from here on a signal may come as KeyboardInterrupt
            with timings("step"):
                with timings("rollout"):
                    rows = self.collector.take_ahead() or self.collector.finish(self.collector.begin())
                overlap = Overlap(timings)
                following = self.collector.begin(ahead=True) if looks_ahead else None
                batch = rows and prepare(plan, workers, state, rows, timings)
                interrupts.begin_update()
                if batch is not None:
                    scale, meanwhile = state.watchdog.scale, partial(self.collector.make_views, following)
                    metrics = update(plan, workers, batch, step, scale, timings, meanwhile)
                    self._write_failures(step, rows.failures)
                overlap.trained()
                if looks_ahead:
                    with timings("rollout"):
                        state.ahead = self.collector.finish(following)
                    if state.ahead is not None:
                        state.ahead.failures = workers.reward.take_failures()
                if batch is None:
                    logger.warning("step %d has nothing to train on: every group was all right or all wrong", step)
                    return None, {"train/empty_step": 1.0}
                sync(workers, timings)
        except KeyboardInterrupt:
            self._end(interrupts, before)
        if looks_ahead:
            metrics |= overlap.metrics(workers.rollout.engine_seconds())
        return batch, {**metrics, **speed(rows.batch, timings), **host_memory()}

    def _record(self, step: int, batch: Batch | None, metrics: dict[str, float]) -> bool:
        """Record a step: events, validation, metrics, samples, a checkpoint. Returns whether the listener ends the
        run."""
        state, config = self.state, self.config
        self.run_dir.add_samples(step, "train", batch.samples if batch else [])
        self._write_failures(step)
        verdict = state.watchdog.observe(step, metrics)
        self.run_dir.add_events(verdict.events)
        state.step, state.stopped = step, verdict.stop
        last = step == self.plan.total_steps or verdict.stop
        due = config.val_freq and step % config.val_freq == 0
        if (last and config.val_after_train) or (due and not last):
            metrics.update(self.validation.run(step))
        best = state.is_best(config.save_best, metrics)
        if last and config.val_after_train:
            state.validations |= for_summary(metrics, "after")
        self.trackers.log(step, metrics)
        if verdict.stop:
            logger.warning("the watchdog has stopped the run after step %d", step)
        saved = best or bool(config.save_freq and (last or step % config.save_freq == 0))
        if saved:
            self.run_dir.sync()
            self.keeper.save()
        else:
            self.keeper.poll()
        return self.listener.done(step, metrics, saved)

    def _write_failures(self, step: int, earlier: Sequence[dict] = ()) -> None:
        self.run_dir.add_failures(step, [*earlier, *self.workers.reward.take_failures()])

    def _end(self, interrupts: Interrupts, state: dict[str, Any]) -> NoReturn:
        """Save where the run stands, if no checkpoint has that yet. Raises RunInterrupted, or SaveFailed."""
        if state["step"]:
            self.run_dir.sync()
            self.keeper.save_once(state)
        self.keeper.close()
        raise RunInterrupted(
            f"ended by {interrupts.requested} after step {state['step']}; the same command goes on from there"
        )
