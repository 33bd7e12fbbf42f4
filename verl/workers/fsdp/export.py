"""A sharded policy as an ordinary Hugging Face folder."""

from __future__ import annotations

import logging
import os
import shutil

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from verl.config.worker import ModelConfig
from verl.data.vision import load_processor
from verl.models.policy import PolicyModel
from verl.utils.files import atomic_path

logger = logging.getLogger(__name__)


def save_huggingface(policy: PolicyModel, model: ModelConfig, path: str) -> None:
    """Write the weights as they are kept, config, processor and sampling defaults to `path`, whole or not at all.

    All ranks call this together, since gathering the weights takes all of them; rank 0 writes.
    """
    weights = full_state_dict(policy)
    if dist.get_rank() != 0:
        return
    # A file that holds both names of a tied weight cannot be tied again on loading.
    aliases = policy.inner.all_tied_weights_keys
    weights = {name: weight for name, weight in weights.items() if name not in aliases}
    with atomic_path(path) as temporary:
        policy.inner.save_pretrained(temporary, state_dict=weights)
        save_processor(model, temporary)
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


def full_state_dict(policy: PolicyModel) -> dict[str, torch.Tensor]:
    """All weights on CPU on rank 0, under Hugging Face names; {} on the other ranks."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(policy, options=options)
    return {name.removeprefix("inner."): weight for name, weight in weights.items()}
