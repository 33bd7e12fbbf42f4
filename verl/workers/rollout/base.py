"""What a rollout engine is, and how requests are put to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from verl.config.worker import RolloutConfig
from verl.protocol import DataProto
from verl.registry import Registry
from verl.utils.seeding import derive_seed


@dataclass(frozen=True)
class SamplingParams:
    """One request: `n` responses of at most `max_tokens` tokens. `seed` makes them repeatable, whatever other
    requests share the batch. `top_k` -1 keeps all tokens."""

    n: int
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    seed: int


class RolloutEngine(Protocol):
    """Generates responses and takes new weights. One lives in each rollout worker."""

    def generate(self, prompts: DataProto, sampling: list[SamplingParams]) -> DataProto:
        """Responses to each prompt, in order, the n responses of a prompt side by side.

        Args:
            prompts: B rows with `prompt_ids`, `prompt_mask` [B, P] and `mm_inputs`.
            sampling: one per prompt.

        Returns:
            sum of n rows with `responses` [., R] (right padded), `response_mask` [., R] (1 up to and with the
            end token) and `rollout_log_probs` [., R] float32: log-probs under the distribution that was sampled
            from, after temperature, bans, top-k and top-p; 0 at padding.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace all weights, given under Hugging Face names. Raises ValueError where one is missing or unknown."""
        ...


ENGINES: Registry[type[RolloutEngine]] = Registry("rollout engine (worker.rollout.name)")


def train_sampling(config: RolloutConfig, max_tokens: int, uids: list[str], epoch: int) -> list[SamplingParams]:
    """Requests of a training step. The seed follows from run seed, prompt and epoch, not from the step's order."""
    base = SamplingParams(config.n, config.temperature, config.top_p, config.top_k, max_tokens, 0)
    return [replace(base, seed=derive_seed(config.seed, "train", epoch, uid)) for uid in uids]


def validation_sampling(config: RolloutConfig, max_tokens: int, uids: list[str]) -> list[SamplingParams]:
    """Requests of validation, with `val_override_config`. The same seeds each time: curves differ by the model."""
    override = config.val_override_config

    def chosen(name: str) -> float:
        value = getattr(override, name)
        return getattr(config, name) if value is None else value

    base = SamplingParams(chosen("n"), chosen("temperature"), chosen("top_p"), chosen("top_k"), max_tokens, 0)
    return [replace(base, seed=derive_seed(config.seed, "validation", uid)) for uid in uids]
