"""All workers of a run, built side by side."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import ray
from tqdm import tqdm

from verl.algorithms.requirements import Requirements
from verl.config.config import Config
from verl.protocol import DataProto
from verl.single_controller.resources import ROLLOUT_SHARE, Layout, actor_options, place_ranks
from verl.single_controller.worker_group import ActorGroup, ReferenceGroup
from verl.workers.reward.manager import RewardInput
from verl.workers.reward.worker import RewardWorker
from verl.workers.rollout.base import SamplingParams
from verl.workers.rollout.worker import RolloutWorker

logger = logging.getLogger(__name__)


@dataclass
class Workers:
    """What the trainer calls. `rollout` and `reward` are asked by reference, so that the driver can go on."""

    actor: ActorGroup
    reference: ReferenceGroup | None
    rollout: ray.actor.ActorHandle
    reward: ray.actor.ActorHandle
    weight_version: int = 0

    @classmethod
    def build(cls, config: Config, requirements: Requirements, layout: Layout, total_updates: int) -> Workers:
        """Start every worker and wait until all are ready. Raises what a worker raised."""
        placement = place_ranks(layout, config.trainer.nnodes)
        rollout_options = actor_options(layout, placement, 0, ROLLOUT_SHARE, layout.rollout_threads)
        bar = tqdm(total=3 + requirements.reference, desc="starting workers", unit="role", leave=False)
        workers = cls(
            actor=ActorGroup(config, layout, placement),
            reference=ReferenceGroup(config, layout, placement) if requirements.reference else None,
            rollout=ray.remote(RolloutWorker)
            .options(**rollout_options)
            .remote(config, layout.device, layout.rollout_threads),
            reward=ray.remote(RewardWorker)
            .options(**actor_options(layout, None, 0, 0, threads=1))
            .remote(config.worker.reward),
        )
        parameters = workers.actor.build(total_updates)
        bar.update()
        if workers.reference is not None:
            workers.reference.build()
            bar.update()
        ray.get(workers.rollout.ready.remote())
        bar.update()
        ray.get(workers.reward.ready.remote())
        bar.update()
        bar.close()
        logger.info("policy with %.2fM parameters on %s", parameters / 1e6, layout.in_words())
        return workers

    def start_rollout(self, prompts: DataProto, sampling: list[SamplingParams]) -> ray.ObjectRef:
        """Begin to generate; the reference stands for a DataProto of responses."""
        needed = prompts.select(["prompt_ids", "prompt_mask", "mm_inputs"])
        return self.rollout.generate.remote(needed, sampling)

    def start_reward(self, inputs: list[RewardInput]) -> ray.ObjectRef:
        """Begin to score; the reference stands for a list[RewardScore]."""
        return self.reward.score.remote(inputs)

    def sync_weights(self) -> None:
        """Give the rollout worker the policy's weights."""
        self.weight_version += 1
        ray.get(self.rollout.load_weights.remote(self.actor.send_weights(), self.weight_version))
