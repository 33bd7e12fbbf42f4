"""A DataParallelActor on this process's rank, with plain SGD so that its update shows the gradient."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from papo.corruption.patches import RandomPatchConfig
from papo.terms import PerceptionKLConfig
from verl.algorithms.losses.compose import build_terms, coefficients
from verl.algorithms.losses.entropy import EntropyTermConfig
from verl.algorithms.losses.policy import PolicyTermConfig
from verl.algorithms.losses.ref_kl import RefKLTermConfig
from verl.algorithms.requirements import find_requirements
from verl.columns import view_column
from verl.config.algorithm import LossTermConfig, OldLogProbs
from verl.config.worker import ActorConfig, ComputeDtype, FSDPConfig, ModelConfig, Offload
from verl.data.vision import load_special_tokens
from verl.metrics.bag import MetricBag
from verl.models.policy import PolicyModel
from verl.plugins import load_plugins
from verl.protocol import DataProto
from verl.workers.fsdp.wrap import build_sharded, whole
from verl.workers.training.dp_actor import DataParallelActor, compute_log_probs

CPU = torch.device("cpu")
MAX_RESPONSE_LENGTH = 10
WHOLE = 10**6  # tokens of a micro-batch that everything fits into
TIMEOUT = timedelta(minutes=2)  # ranks that have lost each other should fail, not hang


def papo_terms() -> dict[str, LossTermConfig]:
    """Every term of PAPO-G, with coefficients large enough that each one shows in the gradient."""
    return {
        "policy": PolicyTermConfig(),
        "ref_kl": RefKLTermConfig(coef=0.3),
        "perception_kl": PerceptionKLConfig(coef=0.7),
        "entropy": EntropyTermConfig(coef=0.2),
        "masked_entropy": EntropyTermConfig(coef=0.4, view="masked"),
    }


@contextmanager
def process_group(rank: int = 0, world_size: int = 1, path: str | None = None):
    """gloo among `world_size` processes that meet at the file `path`."""
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(path or os.path.join(folder, "store"), world_size)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
        try:
            yield
        finally:
            dist.destroy_process_group()


def build_actor(
    model: Path, terms: dict[str, LossTermConfig] | None = None, lr: float = 1.0, live: bool = True, **options: Any
) -> DataParallelActor:
    """An actor whose single update moves every weight by exactly its gradient."""
    model_options = {
        k: options.pop(k) for k in ("freeze_vision_tower", "enable_gradient_checkpointing", "lora") if k in options
    }
    model_config = ModelConfig(str(model), **{"enable_gradient_checkpointing": False, **model_options})
    fsdp = FSDPConfig(
        compute_dtype=ComputeDtype(options.pop("compute_dtype", "float32")),
        reshard_after_forward=options.pop("reshard_after_forward", True),
        offload=options.pop("offload", Offload.none),
    )
    dtype = options.pop("dtype", torch.float32)
    temperature = options.pop("temperature", 1.0)
    old_log_probs = options.pop("old_log_probs", OldLogProbs.auto)
    config = ActorConfig(**{"max_grad_norm": 1e9, "max_tokens_per_micro_batch": WHOLE, **options})
    banned = load_special_tokens(str(model)).banned
    wrap = partial(PolicyModel, banned=banned, temperature=temperature, logits_chunk_size=config.logits_chunk_size)
    policy = build_sharded(model_config, fsdp, wrap, CPU, dtype)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=lr)
    built = build_terms(terms or papo_terms())
    return DataParallelActor(
        policy=policy,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        terms=built,
        requirements=find_requirements(built, {"masked": RandomPatchConfig(grad=live)}, {}),
        old_log_probs=old_log_probs,
        config=config,
        max_response_length=MAX_RESPONSE_LENGTH,
        device=CPU,
    )


def update(actor: DataParallelActor, batch: DataProto, mini_batches: int = 1) -> MetricBag:
    """The updates of a step with the coefficients of the config; this rank's metrics."""
    return actor.update_policy(batch, even(batch, mini_batches), coefficients(actor.terms, 1, 1))


def even(batch: DataProto, mini_batches: int) -> list[int]:
    """Rows of each of equally large mini-batches."""
    return [len(batch) // mini_batches] * mini_batches


def log_probs(policy: PolicyModel, batch: DataProto, view: str = "", budget: int = WHOLE) -> torch.Tensor:
    """Log-probs [B, R] of a pass without gradient."""
    return compute_log_probs(policy, batch, [view], budget, CPU)[view_column(view, "log_probs")]


def weights(actor: DataParallelActor) -> dict[str, torch.Tensor]:
    """Every weight, gathered, under its Hugging Face name; a tied head under both of its names, a layer with an
    adapter under peft's."""
    return {name: whole(weight).detach().clone() for name, weight in actor.policy.inner.state_dict().items()}


def gradient(model: Path, batch: DataProto, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """(gradient of one mini-batch by weight, this rank's metrics)."""
    mini_batches = options.pop("mini_batches", 1)
    schedule = [options.pop(name, default) for name, default in (("step", 1), ("total_steps", 1), ("scale", 1.0))]
    actor = build_actor(model, **options)
    before = weights(actor)
    metrics = actor.update_policy(batch, even(batch, mini_batches), coefficients(actor.terms, *schedule))
    after = weights(actor)
    return {name: before[name] - after[name] for name in before}, metrics.result()


def on_ranks(world_size: int, function: Callable, *arguments: Any) -> list[Any]:
    """`function(rank, *arguments)` in `world_size` new processes of one gloo group; its results by rank."""
    multiprocessing.set_forkserver_preload(["tests.fakes.preload"])  # eight seconds of imports, once and not each time
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, folder, function, arguments)
        mp.start_processes(_rank, arguments, nprocs=world_size, start_method="forkserver")
        return [torch.load(os.path.join(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: str, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    load_plugins()
    with process_group(rank, world_size, os.path.join(folder, "store")):
        torch.save(function(rank, *arguments), os.path.join(folder, f"{rank}.pt"))


__all__ = [
    *("LossAverage", "build_actor", "even", "gradient", "log_probs", "on_ranks", "papo_terms", "process_group"),
    *("update", "weights"),
]
