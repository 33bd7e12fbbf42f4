"""Names of an adapter's weights in peft, their merging, and the folder that holds them: for a model in shards
and for a checkpoint's files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

ADAPTER = "default"  # peft's name for the only adapter of a model
BASE = ".base_layer."  # what it is added to
NAME = re.compile(rf"(?P<layer>.+)\.lora_(?P<side>[AB])\.{ADAPTER}\.weight")


def is_adapter(name: str) -> bool:
    """Whether a name in a state dict is that of an adapter's weight."""
    return NAME.fullmatch(name) is not None


def adapted_layers(names: Iterable[str]) -> list[str]:
    """The layers that have an adapter; [] without LoRA."""
    return [match["layer"] for name in names if (match := NAME.fullmatch(name)) and match["side"] == "A"]


def factors(layer: str) -> tuple[str, str]:
    """Names of B [out, rank] and A [rank, in] of a layer."""
    return f"{layer}.lora_B.{ADAPTER}.weight", f"{layer}.lora_A.{ADAPTER}.weight"


def plain_name(name: str) -> str:
    """A weight's name in the model without adapters."""
    return name.replace(BASE, ".")


def merge(weight: torch.Tensor, up: torch.Tensor, down: torch.Tensor, scale: float) -> torch.Tensor:
    """W + scale * B A, in float32; the scale is alpha / rank."""
    return weight.float() + scale * (up.float() @ down.float())


def save_adapter(config: LoraConfig, weights: Mapping[str, torch.Tensor], folder: str) -> None:
    """Write what PeftModel.from_pretrained(MODEL, folder) reads; weights of other names are left out."""
    from safetensors.torch import save_file

    config.save_pretrained(folder)
    named = {
        f"base_model.model.{match['layer']}.lora_{match['side']}.weight": weight.contiguous()
        for name, weight in weights.items()
        if (match := NAME.fullmatch(name))
    }
    save_file(named, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
