"""RayTrainer: checks a config, builds what it describes, and runs it from the first step to the summary."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import ray
import torch
from torchdata.stateful_dataloader import StatefulDataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from verl.algorithms.requirements import Requirements
from verl.config.config import Config
from verl.config.sizes import Sizes, compute_sizes
from verl.config.validate import log_requirements, validate
from verl.data.collate import PromptCollator
from verl.data.dataset import PromptDataset
from verl.data.loader import train_loader, validation_loader
from verl.data.vision import VisionProcessor
from verl.protocol import DataProto
from verl.single_controller.resources import Layout, plan_layout, start_ray
from verl.tracking import TRACKERS
from verl.trainer.run_dir import RunDir
from verl.trainer.step import Run, run_step
from verl.trainer.validation import validate as run_validation
from verl.trainer.workers import Workers
from verl.workers.reward.manager import RewardManager
from verl.workers.rollout.engines import ENGINES

logger = logging.getLogger(__name__)


@dataclass
class Plan:
    """Everything that can be known, and refused, before a worker is started."""

    config: Config
    requirements: Requirements
    sizes: Sizes
    layout: Layout
    vision: VisionProcessor
    train_loader: StatefulDataLoader
    val_loader: StatefulDataLoader | None
    total_steps: int


def make_plan(config: Config) -> Plan:
    """Check the config and open its files. Raises ValueError or FileNotFoundError naming the key, file or row."""
    requirements = validate(config)
    for name in config.trainer.logger:
        TRACKERS[name]
    ENGINES[config.worker.rollout.name]
    RewardManager(config.worker.reward)
    layout = plan_layout(config.trainer, config.worker.rollout.cpu_threads)
    if layout.device == "cpu":
        torch.set_num_threads(1)  # the driver's image processing runs beside the workers
    sizes = compute_sizes(config)
    logger.info("%s", sizes.in_words())
    log_requirements(config, requirements)
    data, model = config.data, config.worker.actor.model
    vision = VisionProcessor(model.model_path, data.min_pixels, data.max_pixels, model.trust_remote_code)
    collator = PromptCollator(vision.special.pad)
    train_data = PromptDataset(data.train_files, "data.train_files", data, vision)
    train = train_loader(train_data, data.rollout_batch_size, data.shuffle, data.seed, data.num_workers, collator)
    val = None
    if data.val_files is not None:
        val_data = PromptDataset(data.val_files, "data.val_files", data, vision)
        val = validation_loader(val_data, data.val_batch_size, data.num_workers, collator)
    total_steps = config.trainer.max_steps or config.trainer.total_epochs * len(train)
    logger.info("%d steps, %d per epoch", total_steps, len(train))
    return Plan(config, requirements, sizes, layout, vision, train, val, total_steps)


class RayTrainer:
    """Runs a plan. The driver keeps the order; workers hold every model."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.trainer = plan.config.trainer
        self.run_dir = RunDir(plan.config)
        self.trackers = [TRACKERS[name](self.run_dir.path) for name in self.trainer.logger]

    def fit(self) -> dict[str, float]:
        """Train; returns what summary.json holds."""
        started = time.perf_counter()
        start_ray(self.plan.layout)
        try:
            plan = self.plan
            updates = plan.total_steps * plan.sizes.updates_per_step
            workers = Workers.build(plan.config, plan.requirements, plan.layout, updates)
            self.run = Run(plan.config, plan.sizes, plan.requirements, plan.vision, workers)
            with logging_redirect_tqdm():
                validations = self._train()
            if self.trainer.save_model:
                workers.actor.save_huggingface(self.run_dir.file("model"))
        finally:
            for tracker in self.trackers:
                tracker.close()
            ray.shutdown()
            self.run_dir.draw_curves()
        summary = {
            "steps": plan.total_steps,
            "seconds": round(time.perf_counter() - started, 1),
            "seed": self.trainer.seed,
            **validations,
        }
        self.run_dir.write_summary(summary)
        return summary

    def _train(self) -> dict[str, float]:
        """All steps; returns val_accuracy_before and val_accuracy_after, as far as they were measured."""
        validations = {}
        if self.trainer.val_before_train:
            metrics = self._validate(0)
            self._log(0, metrics)
            validations["val_accuracy_before"] = metrics["val/accuracy"]
        steps = tqdm(self._prompts(), total=self.plan.total_steps, desc="training", unit="step", smoothing=0.1)
        for step, (epoch, prompts) in enumerate(steps, start=1):
            result = run_step(self.run, prompts, epoch)
            self.run_dir.add_samples(step, "train", result.samples)
            last = step == self.plan.total_steps
            due = self.trainer.val_freq and step % self.trainer.val_freq == 0
            if (last and self.trainer.val_after_train) or (due and not last):
                result.metrics.update(self._validate(step))
            self._log(step, result.metrics)
        if self.trainer.val_after_train:
            validations["val_accuracy_after"] = result.metrics["val/accuracy"]
        return validations

    def _prompts(self) -> Iterator[tuple[int, DataProto]]:
        """(epoch, prompts) for every step of the run."""
        loader, epoch, step = self.plan.train_loader, 0, 0
        while True:
            loader.sampler.set_epoch(epoch)
            for prompts in loader:
                yield epoch, prompts
                step += 1
                if step == self.plan.total_steps:
                    return
            epoch += 1

    def _validate(self, step: int) -> dict[str, float]:
        metrics, samples = run_validation(self.run, self.plan.val_loader)
        self.run_dir.add_samples(step, "val", samples)
        return metrics

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(step, metrics)
