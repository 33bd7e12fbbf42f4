"""Memory of each role and of each phase of a step, from a config."""

from __future__ import annotations

from dataclasses import dataclass, replace

from papo.tools.doctor.case import GIB
from papo.tools.doctor.memory import (
    FLOAT,
    Load,
    Term,
    gradient_terms,
    offloaded,
    optimizer_step_terms,
    pass_terms,
    state_terms,
    text_working,
    total,
    update_terms,
    vision_working,
)
from papo.tools.doctor.shape import Shape
from verl.algorithms.requirements import Requirements
from verl.config.config import Config
from verl.config.sizes import Sizes
from verl.config.worker import FSDPConfig, OptimConfig, OptimStrategy
from verl.workers.rollout.base import EngineLoad

# What no arithmetic gives, each per process: CUDA context, NCCL and allocator; Python with torch and transformers.
GPU_PROCESS, CPU_PROCESS = GIB, GIB * 3 // 4
GENERATION = ("generation", "engine's GPUs")  # the phases in which an engine is awake


@dataclass(frozen=True)
class Role:
    """Memory of one role on one device. Terms with `times` others of their kind share main memory on CPU."""

    name: str
    terms: tuple[Term, ...]
    times: int = 1


@dataclass(frozen=True)
class Phase:
    """A part of a step, and the bytes that each role has on the device meanwhile."""

    name: str
    parts: tuple[tuple[str, int], ...]

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.parts)


@dataclass(frozen=True)
class Estimate:
    """`rows` says what was assumed of them. `capacity` is the memory of one GPU, or on CPU the machine's. `cache` is
    the room that vLLM has left for its KV cache (None for hf), `token` the bytes that one token takes there.
    `offloaded` is what all ranks of a node keep in main memory in place of their GPUs."""

    device: str
    rows: str
    capacity: int
    roles: tuple[Role, ...]
    phases: tuple[Phase, ...]
    cache: int | None
    token: int
    offloaded: int = 0


def load_of(
    config: Config, sizes: Sizes, requirements: Requirements, shape: Shape, device: str, images: int, prompt: int
) -> Load:
    """The numbers of a run that its memory follows from: rows with `images` pictures as large as data.max_pixels
    allows, prompts of `prompt` tokens and the longest responses; no two rows of a micro-batch share a picture."""
    data, actor = config.data, config.worker.actor
    width = compute_bytes(actor.fsdp, device)
    logits = "log_probs"
    if requirements.exact:
        logits = "kl" if any("full_kl" in column for column in requirements.exact) else "entropy"
    return Load(
        ranks=sizes.ranks,
        width=width,
        prompt=prompt,
        response=data.max_response_length,
        patches=min(images * data.max_pixels // shape.patch**2, prompt * shape.merge**2),
        update_rows=min(sizes.micro_batch, sizes.responses_per_rank),
        pass_rows=min(actor.micro_batch_size_per_device_for_experience, -(-sizes.responses_per_step // sizes.ranks)),
        update_views=1 + len(requirements.live_views),
        chunk=actor.logits_chunk_size,
        logits=logits,
        checkpointing=actor.model.enable_gradient_checkpointing,
        frozen_vision=actor.model.freeze_vision_tower or (shape.adapter > 0 and not actor.model.lora.vision_tower),
        reshard=actor.fsdp.reshard_after_forward,
        min_block=actor.fsdp.min_block_params,
        kept=weight_bytes(actor.optim),
        offload=actor.fsdp.cpu_offload and device == "cuda",
    )


def reference_load(config: Config, load: Load, device: str) -> Load:
    """The reference keeps its weights as its forward computes."""
    fsdp = config.worker.ref.fsdp
    width, offload = compute_bytes(fsdp, device), fsdp.cpu_offload and device == "cuda"
    return replace(load, width=width, kept=width, offload=offload, min_block=fsdp.min_block_params)


def critic_load(config: Config, load: Load, device: str) -> Load:
    """The critic's update: the actor's model with one view and a head of one output."""
    critic = config.worker.critic
    return replace(
        load,
        width=compute_bytes(critic.fsdp, device),
        update_rows=critic.micro_batch_size_per_device_for_update,
        update_views=1,
        frozen_vision=config.worker.actor.model.freeze_vision_tower,
        checkpointing=critic.enable_gradient_checkpointing,
        reshard=critic.fsdp.reshard_after_forward,
        min_block=critic.fsdp.min_block_params,
        chunk=0,
        kept=weight_bytes(critic.optim),
        offload=critic.fsdp.cpu_offload and device == "cuda",
    )


def saved_bytes(config: Config, sizes: Sizes, requirements: Requirements, shape: Shape, device: str) -> tuple[int, int]:
    """Of the model that a run leaves (merged in float32 with LoRA, else as weights are kept) and of a checkpoint."""
    load = load_of(config, sizes, requirements, shape, device, 1, 1)
    model = FLOAT * shape.parameters + load.kept * shape.adapter if shape.adapter else load.kept * shape.parameters
    parts = [(shape, load)]
    if requirements.critic:
        parts.append((replace(shape, adapter=0), critic_load(config, load, device)))
    found = [state_terms(of, replace(role_load, ranks=1, offload=False)) for of, role_load in parts]
    return model, sum(total(terms[:1] if config.trainer.save_model_only else terms) for terms in found)  # weights first


def compute_bytes(fsdp: FSDPConfig, device: str) -> int:
    """Of a value in the compute dtype."""
    return FLOAT if fsdp.compute_dtype == "float32" or (fsdp.compute_dtype == "auto" and device == "cpu") else 2


def weight_bytes(optim: OptimConfig) -> int:
    """Of a trained weight, its gradient and each of its optimizer states."""
    return 2 if optim.strategy == OptimStrategy.adamw_bf16 else FLOAT


def estimate(
    config: Config,
    sizes: Sizes,
    requirements: Requirements,
    shapes: tuple[Shape, Shape],
    device: str,
    capacity: int,
    replicas: int,
    images: int,
    prompt: int,
) -> Estimate:
    """The memory of a run.

    Args:
        shapes: of the actor's and of the reference's model.
        capacity: bytes of one GPU, or on CPU of the machine.
        replicas: how many engines there are.
        images, prompt: of a row, and tokens of its prompt.
    """
    load = load_of(config, sizes, requirements, shapes[0], device, images, prompt)
    roles, work, away = [], {GENERATION[0]: []}, 0
    if not config.trainer.val_only:
        roles, work = _training(config, requirements, shapes, load, device)
        away = _offloaded(config, requirements, shapes, load, device)
    trainers = {role.name for role in roles} & {"actor", "reference", "critic"}
    merged = replace(shapes[0], adapter=0)
    engine, cache = engine_terms(config, merged, load, device, capacity)
    roles.append(Role("engine", tuple(engine), replicas if device == "cpu" else 1))
    if device == "cpu":
        phases = _on_cpu(work, total(engine), load.ranks, len(trainers), replicas)
    else:
        phases = _on_gpus(work, total(engine), len(trainers), shares=config.worker.rollout.dedicated_gpus == 0)
    rows = (
        f"rows of at most {prompt} + {load.response} tokens and {images} image(s) of {config.data.max_pixels} pixels; "
        f"{load.update_rows} per micro-batch of the update, {load.pass_rows} of a log-prob pass"
    )
    return Estimate(device, rows, capacity, tuple(roles), phases, cache, shapes[0].kv_bytes(load.width), away)


Work = dict[str, list[tuple[str, int]]]  # phase -> (role, bytes of one rank)


def _training(
    config: Config,
    requirements: Requirements,
    shapes: tuple[Shape, Shape],
    load: Load,
    device: str,
) -> tuple[list[Role], Work]:
    """Actor, reference and critic: their terms, and what they have in each phase of a step."""
    shape, ref_shape = shapes
    states, gradients, step = state_terms(shape, load), gradient_terms(shape, load), optimizer_step_terms(shape, load)
    update = [*gradients, *update_terms(shape, load)]
    own_reference = requirements.reference and config.worker.actor_is_reference
    asks = requirements.old_pass or requirements.stored_views or own_reference
    passes = pass_terms(shape, load, load.reshard) if asks else []
    ref_rest, ref_pass = [], []
    if requirements.reference and not own_reference:
        ref_load = reference_load(config, load, device)
        ref_rest = state_terms(ref_shape, ref_load)[:1]
        ref_pass = pass_terms(ref_shape, ref_load, config.worker.ref.fsdp.reshard_after_forward)
    values, values_update = [], []
    if requirements.critic:
        own, full = critic_load(config, load, device), replace(shape, adapter=0)
        values = state_terms(full, own)
        values_update = [term for term in [*gradient_terms(full, own), *update_terms(full, own)] if term.bytes]
    terms = {
        "actor": states,
        "actor, update": update,
        "actor, optimizer step": step,
        "actor, log-probs": passes,
        "reference": ref_rest,
        "reference, log-probs": ref_pass,
        "critic": values,
        "critic, update": values_update,
    }
    times = load.ranks if device == "cpu" else 1  # on a GPU each process frees what its pass took
    rest, others = total(states), [("reference", total(ref_rest)), ("critic", total(values))]
    work = {
        GENERATION[0]: [("actor", rest), *others],
        "log-probs": [("actor", rest + total(passes)), ("reference", total(ref_rest + ref_pass)), others[1]],
        "critic update": [("actor", rest), others[0], ("critic", total(values + values_update))],
        "update": [("actor", rest + total(update)), *others],
        "optimizer step": [("actor", rest + total(gradients + step)), *others],
    }
    if not values:
        del work["critic update"]
    if not passes and not ref_pass:
        del work["log-probs"]
    return [Role(name, tuple(found), times) for name, found in terms.items() if found], work


def _offloaded(config: Config, requirements: Requirements, shapes: tuple[Shape, Shape], load: Load, device: str) -> int:
    """Bytes that the ranks of a node keep in main memory in place of their GPUs."""
    size = offloaded(shapes[0], load) if load.offload else 0
    if requirements.critic and (own := critic_load(config, load, device)).offload:
        size += offloaded(replace(shapes[0], adapter=0), own)
    own_reference = config.worker.actor_is_reference
    if requirements.reference and not own_reference and (ref := reference_load(config, load, device)).offload:
        size += state_terms(shapes[1], replace(ref, offload=False))[0].bytes
    return config.trainer.n_gpus_per_node * size


def _on_gpus(work: Work, engine: int, trainers: int, shares: bool) -> tuple[Phase, ...]:
    """Phases on one of the trainer's GPUs; the engine is asleep but for generation, or elsewhere."""
    phases = []
    for name, parts in work.items():
        awake = shares and name == GENERATION[0]
        processes = trainers + (shares and not awake)  # awake, vLLM counts its own within its share
        parts = [*parts, *([("engine", engine)] if awake else []), ("processes", processes * GPU_PROCESS)]
        phases.append(_phase(name, parts))
    if not shares:
        phases.append(Phase(GENERATION[1], (("engine", engine),)))
    return tuple(phases)


def _on_cpu(work: Work, engine: int, ranks: int, trainers: int, replicas: int) -> tuple[Phase, ...]:
    """Phases in main memory, where everything is at the same time: ranks, engines, driver, reward."""
    processes = 2 + ranks * trainers + replicas
    fixed = [("engine", replicas * engine), ("processes", processes * CPU_PROCESS)]
    return tuple(
        _phase(name, [*((role, ranks * size) for role, size in parts), *fixed]) for name, parts in work.items()
    )


def _phase(name: str, parts: list[tuple[str, int]]) -> Phase:
    return Phase(name, tuple((role, size) for role, size in parts if size))


def engine_terms(config: Config, shape: Shape, load: Load, device: str, capacity: int) -> tuple[list[Term], int | None]:
    """Memory of the engine while it generates, and the bytes that are left for vLLM's KV cache."""
    from verl.workers.rollout.engines import ENGINES

    rollout, width = config.worker.rollout, load.width
    own = EngineLoad(
        weights=width * shape.parameters,
        kv_token=shape.kv_bytes(width),
        token_work=text_working(shape, width, False),
        patch_work=vision_working(shape, width, False),
        patches=min(config.data.max_pixels // shape.patch**2, load.prompt * shape.merge**2),
        prompt=load.prompt,
        response=load.response,
        vocabulary=shape.vocabulary,
        capacity=None if device == "cpu" else capacity,
    )
    return ENGINES[rollout.name].memory(rollout, own)
