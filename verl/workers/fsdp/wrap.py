"""FSDP2: the model's weights in shards, one per rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from verl.config.worker import FSDPConfig, ModelConfig, Offload
from verl.models.attention import use_segments
from verl.models.families import family_of
from verl.models.loading import load_model, resolve_dtype
from verl.models.lora import add_adapter
from verl.models.onednn import use_onednn
from verl.models.policy import PolicyModel
from verl.models.value import ValueModel

WrappedModel = TypeVar("WrappedModel", PolicyModel, ValueModel)


def build_sharded(
    model: ModelConfig,
    fsdp: FSDPConfig,
    wrap: Callable[[nn.Module], WrappedModel],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    ranks_per_node: int | None = None,
) -> WrappedModel:
    """`wrap` of the Hugging Face model, sharded over the ranks of a node, or as `fsdp.shard_size` says, forward in the
    compute dtype. Weights that are trained are kept in `dtype`.

    Only rank 0 reads the weights; the others get their shards from it.
    """
    # Below adapters weights are frozen: in the dtype that they compute in they take half the memory on GPUs, and give
    # the same forward.
    compute = resolve_dtype(fsdp.compute_dtype, device.type)
    kept = compute if model.lora.rank else dtype
    inner = load_model(
        model.model_path,
        kept,
        model.attn_implementation,
        model.trust_remote_code,
        empty=dist.get_rank() != 0,
    )
    use_segments(inner)
    if device.type == "cpu" and compute == torch.float32:
        use_onednn(inner)
    if model.enable_gradient_checkpointing:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if model.freeze_vision_tower:
        family_of(inner.config).tower(inner).requires_grad_(False)
    if model.lora.rank:
        add_adapter(inner, model.lora, model.model_path, dtype)
    wrapped = wrap(inner)
    weights = wrapped.state_dict() if dist.get_rank() == 0 else {}
    shard(wrapped, mesh_of(device, fsdp.shard_size or ranks_per_node), fsdp)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(wrapped, weights, options=options)
    for _, buffer in wrapped.named_buffers():  # rotary frequencies are not in a state dict
        dist.broadcast(buffer, src=0)
    return wrapped


def mesh_of(device: torch.device, shard_size: int | None) -> DeviceMesh:
    """The ranks, in copies of `shard_size` ranks each (HSDP) where there is more than one, by default all as one copy.

    Raises ValueError where that does not divide them.
    """
    ranks = dist.get_world_size()
    size = min(shard_size or ranks, ranks)
    if ranks % size:
        raise ValueError(f"fsdp.shard_size={size} does not divide the {ranks} training ranks")
    if size == ranks:
        return init_device_mesh(device.type, (ranks,))
    return init_device_mesh(device.type, (ranks // size, size), mesh_dim_names=("copies", "shards"))


def shard(wrapped: WrappedModel, mesh: DeviceMesh, config: FSDPConfig) -> None:
    """`fully_shard` every transformer block that is large enough, then the rest as one; a value head stays float32."""
    dtype = resolve_dtype(config.compute_dtype, mesh.device_type)
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    options = {"mesh": mesh, "mp_policy": mixed, "reshard_after_forward": config.reshard_after_forward}
    if config.offload == Offload.always:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    block_names = set(wrapped.inner._no_split_modules)
    for module in list(wrapped.modules()):
        if type(module).__name__ in block_names:
            if sum(p.numel() for p in module.parameters()) >= config.min_block_params:
                fully_shard(module, **options)
    if isinstance(wrapped, ValueModel):
        precise = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
        fully_shard(wrapped.value_head, **{**options, "mp_policy": precise})
    # The root too is resharded as configured: FSDP's own default would leave its gathered weights in memory
    # behind every pass without backward.
    fully_shard(wrapped, **options)


def whole(weight: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """A weight gathered from all ranks, which must call this together; on `device` rather than where its shards are."""
    weight = weight if device is None else weight.to(device)
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
