"""Checkpoints of LoRA: the adapter alone, in peft's format, or merged into the weights below it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from papo.export.source import Source

if TYPE_CHECKING:
    import torch

# peft's names: "default" is its only adapter, `base_layer` what that is added to.
ADAPTER = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])\.default\.weight")
BASE = ".base_layer."


def adapted_layers(weights: Mapping[str, torch.Tensor]) -> list[str]:
    """The layers that have an adapter; [] without LoRA."""
    return [match["layer"] for name in weights if (match := ADAPTER.fullmatch(name)) and match["side"] == "A"]


def merge_adapter(weights: Mapping[str, torch.Tensor], source: Source) -> dict[str, torch.Tensor]:
    """The weights of the model without adapters that computes the same: W + alpha / rank * B A. Without LoRA they are
    returned as they are."""
    merged = {name.replace(BASE, "."): weight for name, weight in weights.items() if not ADAPTER.fullmatch(name)}
    for layer in adapted_layers(weights):
        lora = _settings(source)
        up, down = (weights[f"{layer}.lora_{side}.default.weight"].float() for side in "BA")
        merged[f"{layer}.weight"] = merged[f"{layer}.weight"].float() + lora["alpha"] / lora["rank"] * (up @ down)
    return merged


def write_adapter(weights: Mapping[str, torch.Tensor], source: Source, dtype: torch.dtype, folder: str) -> None:
    """Write what PeftModel.from_pretrained(MODEL, folder) reads."""
    from peft import LoraConfig, TaskType
    from safetensors.torch import save_file

    lora = _settings(source)
    LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=source.config["worker"]["actor"]["model"]["model_path"],
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        target_modules=adapted_layers(weights),
        inference_mode=True,
    ).save_pretrained(folder)
    named = {
        f"base_model.model.{match['layer']}.lora_{match['side']}.weight": weight.to(dtype).contiguous()
        for name, weight in weights.items()
        if (match := ADAPTER.fullmatch(name))
    }
    save_file(named, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})


def _settings(source: Source) -> dict[str, Any]:
    """`worker.actor.model.lora` of the run. Raises ValueError where nobody kept it."""
    try:
        return source.config["worker"]["actor"]["model"]["lora"]
    except KeyError as error:
        raise ValueError(
            f"'{source.actor}' has an adapter, and the config in its manifest no worker.actor.model.lora: its scale "
            "is not known"
        ) from error
