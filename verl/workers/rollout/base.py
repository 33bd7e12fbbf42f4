"""Interface of rollout engines, and the requests to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from verl.config.config import Config
from verl.config.worker import RolloutConfig
from verl.models.families.base import Family
from verl.protocol import DataProto
from verl.registry import Registry
from verl.utils.rng import derive_seed
from verl.workers.rollout.weight_sync import BucketLayout


@dataclass(frozen=True)
class SamplingParams:
    """One request: `n` responses of at most `max_tokens` tokens. `seed` makes them repeatable, whatever other
    requests share the batch. `top_k` -1 keeps all tokens, `temperature` 0 takes the likeliest one. With `ignore_eos`
    no end token is ever sampled."""

    n: int
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    seed: int
    ignore_eos: bool = False


@dataclass(frozen=True)
class Term:
    """A part of some memory in bytes; `how` says what was multiplied."""

    name: str
    bytes: int
    how: str


@dataclass(frozen=True)
class EngineLoad:
    """Numbers that an engine's memory follows from.

    Attributes:
        weights: Bytes of the model.
        kv_token: Bytes of the KV cache per token.
        state: Bytes of linear attention's state per response.
        token_work: Bytes that a block needs for a moment per token.
        prompt, response: Tokens of the longest.
        vocabulary: Number of tokens there are.
        capacity: Bytes of one GPU; None on CPU.
    """

    weights: int
    kv_token: int
    state: int
    token_work: int
    prompt: int
    response: int
    vocabulary: int
    capacity: int | None


class RolloutEngine(Protocol):
    """Generates responses and takes new weights. One lives in each rollout worker.

    Attributes:
        package: The Python package that it needs besides transformers; None for none.
        install: How to install that.
        spans_gpus: Whether one engine can take several GPUs (`worker.rollout.tensor_parallel_size`).
    """

    package: str | None
    install: str
    spans_gpus: bool

    @staticmethod
    def unfit(config: Config, family: Family, device: str) -> str | None:
        """The reason why it cannot serve this run on a `cpu` or `cuda` device, with the way out; None where it can."""
        ...

    @staticmethod
    def memory(rollout: RolloutConfig, load: EngineLoad) -> tuple[list[Term], int | None]:
        """Memory while it generates, for `papo doctor`; and the bytes of the KV cache where it takes what is left."""
        ...

    @staticmethod
    def smaller(rollout: RolloutConfig) -> list[dict[str, float]]:
        """Settings of `worker.rollout` that need less memory, the least change first."""
        ...

    def generate(self, prompts: DataProto, sampling: list[SamplingParams]) -> DataProto:
        """Responses to each prompt, in order, the n responses of a prompt side by side.

        Args:
            prompts: B rows with `prompt_ids`, `prompt_mask` [B, P], `prompt_positions` [B, 3, P] and `mm_inputs`.
            sampling: one per prompt.

        Returns:
            sum of n rows with `responses` [., R] (right padded), `response_mask` [., R] (1 up to and with the
            end token) and `rollout_log_probs` [., R] float32: log-probs under the distribution that was sampled
            from, after temperature, bans, top-k and top-p; 0 at padding.
        """
        ...

    def receive_from(self, carrier: str, host: str | None, port: int, first_rank: int, size: int) -> None:
        """Take weights through this carrier. With a host, meet the sender there: this engine's processes are the
        ranks from `first_rank` on, of `size`."""
        ...

    def begin_weights(self) -> None:
        """Buckets follow until `finish_weights`."""
        ...

    def load_bucket(self, layout: BucketLayout, payloads: list[Any]) -> None:
        """Load weights, given under Hugging Face names. Raises ValueError for one that the model does not have."""
        ...

    def finish_weights(self) -> None:
        """Forget everything that was computed with the old weights. Raises ValueError where a weight is missing."""
        ...

    def sleep(self) -> None:
        """Give the GPU's memory to the trainer, weights included; without a GPU to share it does nothing."""
        ...

    def wake_weights(self) -> None:
        """Take memory for the weights, which the next sync fills."""
        ...

    def wake_cache(self) -> None:
        """Take back all other memory."""
        ...


ENGINES: Registry[type[RolloutEngine]] = Registry("rollout engine (worker.rollout.name)")


def train_sampling(config: RolloutConfig, max_tokens: int, uids: list[str], epoch: int) -> list[SamplingParams]:
    """Requests of a training step. The seed follows from run seed, prompt and epoch, not from the step's order."""
    base = SamplingParams(config.n, config.temperature, config.top_p, config.top_k, max_tokens, 0, config.ignore_eos)
    return [replace(base, seed=derive_seed(config.seed, "train", epoch, uid)) for uid in uids]


def validation_sampling(config: RolloutConfig, max_tokens: int, uids: list[str]) -> list[SamplingParams]:
    """Requests of validation, with `val_override_config`. The same seeds each time: curves differ by the model."""
    override = config.val_override_config

    def chosen(name: str) -> float:
        value = getattr(override, name)
        return getattr(config, name) if value is None else value

    base = SamplingParams(chosen("n"), chosen("temperature"), chosen("top_p"), chosen("top_k"), max_tokens, 0)
    return [replace(base, seed=derive_seed(config.seed, "validation", uid)) for uid in uids]


def pad_responses(tokens: Sequence[list[int]], log_probs: Sequence[list[float]], pad: int) -> DataProto:
    """The result of `RolloutEngine.generate` from responses of any lengths."""
    longest = max(len(ids) for ids in tokens)
    responses = torch.full((len(tokens), longest), pad, dtype=torch.int64)
    mask = torch.zeros(len(tokens), longest, dtype=torch.int64)
    padded = torch.zeros(len(tokens), longest)
    for row, (ids, values) in enumerate(zip(tokens, log_probs, strict=True)):
        responses[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
        padded[row, : len(ids)] = torch.tensor(values)
    return DataProto.from_dict({"responses": responses, "response_mask": mask, "rollout_log_probs": padded})


def in_order(
    parts: Sequence[DataProto], rows: Sequence[Sequence[int]], sampling: Sequence[SamplingParams], pad: int
) -> DataProto:
    """Responses that were generated in parts as one batch, in the order of the requests, padded to the longest.

    Args:
        parts: the responses to the requests `rows[i]`, as `RolloutEngine.generate` returns them.
    """
    longest = max(part["responses"].shape[1] for part in parts)
    columns = {}
    for name in parts[0].tensors:
        pieces = [part[name] for part in parts]
        if pieces[0].dim() == 2:
            value = pad if name == "responses" else 0
            pieces = [F.pad(piece, (0, longest - piece.shape[1]), value=value) for piece in pieces]
        columns[name] = torch.cat(pieces)
    written = [request for part in rows for request in part for _ in range(sampling[request].n)]
    order = sorted(range(len(written)), key=written.__getitem__)  # stable: responses of a request keep their order
    return DataProto.from_dict(columns).rows(torch.tensor(order))
