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
    micro_batch_tokens: int

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

    def in_words(self) -> str:
        """The arithmetic as sentences, for the log."""
        epochs = f" x {self.epochs_per_step} epochs" if self.epochs_per_step > 1 else ""
        return (
            f"one step: {self.prompts_per_step} prompts x {self.responses_per_prompt} responses "
            f"= {self.responses_per_step} responses\n"
            f"updates per step: {self.prompts_per_step} prompts / {self.prompts_per_update} prompts per update"
            f"{epochs} = {self.updates_per_step}\n"
            f"one update: {self.prompts_per_update} prompts x {self.responses_per_prompt} = "
            f"{self.responses_per_update} responses on {self.ranks} rank(s), in micro-batches of at most "
            f"{self.micro_batch_tokens} computed tokens"
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
        micro_batch_tokens=actor.max_tokens_per_micro_batch,
    )
    if sizes.prompts_per_step % sizes.prompts_per_update:
        near = _divisor_near(sizes.prompts_per_step, sizes.prompts_per_update)
        raise ValueError(
            f"data.rollout_batch_size={sizes.prompts_per_step} (prompts per step) is not a multiple of "
            f"worker.actor.global_batch_size={sizes.prompts_per_update} (prompts per update): prompts would be left "
            f"over. Try worker.actor.global_batch_size={near}"
        )
    if sizes.responses_per_update < sizes.ranks:
        raise ValueError(
            f"one update has worker.actor.global_batch_size={sizes.prompts_per_update} prompts x worker.rollout.n="
            f"{sizes.responses_per_prompt} = {sizes.responses_per_update} responses, fewer than the {sizes.ranks} "
            "ranks (trainer.nnodes x trainer.n_gpus_per_node), each of which needs one"
        )
    return sizes


def _divisor_near(number: int, wish: int) -> int:
    """The divisor of `number` nearest to `wish`."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wish), d))
