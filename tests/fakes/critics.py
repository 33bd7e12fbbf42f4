"""A DataParallelCritic on this process's rank, with plain SGD so that its update shows the gradient."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tests.fakes.actors import CPU, MAX_RESPONSE_LENGTH, WHOLE
from verl.config.worker import ComputeDtype, CriticConfig, FSDPConfig, ModelConfig
from verl.models.value import ValueModel
from verl.protocol import DataProto
from verl.workers.fsdp.wrap import build_sharded
from verl.workers.training.dp_critic import DataParallelCritic

CLIP = 0.05


def random_head(inner: nn.Module) -> ValueModel:
    """A critic whose values are not 0: a head of 0 would hide the rest of the gradient."""
    model = ValueModel(inner)
    nn.init.normal_(model.value_head.weight, std=0.1, generator=torch.Generator().manual_seed(7))
    return model


def build_critic(
    model: Path, wrap=random_head, dtype: str = "float32", lr: float = 1.0, **options
) -> DataParallelCritic:
    """A critic whose single update moves every weight by exactly its gradient."""
    config = CriticConfig(
        **{
            "max_grad_norm": 1e9,
            "cliprange_value": CLIP,
            "max_tokens_per_micro_batch": WHOLE,
            **options,
        }
    )
    fsdp = FSDPConfig(compute_dtype=ComputeDtype(dtype))
    values = build_sharded(ModelConfig(str(model), enable_gradient_checkpointing=False), fsdp, wrap, CPU)
    optimizer = torch.optim.SGD(values.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return DataParallelCritic(values, optimizer, schedule, config, MAX_RESPONSE_LENGTH, CPU)


def plain_values(inner: nn.Module, batch: DataProto) -> tuple[ValueModel, list[torch.Tensor]]:
    """The critic of the plain model `inner` in float64, and V before each response token of each row, on its own and
    without padding."""
    critic, found = random_head(inner).double(), []
    for i in range(len(batch)):
        ids = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        vision = batch["mm_inputs"][i].tensors()
        if vision:
            vision["mm_token_type_ids"] = (ids == inner.config.image_token_id).int()[None]
            vision["pixel_values"] = vision["pixel_values"].double()
        states = inner.model(input_ids=ids[None], **vision).last_hidden_state[0]
        length = int(batch["response_mask"][i].sum())
        found.append(critic.value_head(states[len(ids) - length - 1 : -1]).squeeze(-1))
    return critic, found
