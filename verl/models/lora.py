"""Low-rank adapters (LoRA, arXiv 2106.09685) in a Hugging Face model, in peft's layers and under peft's names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from verl.config.worker import LoRAConfig
from verl.models.adapter_names import ADAPTER
from verl.models.families import family_of

ALL_LINEAR = "all-linear"
HEAD = "lm_head"
KEY = "worker.actor.model.lora"


def find_targets(inner: nn.Module, lora: LoRAConfig) -> list[str]:
    """Full names of the linear layers that get an adapter.

    Raises ValueError for a target that matches no layer, or only layers of a vision tower that was not asked for.
    """
    vision = tuple(f"{name}." for name in family_of(inner.config).vision_names)

    def in_tower(name: str) -> bool:
        return name.startswith(vision)

    linear = [name for name, module in inner.named_modules() if isinstance(module, nn.Linear) and name != HEAD]
    if lora.vision_tower and not any(map(in_tower, linear)):
        raise ValueError(f"{KEY}.vision_tower=true: a {inner.config.model_type} model has none; leave it out")
    allowed = [name for name in linear if lora.vision_tower or not in_tower(name)]
    if lora.target_modules == ALL_LINEAR:
        return allowed
    targets = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    for target in targets:
        if any(_names(target, name) for name in allowed):
            continue
        found = next((name for name in linear if _names(target, name)), None)
        if found:
            raise ValueError(
                f"{KEY}.target_modules: '{target}' is in the vision tower alone ({found}); to train adapters there "
                f"too, set {KEY}.vision_tower=true"
            )
        there = ", ".join(sorted({name.rpartition(".")[2] for name in allowed}))
        raise ValueError(f"{KEY}.target_modules: '{target}' matches no linear layer; there are {there}")
    return [name for name in allowed if any(_names(target, name) for target in targets)]


def _names(target: str, layer: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({target})", layer) is not None


def adapter_parameters(inner: nn.Module, lora: LoRAConfig) -> int:
    """The number of parameters of this model's adapters. Raises as `find_targets`."""
    layers = map(inner.get_submodule, find_targets(inner, lora))
    return sum(lora.rank * (layer.in_features + layer.out_features) for layer in layers)


def add_adapter(inner: nn.Module, lora: LoRAConfig, model_path: str, dtype: torch.dtype) -> None:
    """Freeze the model and put an adapter, in `dtype` and without effect yet, into the layers that `lora` names.

    Args:
        model_path: of the model; stands in the saved adapter.
    """
    from peft import LoraConfig, TaskType, inject_adapter_in_model  # seconds, which only LoRA should cost

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=model_path,
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=find_targets(inner, lora),
    )
    inject_adapter_in_model(config, inner, ADAPTER)
    for weight in inner.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(dtype)
    if lora.vision_tower:
        # Else the first block's input has a gradient on ranks with images alone (embeddings are frozen), and FSDP
        # reduces in another order there than on ranks without: they would wait for each other for ever.
        inner.enable_input_require_grads()


@contextmanager
def adapter_off(inner: nn.Module) -> Iterator[None]:
    """Inside it the model is the one that training began with."""
    layers = [module for module in inner.modules() if hasattr(module, "lora_A")]
    # Not peft's enable_adapters: it takes requires_grad from the weights and gives it back, and where FSDP keeps
    # gathered weights over a pass it takes it from the shard and gives it back to the gathered copy.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
