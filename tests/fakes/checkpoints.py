"""Actors with the real optimizer and schedule, and checkpoints of them without a driver."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.fakes.actors import build_actor, update
from verl.checkpoint.files import FileEntry
from verl.checkpoint.folder import CheckpointFolder
from verl.config.worker import LRSchedule, OptimConfig, OptimStrategy
from verl.protocol import DataProto
from verl.workers.fsdp.checkpoint import StateWriter, model_tensors, optimizer_tensors, plain_state
from verl.workers.fsdp.wrap import whole
from verl.workers.training.dp_actor import DataParallelActor
from verl.workers.training.guarded_step import GuardedStep
from verl.workers.training.optim import build_optimizer, build_schedule, weight_dtype

OPTIM = OptimConfig(lr=0.01, lr_warmup_steps=2, lr_scheduler_type=LRSchedule.cosine)


def adam_actor(model: Path, strategy: OptimStrategy = OptimStrategy.adamw, **options: Any) -> DataParallelActor:
    optim = replace(OPTIM, strategy=strategy)
    actor = build_actor(model, dtype=weight_dtype(optim), **options)
    actor.optimizer = build_optimizer([p for p in actor.policy.parameters() if p.requires_grad], optim)
    actor.schedule = build_schedule(actor.optimizer, optim, total_updates=6)
    actor.step = GuardedStep("actor", actor.policy, actor.optimizer, actor.schedule, 1.0, 3, actor.device)
    return actor


def train(actor: DataParallelActor, batch: DataProto, updates: int) -> dict[str, float]:
    """Updates on this rank's rows; returns the last one's metrics."""
    rows = batch.chunk(dist.get_world_size())[dist.get_rank()]
    return [update(actor, rows, 1).result() for _ in range(updates)][-1]


def state(actor: DataParallelActor) -> dict[str, torch.Tensor]:
    """Every weight and optimizer state, gathered."""
    tensors = model_tensors(actor.policy) | optimizer_tensors(actor.step)
    return {name: whole(tensor).clone() for name, tensor in tensors.items()}


def begin_save(actor: DataParallelActor, root: Path, step: int, background: bool = False) -> StateWriter:
    folder = CheckpointFolder(str(root))
    if dist.get_rank() == 0:
        os.mkdir(os.path.join(folder.begin(step), "actor"))
    dist.barrier()
    writer = StateWriter()
    tensors = model_tensors(actor.policy) | optimizer_tensors(actor.step)
    writer.start(os.path.join(folder.unfinished(step), "actor"), tensors, plain_state(actor.step), None, background)
    return writer


def end_save(writer: StateWriter, root: Path, step: int, **about: Any) -> str:
    """The path of the checkpoint, when all ranks have written their part and rank 0 the manifest."""
    parts: list[dict[str, FileEntry]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, writer.finish())
    if dist.get_rank() == 0:
        entries = {f"actor/{name}": entry for part in parts for name, entry in part.items()}
        CheckpointFolder(str(root)).commit(step, {"step": step, **about}, entries)
    dist.barrier()
    return CheckpointFolder(str(root)).checkpoint(step)


def save(actor: DataParallelActor, root: Path, step: int, background: bool = False) -> str:
    return end_save(begin_save(actor, root, step, background), root, step)
