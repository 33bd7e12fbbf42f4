"""Validation: avg@k on held-out prompts."""

from __future__ import annotations

from typing import Any

import ray
from torchdata.stateful_dataloader import StatefulDataLoader
from tqdm import tqdm

from verl.trainer.collect import reward_inputs
from verl.trainer.run import Run
from verl.trainer.step import samples
from verl.workers.rollout.base import validation_sampling


def validate(run: Run, loader: StatefulDataLoader) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(metrics `val/*`, samples): means over all responses, k for each prompt, with the same seeds each time."""
    totals: dict[str, float] = {}
    records: list[dict[str, Any]] = []
    count = length = 0
    for prompts in tqdm(loader, desc="validating", unit="batch", leave=False):
        config = run.config
        sampling = validation_sampling(config.worker.rollout, config.data.max_response_length, list(prompts["uid"]))
        responses = run.workers.rollout.result(run.workers.rollout.generate(prompts, sampling))
        batch = prompts.select(["uid", "problem", "answer", "prompt_ids"]).repeat_interleave(sampling[0].n)
        batch = batch.with_columns(dict(responses.tensors.items()))
        inputs = reward_inputs(run.vision, batch)
        scores = ray.get(run.workers.start_reward(inputs))
        for score in scores:
            for name, value in score.items():
                totals[name] = totals.get(name, 0.0) + value
        count += len(scores)
        length += int(batch["response_mask"].sum())
        if not records:
            records = samples(batch, inputs, scores, run.config.trainer.samples_per_step)
    metrics = {f"val/{'reward' if name == 'overall' else name}": total / count for name, total in totals.items()}
    return {**metrics, "val/response_length_mean": length / count}, records
