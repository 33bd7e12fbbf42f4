"""Workers of a run, started side by side."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import chain

import ray
import torch
from ray.util.placement_group import remove_placement_group
from tqdm import tqdm

from verl.columns import ORIGINAL
from verl.models.families.base import Images
from verl.protocol import DataProto
from verl.single_controller.preflight import place_ranks
from verl.single_controller.reward_group import RewardGroup
from verl.single_controller.rollout_group import RolloutGroup
from verl.single_controller.worker_group import ActorGroup, CriticGroup, ReferenceGroup
from verl.trainer.plan import Plan
from verl.workers.training.balance import Share

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

    def close(self) -> None:
        """End all workers, and give back their place, in a Ray that goes on."""
        groups = [group.workers for group in (self.actor, self.reference, self.critic) if group is not None]
        for worker in chain(*groups, self.rollout.replicas, [self.reward.worker]):
            ray.kill(worker)
        if self.rollout.placement is not None:
            remove_placement_group(self.rollout.placement)

    def take_rows(self, batch: DataProto, shares: list[Share]) -> int:
        """Give every rank of every trained or frozen model its share of a step's rows; returns the bytes that were put
        into Ray's object store, once for all models."""
        shards = [batch.rows(share.rows) for share in shares]
        references = [ray.put(shard) for shard in shards]
        for group in filter(None, (self.actor, self.reference, self.critic)):
            group.take_rows(references, shares)
        return sum(map(size_in_bytes, shards))

    def compute_reference_log_probs(self) -> torch.Tensor:
        """Log-probs [B, R] of the step's rows by the frozen reference; with LoRA that is the actor without its
        adapter."""
        if self.reference is None:
            return self.actor.compute_reference_log_probs()["log_probs"]
        return self.reference.compute_log_probs(ORIGINAL)["log_probs"]


def size_in_bytes(batch: DataProto) -> int:
    """Bytes of all tensors, each different image once."""
    images = {row.digests: row for column in batch.objects.values() for row in column if isinstance(row, Images)}
    tensors = [tensor for row in images.values() for item in row.items for tensor in item.values()]
    return sum(tensor.nbytes for tensor in (*batch.tensors.values(), *tensors))
