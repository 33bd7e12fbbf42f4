"""Validation: avg@k on held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchdata.stateful_dataloader import StatefulDataLoader
from tqdm import tqdm

from verl.config.algorithm import ViewConfig
from verl.data.thumbnails import thumbnails
from verl.protocol import DataProto
from verl.tracking import Row
from verl.trainer.collect import reward_inputs
from verl.trainer.run import Run
from verl.trainer.step import samples
from verl.workers.reward.base import Outcome, RewardInput
from verl.workers.rollout.base import validation_sampling


@dataclass
class Validation:
    """`metrics` are `val/*`, `samples` records for samples.jsonl, `generations` rows for trackers' tables."""

    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    generations: list[Row] = field(default_factory=list)


def validate(
    run: Run, loader: StatefulDataLoader, step: int, views: Mapping[str, ViewConfig], generations: int
) -> Validation:
    """Means over all responses that were graded, k for each prompt, with the same seeds each time.

    Args:
        step: the one that is done.
        views: what the thumbnails beside the first response to each of the first `generations` prompts show.
    """
    found = Validation()
    totals: dict[str, float] = {}
    count = graded = length = 0
    config = run.config
    override = config.worker.rollout.val_override_config.n
    run.workers.reward.begin(step, len(loader.dataset) * (override or config.worker.rollout.n))
    for prompts in tqdm(loader, desc="validating", unit="batch", leave=False):
        sampling = validation_sampling(config.worker.rollout, config.data.max_response_length, list(prompts["uid"]))
        responses = run.workers.rollout.result(run.workers.rollout.generate(prompts, sampling))
        n = sampling[0].n
        batch = prompts.select(["uid", "problem", "answer", "prompt_ids"]).repeat_interleave(n)
        batch = batch.with_columns(dict(responses.tensors.items()))
        inputs = reward_inputs(run.vision, batch)
        outcomes = run.workers.reward.result(run.workers.reward.start(inputs))
        for score in (outcome.score for outcome in outcomes if outcome.score is not None):
            for name, value in score.items():
                totals[name] = totals.get(name, 0.0) + value
            graded += 1
        count += len(outcomes)
        length += int(batch["response_mask"].sum())
        if not found.samples:
            found.samples = samples(batch, inputs, outcomes, config.trainer.samples_per_step)
        wanted = generations - len(found.generations)
        first = batch.rows(slice(0, None, n)), inputs[::n], outcomes[::n]
        found.generations += generation_rows(run, prompts, *first, views, wanted)
    found.metrics = {f"val/{'reward' if name == 'overall' else name}": total / graded for name, total in totals.items()}
    found.metrics["val/response_length_mean"] = length / count
    found.metrics["val/failed_frac"] = (count - graded) / count
    return found


def generation_rows(
    run: Run,
    prompts: DataProto,
    batch: DataProto,
    inputs: list[RewardInput],
    outcomes: list[Outcome],
    views: Mapping[str, ViewConfig],
    count: int,
) -> list[Row]:
    """The first `count` responses, one to each of the `prompts`, as rows of a table with thumbnails."""
    rows = []
    for record, images in zip(samples(batch, inputs, outcomes, count), prompts["images"], strict=False):
        score = record.pop("score")
        pictures = thumbnails(record["uid"], images, views, run.vision, run.config.trainer.seed)
        rows.append({**record, **{f"score/{name}": value for name, value in score.items()}, **pictures})
    return rows
