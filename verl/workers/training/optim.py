"""The optimizer and its schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch.optim.lr_scheduler import LambdaLR

from verl.config.worker import LRSchedule, OptimConfig, OptimStrategy
from verl.workers.training.compensated_adamw import CompensatedAdamW

OPTIMIZERS = {OptimStrategy.adamw: partial(torch.optim.AdamW, fused=True), OptimStrategy.adamw_bf16: CompensatedAdamW}


def build_optimizer(parameters: list[torch.nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of `config.strategy` over `parameters`."""
    return OPTIMIZERS[config.strategy](
        parameters, lr=config.lr, betas=tuple(config.betas), eps=config.eps, weight_decay=config.weight_decay
    )


def weight_dtype(config: OptimConfig) -> torch.dtype:
    """The dtype in which trained weights are stored."""
    return torch.bfloat16 if config.strategy == OptimStrategy.adamw_bf16 else torch.float32


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, total_updates: int) -> LambdaLR:
    """Learning rate per optimizer update."""
    return LambdaLR(optimizer, lr_factor(config, total_updates))


def lr_factor(config: OptimConfig, total_updates: int) -> Callable[[int], float]:
    """Update number (from 0) -> factor on `lr`: linear warm-up, then constant, or a half cosine or a line to
    `min_lr_ratio`."""

    warmup = config.lr_warmup_steps or int(config.lr_warmup_ratio * total_updates)

    def factor(update: int) -> float:
        if update < warmup:
            return (update + 1) / (warmup + 1)
        if config.lr_scheduler_type == LRSchedule.constant:
            return 1.0
        length = max(1, total_updates - warmup)
        progress = min(1.0, (update - warmup) / length)
        linear = config.lr_scheduler_type == LRSchedule.linear
        left = 1 - progress if linear else 0.5 * (1 + math.cos(math.pi * progress))
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * left

    return factor
