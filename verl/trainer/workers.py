"""All workers of a run, built side by side."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import ray
from tqdm import tqdm

from verl.single_controller.resources import actor_options, place_ranks
from verl.single_controller.rollout_group import RolloutGroup
from verl.single_controller.worker_group import ActorGroup, ReferenceGroup
from verl.trainer.plan import Plan
from verl.workers.reward.manager import RewardInput
from verl.workers.reward.worker import RewardWorker

logger = logging.getLogger(__name__)


@dataclass
class Workers:
    """What the trainer calls. `rollout` and `reward` are asked first and waited for later, so that the driver can go
    on meanwhile. A run that only validates has no actor."""

    actor: ActorGroup | None
    reference: ReferenceGroup | None
    rollout: RolloutGroup
    reward: ray.actor.ActorHandle

    @classmethod
    def build(cls, plan: Plan) -> Workers:
        """Start every worker and wait until all are ready. Raises what a worker raised."""
        config, layout = plan.config, plan.layout
        trains = not config.trainer.val_only
        placement = place_ranks(layout, config.trainer.nnodes)
        roles = 2 + trains + (trains and plan.requirements.reference)
        with tqdm(total=roles, desc="starting workers", unit="role", leave=False) as bar:
            workers = cls(
                actor=ActorGroup(config, layout, placement) if trains else None,
                reference=ReferenceGroup(config, layout, placement) if trains and plan.requirements.reference else None,
                rollout=RolloutGroup(config, layout, placement, plan.vision.special.pad),
                reward=ray.remote(RewardWorker)
                .options(**actor_options(layout, None, 0, 0, threads=1))
                .remote(config.worker.reward),
            )
            if workers.actor is not None:
                parameters = workers.actor.build(plan.total_steps * plan.sizes.updates_per_step)
                bar.update()
            if workers.reference is not None:
                workers.reference.build()
                bar.update()
            workers.rollout.build()
            bar.update()
            ray.get(workers.reward.ready.remote())
            bar.update()
        if workers.actor is not None:
            logger.info("policy with %.2fM parameters", parameters / 1e6)
        logger.info("%s; rollout engine %s", layout.in_words(), config.worker.rollout.name)
        return workers

    def start_reward(self, inputs: list[RewardInput]) -> ray.ObjectRef:
        """Begin to score; the reference stands for a list[RewardScore]."""
        return self.reward.score.remote(inputs)
