"""Whether a run fits into memory, and which key to change where it does not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from papo.tools.doctor.case import Case, Finding, error, in_gib, load_hf_config, ok, warning
from papo.tools.doctor.estimate import GENERATION, Estimate, Phase, estimate
from papo.tools.doctor.machine import RAY_ENOUGH, RAY_SHARE, SHARED_MEMORY, disk_usage, main_memory
from papo.tools.doctor.memory import FLOAT
from papo.tools.doctor.shape import Shape, shape_of
from verl.config.config import Config
from verl.config.sizes import compute_sizes
from verl.config.worker import ComputeDtype, OptimStrategy

CLOSE = 0.9  # above this share an estimate of this kind is no promise
FEW = 16  # responses at one time, below which an engine is slow
MOST_RANKS = 256
ACTOR, ROLLOUT = "worker.actor", "worker.rollout"


def check_memory_fit(case: Case) -> Iterator[Finding]:
    """The memory of each phase of a step against the device's: with prompts as long as they may be, and, where that is
    too much, with prompts as long as they are."""
    data, shapes = case.config.data, _shapes(case)
    case.estimate = found = compute(case, case.config, shapes, data.max_prompt_length)
    seen = None
    if case.longest_prompt and case.longest_prompt < data.max_prompt_length:
        seen = compute(case, case.config, shapes, case.longest_prompt)
    there = f"the {'GPU' if found.device == 'cuda' else 'machine'}'s {in_gib(found.capacity)}"
    for number, phase in enumerate(found.phases):
        text = f"at most {in_gib(phase.bytes)} of {there}"
        if phase.bytes <= CLOSE * found.capacity:
            yield ok(phase.name, text)
            continue
        level = error if phase.bytes > found.capacity else warning
        if seen is not None:
            then = seen.phases[number].bytes
            text += f"; {in_gib(then)} with prompts as in the data ({case.longest_prompt} tokens)"
            level = error if then > found.capacity else warning
        yield level(phase.name, text, advice(case, shapes, phase))
    yield from _judge_cache(case, found, shapes[0])
    yield from _judge_offloaded(case, found)


def check_images_of_step(case: Case) -> Iterator[Finding]:
    """Ray's object store takes the image tensors of a whole step, of every view."""
    if case.imagined:
        return
    data, shape = case.config.data, _shapes(case)[0]
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


def _shapes(case: Case) -> tuple[Shape, Shape]:
    """Of the actor's and of the reference's model."""
    worker = case.config.worker
    shape, ref_path = shape_of(case.hf_config, worker.actor.model.lora), worker.ref.model_path
    refers = ref_path and case.requirements.reference
    return shape, shape_of(load_hf_config(ref_path, case.config)) if refers else shape


def compute(case: Case, config: Config, shapes: tuple[Shape, Shape], prompt: int) -> Estimate:
    """The estimate of `config` on the machine of `case`, with prompts of `prompt` tokens. Raises ValueError where its
    sizes do not fit together."""
    from verl.single_controller.resources import plan_replicas
    from verl.workers.rollout.engines import choose_engine

    sizes, rollout = compute_sizes(config), config.worker.rollout
    if rollout.name == "auto":  # the check of the config, which chooses, has stopped at an error
        rollout.name = choose_engine(rollout)
    on_gpu = case.device == "cuda"
    return estimate(
        config,
        sizes,
        case.requirements,
        shapes,
        case.device,
        min(gpu.memory for gpu in case.gpus) if on_gpu else main_memory(),
        plan_replicas(sizes.ranks, rollout) if on_gpu else rollout.data_parallel_size or 1,
        case.images_per_row,
        prompt,
    )


def advice(case: Case, shapes: tuple[Shape, Shape], phase: Phase) -> str:
    """The first change, of one key or of all that help, with which the arithmetic says that the phase fits."""
    if phase.name in GENERATION:
        steps = _generation_steps(case.config)
    else:
        steps = _training_steps(case.config, phase.name)
    steps += _state_steps(case.config)
    for change in [*steps, _merged(steps), *_more_ranks(case.config)]:
        bytes_then = _with(case, shapes, change, phase.name)
        if bytes_then is not None and bytes_then <= CLOSE * case.estimate.capacity:
            keys = " ".join(f"{key}={_written(value)}" for key, value in change.items())
            return f"{keys}: then {in_gib(bytes_then)}"
    return "no key helps enough: a smaller model, or devices with more memory"


def _training_steps(config: Config, phase: str) -> list[dict[str, Any]]:
    actor = config.worker.actor
    if phase == "optimizer step":
        return []
    kind = "update" if phase == "update" else "experience"
    key = f"{ACTOR}.micro_batch_size_per_device_for_{kind}"
    size = getattr(actor, f"micro_batch_size_per_device_for_{kind}")
    steps: list[dict[str, Any]] = []
    if not actor.fsdp.reshard_after_forward:
        steps.append({f"{ACTOR}.fsdp.reshard_after_forward": True})
    if phase == "update" and not actor.model.enable_gradient_checkpointing:
        steps.append({f"{ACTOR}.model.enable_gradient_checkpointing": True})
    while size > 1:
        size //= 2
        steps.append({key: size})
    if actor.logits_chunk_size > 256:
        steps.append({f"{ACTOR}.logits_chunk_size": 256})
    return steps


def _state_steps(config: Config) -> list[dict[str, Any]]:
    """Changes that make the actor's states smaller, at the cost of time and precision."""
    actor, steps = config.worker.actor, []
    if not actor.fsdp.cpu_offload:
        steps.append({f"{ACTOR}.fsdp.cpu_offload": True})
    if actor.optim.strategy == OptimStrategy.adamw and actor.fsdp.compute_dtype != ComputeDtype.float32:
        steps.append({f"{ACTOR}.optim.strategy": OptimStrategy.adamw_bf16})
    return steps


def _generation_steps(config: Config) -> list[dict[str, Any]]:
    from verl.workers.rollout.engines import ENGINES

    rollout = config.worker.rollout
    return [{f"{ROLLOUT}.{key}": v for key, v in step.items()} for step in ENGINES[rollout.name].smaller(rollout)]


def _merged(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """All changes at one time; of several values for a key the last one, which saves most."""
    return {key: value for step in steps for key, value in step.items()}


def _more_ranks(config: Config) -> Iterator[dict[str, Any]]:
    ranks, key = config.trainer.n_gpus_per_node, "trainer.n_gpus_per_node"
    while ranks < MOST_RANKS and config.trainer.nnodes == 1:
        ranks *= 2
        if ranks > 8:
            key = "trainer.nnodes"
        yield {key: ranks} if ranks <= 8 else {"trainer.n_gpus_per_node": 8, key: ranks // 8}


def _with(case: Case, shapes: tuple[Shape, Shape], change: dict[str, Any], phase: str) -> int | None:
    """Bytes of the phase after a change; None where the run would not work so."""
    config = copy.deepcopy(case.config)
    for key, value in change.items():
        *path, last = key.split(".")
        owner = config
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, last, value)
    try:
        then = compute(case, config, shapes, config.data.max_prompt_length)
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


def _judge_offloaded(case: Case, found: Estimate) -> Iterator[Finding]:
    """Memory of each node that offloading takes."""
    if not found.offloaded:
        return
    text = f"cpu_offload keeps {in_gib(found.offloaded)} there, for the GPUs of one node"
    if case.imagined:
        yield ok("host memory", text)
        return
    text += f", of {in_gib(main_memory())}"
    if found.offloaded <= CLOSE * main_memory():
        yield ok("host memory", text)
    else:
        level = error if found.offloaded > main_memory() else warning
        yield level("host memory", text, f"{ACTOR}.optim.strategy=adamw_bf16, or cpu_offload for fewer roles")


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else f"{value:g}"
