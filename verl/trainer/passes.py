"""The passes without gradient that come before the updates: only those that some loss term requires."""

from __future__ import annotations

import torch

from verl.columns import view_column
from verl.config.algorithm import OldLogProbs
from verl.metrics.machine import Timings
from verl.models.forward import TOKENS
from verl.protocol import DataProto
from verl.trainer.plan import recomputes_old
from verl.trainer.run import Run


def run_passes(batch: DataProto, run: Run, timings: Timings) -> DataProto:
    """`batch` with `old_log_probs`, `ref_log_probs`, `values` and `<view>_log_probs`, each where it is required."""
    workers, requirements = run.workers, run.requirements
    tokens = batch.select([*TOKENS, "mm_inputs"])
    found = {}
    # Older weights drew the responses that have waited for this step, and only the engine has their log-probs.
    wanted, waited = run.config.algorithm.old_log_probs, batch["weight_version"] != workers.rollout.version
    keeps = wanted == OldLogProbs.auto and requirements.old and bool(waited.any())
    if keeps or recomputes_old(run.config, requirements, run.sizes):
        with timings("old_log_probs"):
            old = workers.actor.compute_log_probs(tokens)["log_probs"]
        found["old_log_probs"] = torch.where(waited[:, None], batch["rollout_log_probs"], old) if keeps else old
    if requirements.reference:
        with timings("ref_log_probs"):
            found["ref_log_probs"] = workers.compute_reference_log_probs(tokens)["log_probs"]
    if requirements.critic:
        with timings("values"):
            found["values"] = workers.critic.compute_values(tokens)["values"]
    for view in requirements.stored_views:
        with timings(view_column(view, "log_probs")):
            images = [view_column(view, "mm_inputs"), view_column(view, "rows")]
            seen = workers.actor.compute_log_probs(batch.select([*TOKENS, *images]), view)
            found[view_column(view, "log_probs")] = seen["log_probs"]
    return batch.with_columns(found)
