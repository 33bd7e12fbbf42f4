"""Material of scripts/gpu_check.py: a device, models of random weights, actors and rows made by hand."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from verl.algorithms.losses.compose import build_terms
from verl.algorithms.requirements import requirements_of
from verl.config.compose import compose_config
from verl.config.config import Config
from verl.models.attention import use_segments
from verl.models.families import family_of
from verl.models.families.base import Images
from verl.models.families.qwen_vl import GRID, PIXELS
from verl.models.policy import PolicyModel
from verl.protocol import DataProto
from verl.workers.fsdp.wrap import mesh_of, shard
from verl.workers.training.dp_actor import DataParallelActor
from verl.workers.training.optim import build_optimizer, build_schedule, weight_dtype

CPU = torch.device("cpu")
MERGE = 2  # patches a side that make a token


@dataclass(frozen=True)
class Lab:
    """Device and models of the checks; `full` for real shapes, else small ones."""

    device: torch.device

    @property
    def full(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.full:
            torch.cuda.synchronize(self.device)

    def seconds(self, function: Callable[[], Any]) -> float:
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def allocated(self) -> int:
        if not self.full:
            return 0
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(self.device)


def start(device: torch.device, rank: int, world: int, store: dist.Store) -> Lab:
    """Join the process group."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    return Lab(device)


def vlm(hidden: int, layers: int, kv_heads: int, intermediate: int, vocabulary: int, tower: dict) -> Qwen2_5_VLConfig:
    """A Qwen2.5-VL with heads of 128 values."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": hidden // 128}
    text |= {"num_key_value_heads": kv_heads, "intermediate_size": intermediate, "vocab_size": vocabulary}
    text |= {"rope_parameters": rope, **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))}
    vision = {"out_hidden_size": hidden, "window_size": 112, **tower}
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=vocabulary - 1, tie_word_embeddings=True
    )


# As published with Qwen/Qwen2.5-VL-3B-Instruct; and one with heads of the same widths.
TOWER_3B = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
REAL = vlm(2048, 36, 2, 11008, 151936, TOWER_3B | {"fullatt_block_indexes": [7, 15, 23, 31]})
TOWER_SMALL = {"depth": 2, "hidden_size": 160, "intermediate_size": 256, "num_heads": 2}
SMALL = vlm(256, 2, 1, 512, 1000, TOWER_SMALL | {"fullatt_block_indexes": [1]})


def make_policy(model: Qwen2_5_VLConfig, device: torch.device, dtype: torch.dtype, checkpointing: bool) -> PolicyModel:
    """Random weights, the same in every process."""
    torch.manual_seed(0)
    with torch.device(device):
        inner = Qwen2_5_VLForConditionalGeneration._from_config(
            copy.deepcopy(model), dtype=dtype, attn_implementation="sdpa"
        )
    use_segments(inner)
    if checkpointing:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return PolicyModel(inner, [], 1.0, 1024)


def compose(preset: str, longest: int, *overrides: str) -> Config:
    needed = ("worker.actor.model.model_path=none", f"data.max_response_length={longest}")
    return compose_config(preset, [*needed, "worker.actor.optim.lr_warmup_steps=0", *overrides])


def make_actor(lab: Lab, model: Qwen2_5_VLConfig, config: Config) -> DataParallelActor:
    """A rank's actor as ActorWorker builds it, with random weights."""
    actor = config.worker.actor
    checkpointing = actor.model.enable_gradient_checkpointing
    policy = make_policy(model, lab.device, weight_dtype(actor.optim), checkpointing)
    shard(policy, mesh_of(lab.device, None), actor.fsdp)
    optimizer = build_optimizer(list(policy.parameters()), actor.optim)
    return DataParallelActor(
        policy=policy,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, actor.optim, 100),
        terms=build_terms(config.algorithm.terms),
        requirements=requirements_of(config.algorithm, 1),
        old_log_probs=config.algorithm.old_log_probs,
        config=actor,
        max_response_length=config.data.max_response_length,
        device=lab.device,
    )


def make_rows(model: Qwen2_5_VLConfig, prompts: Sequence[tuple[int, int, Sequence[int]]], seed: int = 0) -> DataProto:
    """Rows with random tokens and pictures, and every column that the presets' updates read.

    Args:
        prompts: Of each the merged side of its picture, in tokens, its words, and the lengths of its responses.
    """
    generator, family = torch.Generator().manual_seed(seed), family_of(model)
    draw = partial(torch.randint, model.image_token_id, generator=generator)
    columns: dict[str, list] = {name: [] for name in ("input_ids", "attention_mask", "position_ids", "response_mask")}
    pictures: dict[str, list] = {"mm_inputs": [], "masked_mm_inputs": []}
    width = max(side * side + words for side, words, _ in prompts)
    longest = max(max(lengths) for _, _, lengths in prompts)
    for side, words, lengths in prompts:
        prefix = torch.cat([torch.full((side * side,), model.image_token_id), draw((words,))])
        grid = torch.tensor([[1, MERGE * side, MERGE * side]])
        for name in pictures:
            pixels = torch.randn((MERGE * side) ** 2, 1176, generator=generator)
            pictures[name] += [Images.of([{PIXELS: pixels, GRID: grid}])] * len(lengths)
        starts = family.positions(prefix, pictures["mm_inputs"][-1], model)
        tail = starts.max() + 1 + torch.arange(longest).expand(3, -1)
        for length in lengths:
            padded = width - len(prefix)
            answer = torch.arange(longest) < length
            columns["input_ids"].append(F.pad(torch.cat([prefix, draw((longest,)) * answer]), (padded, 0)))
            columns["attention_mask"].append(torch.cat([torch.arange(width) >= padded, answer]).long())
            columns["position_ids"].append(F.pad(torch.cat([starts, tail], dim=1), (padded, 0)))
            columns["response_mask"].append(answer.long())
    tensors = {name: torch.stack(values) for name, values in columns.items()}
    mask = tensors["response_mask"]
    for name in ("rollout_log_probs", "ref_log_probs", "masked_log_probs"):
        tensors[name] = (-math.log(model.image_token_id) + 0.1 * torch.randn(mask.shape, generator=generator)) * mask
    tensors["advantages"] = torch.randn(len(mask), 1, generator=generator) * mask
    tensors["masked_rows"] = torch.ones(len(mask), dtype=torch.bool)
    return DataProto.from_dict(tensors, pictures)


def lengths_of(count: int, mean: float, longest: int) -> list[int]:
    """Log-normal lengths, the same ones every time."""
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(1)).mul(0.6).exp() * mean / math.exp(0.18)
    return drawn.round().clamp(1, longest).int().tolist()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().float().cpu()
