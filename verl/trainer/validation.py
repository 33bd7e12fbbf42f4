"""Validation: avg@k on held-out prompts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from verl.data.thumbnails import thumbnails, views_to_show
from verl.protocol import DataProto
from verl.single_controller.rollout_group import Rollout
from verl.tracking import Row, Trackers
from verl.tracking.samples import add_pictures, add_tokens, samples
from verl.trainer.collect import reward_inputs
from verl.trainer.plan import Plan
from verl.trainer.run_dir import RunDir
from verl.trainer.workers import Workers
from verl.workers.reward.base import Outcome, RewardInput, RewardScore, component_means
from verl.workers.rollout.base import SamplingParams, validation_sampling


@dataclass
class Answers:
    """Responses to a batch of prompts, those to one prompt side by side, and their grading.

    Attributes:
        batch: A row per response: `uid`, `problem`, `answer`, `prompt_ids` and what the engine gave.
    """

    prompts: DataProto
    batch: DataProto
    inputs: list[RewardInput]
    outcomes: list[Outcome]


def answers(plan: Plan, workers: Workers, batches: Iterable[DataProto], step: int = 0) -> Iterator[Answers]:
    """The answers to each batch of prompts, sampled as in validation. While one is graded, the engines are at the
    next."""
    waiting: list[tuple[DataProto, list[SamplingParams], Rollout]] = []
    for prompts in batches:
        waiting.append(_ask(plan, workers, prompts))
        if len(waiting) > 1:
            yield _answer(plan, workers, step, *waiting.pop(0))
    for last in waiting:
        yield _answer(plan, workers, step, *last)


def _ask(plan: Plan, workers: Workers, prompts: DataProto) -> tuple[DataProto, list[SamplingParams], Rollout]:
    config = plan.config
    sampling = validation_sampling(config.worker.rollout, config.data.max_response_length, list(prompts["uid"]))
    return prompts, sampling, workers.rollout.generate(prompts, sampling)


def _answer(
    plan: Plan, workers: Workers, step: int, prompts: DataProto, sampling: list[SamplingParams], rollout: Rollout
) -> Answers:
    responses = workers.rollout.result(rollout)
    batch = prompts.select(["uid", "problem", "answer", "prompt_ids"]).repeat_interleave(sampling[0].n)
    batch = batch.with_columns(responses.tensors)
    inputs = reward_inputs(plan.vision, batch, step)
    return Answers(prompts, batch, inputs, workers.reward.result(workers.reward.start(inputs)))


class Validation:
    """Validates the current policy. Samples go to the run's folder, and generations with thumbnails, the first response
    to each of the first `trainer.val_generations_to_log` prompts, to trackers that can show them."""

    def __init__(self, plan: Plan, workers: Workers, run_dir: RunDir, trackers: Trackers) -> None:
        self.plan = plan
        self.workers = workers
        self.run_dir = run_dir
        self.trackers = trackers
        self.shown = plan.config.trainer.val_generations_to_log if trackers.show_generations else 0
        views = plan.config.algorithm.views
        self.views = views_to_show({v: views[v] for v in plan.requirements.views}) if self.shown else {}

    def run(self, step: int) -> dict[str, float]:
        """`val/*`: means over all responses that were graded, k for each prompt, with the same seeds each time; where
        there are several files, `val/FILE/*` as well.

        Args:
            step: The last one that is done.
        """
        config, loader = self.plan.config, self.plan.val_loader
        scores: list[tuple[str, RewardScore]] = []  # each with the name of its file
        count = length = 0
        records: list[dict[str, Any]] = []
        generations: list[Row] = []
        copies = config.worker.rollout.val_override_config.n or config.worker.rollout.n
        self.workers.reward.begin(len(loader.dataset) * copies)
        try:
            batches = tqdm(loader, desc="validating", unit="batch", leave=False)
            for found in answers(self.plan, self.workers, batches, step):
                graded = zip(found.inputs, found.outcomes, strict=True)
                scores += [(one["uid"].rpartition(":")[0], out.score) for one, out in graded if out.score is not None]
                count += len(found.outcomes)
                length += int(found.batch["response_mask"].sum())
                records = records or self._samples(found, copies)
                generations += self._rows(found, copies, self.shown - len(generations))
        finally:
            self.run_dir.add_failures(step, self.workers.reward.take_failures())
        self.run_dir.add_samples(step, "val", records)
        if generations:
            self.trackers.log_generations(step, generations)
        metrics = means("val", [score for _, score in scores])
        files = [source.name for source in loader.dataset.rows.sources]
        if len(files) > 1:
            for file, label in zip(files, labels(files), strict=True):
                metrics |= means(f"val/{label}", [score for name, score in scores if name == file])
        failed = (count - len(scores)) / count
        return metrics | {"val/response_length_mean": length / count, "val/failed_frac": failed}

    def _samples(self, found: Answers, copies: int) -> list[dict[str, Any]]:
        """Records of the first response to each of the first prompts: the same questions at each validation."""
        first, count = found.batch.rows(slice(0, None, copies)), self.plan.config.trainer.samples_per_step
        records = samples(first, found.inputs[::copies], found.outcomes[::copies], count)
        add_tokens(records, first, self.plan.vision.tokenizer)
        vision, seed = self.plan.vision, self.plan.config.trainer.seed
        pairs = zip(records, found.prompts["images"], strict=False)
        add_pictures(records, [thumbnails(record["uid"], images, {}, vision, seed) for record, images in pairs])
        return records

    def _rows(self, found: Answers, copies: int, count: int) -> list[Row]:
        """The first response to each of the first `count` prompts as rows of a table with thumbnails."""
        rows = []
        first = found.batch.rows(slice(0, None, copies)), found.inputs[::copies], found.outcomes[::copies]
        for record, images in zip(samples(*first, count), found.prompts["images"], strict=False):
            score = record.pop("score")
            seed = self.plan.config.trainer.seed
            pictures = thumbnails(record["uid"], images, self.views, self.plan.vision, seed)
            rows.append({**record, **{f"score/{name}": value for name, value in score.items()}, **pictures})
        return rows


def labels(files: list[str]) -> list[str]:
    """The files' names without folders and ending, or the whole names where these are not different."""
    short = [os.path.splitext(os.path.basename(file))[0] for file in files]
    return short if len(set(short)) == len(short) else files


def means(prefix: str, scores: list[RewardScore]) -> dict[str, float]:
    """The mean of each component of the scores; the trained one is called `reward`."""
    found = component_means(scores)
    return {f"{prefix}/{'reward' if name == 'overall' else name}": mean for name, mean in found.items()}


def for_summary(metrics: dict[str, float], when: str = "") -> dict[str, float]:
    """Accuracy and reward of a validation. A reward function need not have a component `accuracy`."""
    suffix = when and f"_{when}"
    names = ("accuracy", "reward")
    return {f"val_{name}{suffix}": metrics[f"val/{name}"] for name in names if f"val/{name}" in metrics}
