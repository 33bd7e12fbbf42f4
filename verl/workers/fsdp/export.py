"""A sharded policy under its Hugging Face names: the weights that engines get, and the folder that a run leaves."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from verl.config.worker import ModelConfig
from verl.data.vision import load_processor
from verl.models.adapter_names import ADAPTER, BASE, factors, is_adapter, merge, plain_name, save_adapter
from verl.models.policy import PolicyModel
from verl.utils.files import atomic_path
from verl.workers.fsdp.wrap import whole

logger = logging.getLogger(__name__)

ADAPTER_FOLDER = "adapter"


@dataclass(frozen=True)
class Weight:
    """A weight in shards, and what an adapter adds to it: `scale` * `up` @ `down`."""

    stored: torch.Tensor
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    scale: float = 0.0

    @torch.no_grad()
    def whole(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Gathered from all ranks, which must call this together; with an adapter merged, in float32. On `device`
        rather than where the shards are. Without an adapter shards are converted to `dtype` before they travel."""
        if self.down is None:
            return whole(self.stored if dtype is None else self.stored.to(dtype), device)
        weight = whole(self.stored, device)
        return merge(weight, whole(self.up, device), whole(self.down, device), self.scale)


def plain_weights(inner: nn.Module) -> dict[str, Weight]:
    """Every weight under the name that the model without adapters has for it, a tied head under both of its names."""
    state = inner.state_dict()
    found = {}
    for name, stored in state.items():
        layer, adapted, _ = name.partition(f"{BASE}weight")
        if adapted:
            up, down = (state[factor] for factor in factors(layer))
            found[plain_name(name)] = Weight(stored, down, up, inner.get_submodule(layer).scaling[ADAPTER])
        elif not is_adapter(name):
            found[plain_name(name)] = Weight(stored)
    return found


def save_huggingface(policy: PolicyModel, model: ModelConfig, path: str) -> None:
    """Write the weights as they are kept, config, processor and sampling defaults to `path`, whole or not at all. With
    LoRA the weights are merged ones in float32, and the adapter lies in peft's format in the sub-folder `adapter`.

    All ranks call this together, since gathering the weights takes all of them; rank 0 writes.
    """
    inner = policy.inner
    # A file that holds both names of a tied weight cannot be tied again on loading.
    aliases = inner.all_tied_weights_keys
    weights = _on_rank_0({name: weight for name, weight in plain_weights(inner).items() if name not in aliases})
    adapter = _on_rank_0({name: Weight(w) for name, w in inner.state_dict().items() if is_adapter(name)})
    if dist.get_rank() != 0:
        return
    with atomic_path(path) as temporary:
        if adapter:
            weights = {name: weight.float() for name, weight in weights.items()}
        inner.save_pretrained(temporary, state_dict=weights)
        save_processor(model, temporary)
        if adapter:
            inner.config.dtype = torch.float32  # save_pretrained takes that of a frozen base, which may be another one
            inner.config.save_pretrained(temporary)
            save_adapter(inner.peft_config[ADAPTER], adapter, os.path.join(temporary, ADAPTER_FOLDER))
    logger.info("saved the policy to %s", path)


def save_description(policy: PolicyModel, model: ModelConfig, folder: str) -> None:
    """Write all of a Hugging Face folder but its weights: config, processor, sampling defaults."""
    policy.inner.config.save_pretrained(folder)
    if policy.inner.generation_config is not None:
        policy.inner.generation_config.save_pretrained(folder)
    save_processor(model, folder)


def save_processor(model: ModelConfig, folder: str) -> None:
    """Write processor and sampling defaults, as they are where the model came from."""
    load_processor(model.model_path, model.trust_remote_code).save_pretrained(folder)
    defaults = os.path.join(model.model_path, "generation_config.json")
    if os.path.isfile(defaults):
        shutil.copy(defaults, folder)


def _on_rank_0(weights: dict[str, Weight]) -> dict[str, torch.Tensor]:
    """One after the other gathered by all ranks; kept by rank 0, on CPU. {} on the other ranks."""
    found = {}
    for name, weight in weights.items():
        full = weight.whole()
        if dist.get_rank() == 0:
            found[name] = full.cpu().contiguous()
    return found
