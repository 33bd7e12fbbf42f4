"""Workers of a run, started side by side."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from tqdm import tqdm

from verl.protocol import DataProto
from verl.single_controller.preflight import place_ranks
from verl.single_controller.reward_group import RewardGroup
from verl.single_controller.rollout_group import RolloutGroup
from verl.single_controller.worker_group import ActorGroup, CriticGroup, ReferenceGroup
from verl.trainer.plan import Plan

logger = logging.getLogger(__name__)


@dataclass
class Workers:
    """The workers that the trainer calls. `rollout` and `reward` work asynchronously, so that the driver can go
    on meanwhile. A run that only validates has no actor."""

    actor: ActorGroup | None
    reference: ReferenceGroup | None
    critic: CriticGroup | None
    rollout: RolloutGroup
    reward: RewardGroup

    @classmethod
    def build(cls, plan: Plan) -> Workers:
        """Start every worker and wait until all are ready. Raises what a worker raised."""
        config, layout = plan.config, plan.layout
        trains = not config.trainer.val_only
        refers = trains and plan.requirements.reference and not config.worker.actor_is_reference
        values = trains and plan.requirements.critic
        placement = place_ranks(layout, config.trainer.nnodes, config.trainer.cluster_timeout_s)

        def start_rollout() -> RolloutGroup:
            return RolloutGroup(config, layout, placement, plan.vision.special.pad)

        with tqdm(total=2 + trains + refers + values, desc="starting workers", unit="role", leave=False) as bar:
            # An engine measures the free memory of its GPU when it starts: a trainer on that GPU has to be there first.
            rollout = None if layout.shares_gpus else start_rollout()
            reward = RewardGroup(config, layout)
            actor = ActorGroup(config, layout, placement) if trains else None
            reference = ReferenceGroup(config, layout, placement) if refers else None
            critic = CriticGroup(config, layout, placement) if values else None
            if actor is not None:
                actor_steps = max(0, plan.total_steps - config.trainer.critic_warmup)
                parameters = actor.build(actor_steps * plan.sizes.updates_per_step)
                logger.info("policy with %.2fM parameters", parameters / 1e6)
                bar.update()
            if reference is not None:
                reference.build()
                bar.update()
            if critic is not None:
                critic.build(plan.total_steps * plan.sizes.mini_batches * config.worker.critic.ppo_epochs)
                bar.update()
            rollout = rollout or start_rollout()
            rollout.build()
            bar.update()
            reward.build()
            bar.update()
        logger.info("%s; rollout engine %s", layout.in_words(), config.worker.rollout.name)
        return cls(actor, reference, critic, rollout, reward)

    def compute_reference_log_probs(self, batch: DataProto) -> DataProto:
        """`log_probs` [B, R] of all rows by the frozen reference; with LoRA that is the actor without its adapter."""
        if self.reference is None:
            return self.actor.compute_reference_log_probs(batch)
        return self.reference.compute_log_probs(batch)
