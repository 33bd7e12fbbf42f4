"""The check that a run fits into memory, and the key to change where it does not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from operator import attrgetter
from typing import Any

from papo.tools.doctor.case import Case, Finding, error, in_gib, ok, warning
from papo.tools.doctor.machine import RAY_ENOUGH, RAY_SHARE, SHARED_MEMORY, disk_usage, main_memory
from papo.tools.doctor.memory import FLOAT, GENERATION, Estimate, Phase, Shape, estimate, shapes_of
from verl.config.config import Config
from verl.config.worker import ComputeDtype, Offload, OptimStrategy

CLOSE = 0.9  # above this share an estimate of this kind is no promise
FEW = 16  # responses at one time, below which an engine is slow
MOST_RANKS = 256
ACTOR, ROLLOUT = "worker.actor", "worker.rollout"

Change = dict[str, Any]  # key -> value


def check_memory_fit(case: Case) -> Iterator[Finding]:
    """The memory of each phase of a step against the device's."""
    shapes = shapes_of(case)
    case.estimate = found = estimate(case, case.config, shapes)
    there = f"the {'GPU' if found.device == 'cuda' else 'machine'}'s {in_gib(found.capacity)}"
    for phase in found.phases:
        yield _judged(phase.name, f"at most {in_gib(phase.bytes)} of {there}", phase.bytes, found.capacity,
                      partial(advice, case, shapes, phase))  # fmt: skip
    yield from _judge_cache(case, found, shapes["actor"])
    if found.offloaded:
        text = f"fsdp.offload keeps {in_gib(found.offloaded)} there, for the GPUs of one node"
        if case.imagined:
            yield ok("host memory", text)
        else:
            fix = f"{ACTOR}.optim.strategy=adamw_bf16, or fsdp.offload for fewer roles"
            text += f", of {in_gib(main_memory())}"
            yield _judged("host memory", text, found.offloaded, main_memory(), lambda: fix)


def _judged(topic: str, text: str, size: int, capacity: int, fix: Any) -> Finding:
    if size <= CLOSE * capacity:
        return ok(topic, text)
    return (error if size > capacity else warning)(topic, text, fix())


def check_images_of_step(case: Case) -> Iterator[Finding]:
    """Ray's object store takes the image tensors of a whole step, of every view."""
    if case.imagined:
        return
    data, shape = case.config.data, shapes_of(case)["actor"]
    prompt = case.longest_prompt or data.max_prompt_length
    patches = min(case.images_per_row * data.max_pixels // shape.patch**2, prompt * shape.merge**2)
    views = 1 + len(case.requirements.views)
    needed = data.rollout_batch_size * patches * shape.pixels * FLOAT * views
    store = min(int(RAY_SHARE * main_memory()), max(RAY_ENOUGH, disk_usage(SHARED_MEMORY)[1]))
    text = f"images of a step: at most {in_gib(needed)} ({data.rollout_batch_size} prompts, {views} view(s)); Ray's "
    text += f"object store has {in_gib(store)}"
    if needed > store:
        yield warning("host memory", f"{text} and writes the rest to disk", "lower data.max_pixels, or add main memory")
    else:
        yield ok("host memory", text)


def advice(case: Case, shapes: dict[str, Shape], phase: Phase) -> str:
    """The first change, of one key or of all that help, with which the arithmetic says that the phase fits."""
    changes = [*_changes(case.config, phase.name)]
    together = {key: value for change in changes for key, value in change.items()}  # a key's last value saves most
    for change in [*changes, together, *_more_ranks(case.config)]:
        bytes_then = _with(case, shapes, change, phase.name)
        if bytes_then is not None and bytes_then <= CLOSE * case.estimate.capacity:
            keys = " ".join(f"{key}={_written(value)}" for key, value in change.items())
            return f"{keys}: then {in_gib(bytes_then)}"
    return "no key helps enough: a smaller model, or devices with more memory"


def _changes(config: Config, phase: str) -> Iterator[Change]:
    """Changes that make a phase smaller, the least costly first."""
    from verl.workers.rollout.engines import ENGINES

    actor, rollout = config.worker.actor, config.worker.rollout
    if phase in GENERATION:
        for step in ENGINES[rollout.name].smaller(rollout):
            yield {f"{ROLLOUT}.{key}": value for key, value in step.items()}
    path = "worker.critic" if phase.startswith("critic") else ACTOR
    role = attrgetter(path)(config)
    if phase.endswith("update"):
        if not role.fsdp.reshard_after_forward:
            yield {f"{path}.fsdp.reshard_after_forward": True}
        model, of_model = (actor.model, f"{ACTOR}.model") if role is actor else (role, path)
        if not model.enable_gradient_checkpointing:
            yield {f"{of_model}.enable_gradient_checkpointing": True}
        longest = config.data.max_prompt_length + config.data.max_response_length
        tokens = role.max_tokens_per_micro_batch // 2
        while tokens >= longest:  # a longer row is a micro-batch of its own
            yield {f"{path}.max_tokens_per_micro_batch": tokens}
            tokens //= 2
        if actor.logits_chunk_size > 256 and role is actor:
            yield {f"{ACTOR}.logits_chunk_size": 256}
    if role.fsdp.offload == Offload.none and phase in GENERATION:
        yield {f"{path}.fsdp.offload": Offload.between_phases}
    elif role.fsdp.offload != Offload.always:
        yield {f"{path}.fsdp.offload": Offload.always}
    if role.optim.strategy == OptimStrategy.adamw and role.fsdp.compute_dtype != ComputeDtype.float32:
        yield {f"{path}.optim.strategy": OptimStrategy.adamw_bf16}


def _more_ranks(config: Config) -> Iterator[Change]:
    ranks, key = config.trainer.n_gpus_per_node, "trainer.n_gpus_per_node"
    while ranks < MOST_RANKS and config.trainer.nnodes == 1:
        ranks *= 2
        if ranks > 8:
            key = "trainer.nnodes"
        yield {key: ranks} if ranks <= 8 else {"trainer.n_gpus_per_node": 8, key: ranks // 8}


def _with(case: Case, shapes: dict[str, Shape], change: Change, phase: str) -> int | None:
    """Bytes of the phase after a change; None where the run would not work so."""
    config = copy.deepcopy(case.config)
    for key, value in change.items():
        owner, _, last = key.rpartition(".")
        setattr(attrgetter(owner)(config), last, value)
    try:
        then = estimate(case, config, shapes)
    except ValueError:
        return None
    if phase in GENERATION and then.cache is not None and then.cache < then.token * _longest(config):
        return None  # an engine without room for one response does not start
    return next((found.bytes for found in then.phases if found.name == phase), None)


def _longest(config: Config) -> int:
    return config.worker.rollout.max_model_len or config.data.max_prompt_length + config.data.max_response_length


def _judge_cache(case: Case, found: Estimate, shape: Shape) -> Iterator[Finding]:
    """Capacity of vLLM's KV cache."""
    rollout = case.config.worker.rollout
    if found.cache is None:
        return
    if shape.text.heads % rollout.tensor_parallel_size:
        text = f"{ROLLOUT}.tensor_parallel_size={rollout.tensor_parallel_size}: the model has {shape.text.heads} heads"
        yield error("KV cache", text, "use a divisor of that")
        return
    longest = _longest(case.config)
    # With fewer KV heads than GPUs each GPU has one whole head.
    token = found.token * max(1, shape.kv_heads // rollout.tensor_parallel_size) // shape.kv_heads
    held = max(found.cache, 0) // token
    at_once = held // longest
    text = f"{held:,} tokens per engine: {at_once} responses of {longest} tokens at a time"
    text += f" (at most max_num_seqs={rollout.max_num_seqs})"
    fix = f"raise {ROLLOUT}.gpu_memory_utilization or tensor_parallel_size, or lower data.max_response_length"
    if at_once < 1:
        yield error("KV cache", f"{text}: the engine will not start", fix)
    elif at_once < min(FEW, rollout.max_num_seqs):
        yield warning("KV cache", f"{text}: slow", fix)
    else:
        yield ok("KV cache", text)


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else f"{value:g}"
