"""Loading Hugging Face models."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from verl.config.worker import ComputeDtype
from verl.models.families import family_of
from verl.utils.files import check_model_path

logger = logging.getLogger(__name__)


def resolve_dtype(dtype: ComputeDtype, device_type: str) -> torch.dtype:
    """The dtype of forward and backward on this device."""
    if dtype == ComputeDtype.auto:
        return torch.bfloat16 if device_type == "cuda" else torch.float32
    return getattr(torch, dtype.value)


def load_config(model_path: str, trust_remote_code: bool = False) -> Any:
    """The model's config. Raises FileNotFoundError or ValueError naming `worker.actor.model.model_path`."""
    check_model_path(model_path)
    try:
        return AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"the model '{model_path}' has no config.json that can be read: {error}") from error


def load_model(
    model_path: str,
    dtype: torch.dtype,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    empty: bool = False,
) -> nn.Module:
    """The model in `model_path`, on CPU. With `empty` only its shape, weights unset, and no file of weights read.

    Raises ValueError where it does not load, naming `model_path`.
    """
    options = {"dtype": dtype, "attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    try:
        config = load_config(model_path, trust_remote_code)
        if not empty:
            return family_of(config).auto_class.from_pretrained(model_path, **options)
        model = outline(config, **options)
    except OSError as error:
        raise ValueError(f"the model '{model_path}' does not load: {error}") from error
    model = model.to_empty(device="cpu")
    model.tie_weights()  # to_empty gives each use of a shared weight a tensor of its own
    return model


def outline(config: Any, **options: Any) -> nn.Module:
    """The model with this Hugging Face config on the meta device: all of its layers, and no weight is made or read."""
    with torch.device("meta"):
        return family_of(config).auto_class.from_config(config, **options)
