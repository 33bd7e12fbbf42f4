"""Times the rollout engines against each other, and a weight sync into each, on the same prompts in one run.

    python scripts/benchmark_rollout.py [--preset quickstart] [--rounds 5] [hydra overrides]

Rounds alternate between the engines, so that both meet the same noise of the machine; the first two of each warm up.
Compare the ratio, and within a row the medians: the times themselves are those of this machine at this moment.
"""

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from tqdm import tqdm

from verl.config.compose import compose_config
from verl.data.collate import PromptCollator
from verl.data.dataset import PromptDataset
from verl.data.vision import VisionProcessor
from verl.single_controller.preflight import place_ranks
from verl.single_controller.resources import plan_layout, start_ray
from verl.single_controller.rollout_group import RolloutGroup
from verl.single_controller.worker_group import ActorGroup
from verl.utils.process import quiet_libraries
from verl.workers.rollout.base import train_sampling
from verl.workers.rollout.engines import choose_engine

WARM_UP = 2


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="quickstart")
    parser.add_argument("--engines", default="hf,vllm", help="the ratio is that of the last to the first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.WARNING)
    quiet_libraries()
    config = compose_config(options.preset, options.overrides)
    config.trainer.nnodes = config.trainer.n_gpus_per_node = 1
    layout = plan_layout(config.trainer, config.worker.rollout)
    vision = VisionProcessor(config.worker.actor.model.model_path, config.data.min_pixels, config.data.max_pixels)
    data = PromptDataset(config.data.train_files, "data.train_files", config.data, vision)
    count = min(config.data.rollout_batch_size, len(data))
    prompts = PromptCollator(vision.special.pad)([data[i] for i in range(count)])

    start_ray(layout)
    names = [choose_engine(replace(config.worker.rollout, name=name)) for name in options.engines.split(",")]
    placement = place_ranks(layout, 1, config.trainer.cluster_timeout_s)
    actor = ActorGroup(config, layout, placement)
    actor.build(total_updates=1)
    speeds: dict[str, list[float]] = {name: [] for name in names}
    syncs: dict[str, list[float]] = {name: [] for name in names}
    # Two engines do not fit on a GPU beside the trainer; on CPU they wait while it is not their turn.
    for together in [names] if layout.device == "cpu" else [[name] for name in names]:
        groups = {}
        for name in together:
            rollout = replace(config.worker.rollout, name=name)
            own = replace(config, worker=replace(config.worker, rollout=rollout))
            groups[name] = RolloutGroup(own, layout, placement, vision.special.pad)
            groups[name].build()
        for epoch in tqdm(range(WARM_UP + options.rounds), desc=" and ".join(together), unit="round"):
            uids = list(prompts["uid"])
            sampling = train_sampling(config.worker.rollout, config.data.max_response_length, uids, epoch)
            for name, group in groups.items():
                seconds, responses = timed(lambda g=group, s=sampling: g.result(g.generate(prompts, s)))
                speeds[name].append(int(responses["response_mask"].sum()) / seconds)
                syncs[name].append(timed(lambda g=group: g.sync_weights(actor))[0])
        for group in groups.values():
            group.stop()
    ray.shutdown()

    model = Path(config.worker.actor.model.model_path)
    lines = [
        f"{count} prompts x {config.worker.rollout.n} responses of at most {config.data.max_response_length} tokens, "
        f"model {model.parent.name}/{model.name} on {layout.device}; median of {options.rounds} rounds",
        f"{'engine':8}{'tokens/s':>12}{'weight sync, s':>18}",
    ]
    speed = {name: statistics.median(values[WARM_UP:]) for name, values in speeds.items()}
    for name in names:
        lines.append(f"{name:8}{speed[name]:12.0f}{statistics.median(syncs[name][WARM_UP:]):18.3f}")
    lines.append(f"{names[-1]} / {names[0]}: {speed[names[-1]] / speed[names[0]]:.2f}x")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
