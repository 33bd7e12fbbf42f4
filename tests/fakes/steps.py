"""Training steps through the trainer's own parts, without a driver around them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from verl.algorithms.losses.compose import build_terms
from verl.config.config import Config
from verl.config.sizes import compute_sizes
from verl.metrics.machine import Timings
from verl.protocol import DataProto
from verl.trainer.collect import Collector
from verl.trainer.plan import Plan, check
from verl.trainer.state import TrainState
from verl.trainer.step import prepare, speed, sync, update
from verl.trainer.workers import Workers


def two_steps(
    plan: Plan, workers: Workers, config: Config, prompts: Iterator[tuple[int, DataProto]]
) -> tuple[TrainState, list[dict[str, float]]]:
    """The metrics of two steps of `config`, whose workers and data are those of `plan`."""
    requirements = check(config)
    terms, sizes = build_terms(config.algorithm.terms), compute_sizes(config)
    plan = replace(plan, config=config, terms=terms, requirements=requirements, sizes=sizes, total_steps=2)
    state = TrainState.new(plan)
    state.prompts = prompts
    collector, found = Collector(plan, workers, state), []
    for step in (1, 2):
        timings = Timings()
        with timings("step"):
            rows = collector.finish(collector.begin())
            batch = prepare(plan, workers, state, rows, timings)
            metrics = update(plan, workers, batch, step, 1.0, timings)
            sync(workers, timings)
        found.append({**metrics, **speed(rows.batch, timings)})
    return state, found
