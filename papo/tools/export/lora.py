"""Checkpoints of LoRA: the adapter alone, in peft's format, or merged into the weights below it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from papo.tools.export.source import Source
from verl.models.adapter_names import adapted_layers, factors, is_adapter, merge, plain_name, save_adapter

if TYPE_CHECKING:
    import torch


def merge_adapter(weights: Mapping[str, torch.Tensor], source: Source) -> dict[str, torch.Tensor]:
    """The weights of the model without adapters that computes the same. Without LoRA they are returned as they are."""
    merged = {plain_name(name): weight for name, weight in weights.items() if not is_adapter(name)}
    for layer in adapted_layers(weights):
        lora = _settings(source)
        up, down = (weights[name] for name in factors(layer))
        merged[f"{layer}.weight"] = merge(merged[f"{layer}.weight"], up, down, lora["alpha"] / lora["rank"])
    return merged


def write_adapter(weights: Mapping[str, torch.Tensor], source: Source, dtype: torch.dtype, folder: str) -> None:
    """Write what PeftModel.from_pretrained(MODEL, folder) reads."""
    from peft import LoraConfig, TaskType

    lora = _settings(source)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=source.config["worker"]["actor"]["model"]["model_path"],
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        target_modules=adapted_layers(weights),
        inference_mode=True,
    )
    save_adapter(config, {name: weight.to(dtype) for name, weight in weights.items() if is_adapter(name)}, folder)


def _settings(source: Source) -> dict[str, Any]:
    """`worker.actor.model.lora` of the run. Raises ValueError where nobody kept it."""
    try:
        return source.config["worker"]["actor"]["model"]["lora"]
    except KeyError as error:
        raise ValueError(
            f"'{source.actor}' has an adapter, and the config in its manifest no worker.actor.model.lora: its scale "
            "is not known"
        ) from error
