"""The batch arithmetic, computed once, said in words at start, and refused where it cannot work."""

from __future__ import annotations

from dataclasses import dataclass

from verl.config.config import Config


@dataclass(frozen=True)
class Sizes:
    """All counts of a run. `ranks` is the number of training processes over all nodes."""

    ranks: int
    prompts_per_step: int
    responses_per_prompt: int
    prompts_per_update: int
    epochs_per_step: int
    micro_batch: int

    @property
    def responses_per_step(self) -> int:
        return self.prompts_per_step * self.responses_per_prompt

    @property
    def responses_per_update(self) -> int:
        return self.prompts_per_update * self.responses_per_prompt

    @property
    def mini_batches(self) -> int:
        return self.prompts_per_step // self.prompts_per_update

    @property
    def updates_per_step(self) -> int:
        return self.mini_batches * self.epochs_per_step

    @property
    def responses_per_rank(self) -> int:
        """Responses per rank and update."""
        return self.responses_per_update // self.ranks

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes per rank and update."""
        return -(-self.responses_per_rank // self.micro_batch)

    def in_words(self) -> str:
        """The arithmetic as sentences, for the log."""
        epochs = f" x {self.epochs_per_step} epochs" if self.epochs_per_step > 1 else ""
        return (
            f"one step: {self.prompts_per_step} prompts x {self.responses_per_prompt} responses "
            f"= {self.responses_per_step} responses\n"
            f"updates per step: {self.prompts_per_step} prompts / {self.prompts_per_update} prompts per update"
            f"{epochs} = {self.updates_per_step}\n"
            f"one update: {self.prompts_per_update} prompts x {self.responses_per_prompt} = "
            f"{self.responses_per_update} responses / {self.ranks} rank(s) = {self.responses_per_rank} per rank, "
            f"in {self.micro_batches} micro-batch(es) of at most {self.micro_batch}"
        )


def compute_sizes(config: Config) -> Sizes:
    """The sizes of a run. Raises ValueError, naming the keys and a way out, where they do not fit together."""
    actor, rollout = config.worker.actor, config.worker.rollout
    sizes = Sizes(
        ranks=config.trainer.nnodes * config.trainer.n_gpus_per_node,
        prompts_per_step=config.data.rollout_batch_size,
        responses_per_prompt=rollout.n,
        prompts_per_update=actor.global_batch_size,
        epochs_per_step=actor.ppo_epochs,
        micro_batch=actor.micro_batch_size_per_device_for_update,
    )
    if sizes.prompts_per_step % sizes.prompts_per_update:
        near = _divisor_near(sizes.prompts_per_step, sizes.prompts_per_update)
        raise ValueError(
            f"data.rollout_batch_size={sizes.prompts_per_step} (prompts per step) is not a multiple of "
            f"worker.actor.global_batch_size={sizes.prompts_per_update} (prompts per update): prompts would be left "
            f"over. Try worker.actor.global_batch_size={near}"
        )
    if sizes.responses_per_update % sizes.ranks:
        raise ValueError(
            f"one update has worker.actor.global_batch_size={sizes.prompts_per_update} prompts x worker.rollout.n="
            f"{sizes.responses_per_prompt} = {sizes.responses_per_update} responses, which {sizes.ranks} ranks "
            f"(trainer.nnodes x trainer.n_gpus_per_node) cannot share equally; make it a multiple of {sizes.ranks}"
        )
    return sizes


def _divisor_near(number: int, wish: int) -> int:
    """The divisor of `number` nearest to `wish`."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wish), d))
