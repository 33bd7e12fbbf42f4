"""Memory of a run, by arithmetic: states of each model, a micro-batch of an update, and the engine with its KV cache.

The activations are those of Qwen2.5-VL's blocks with SDPA, in tensors that autograd keeps; four image patches take
about as much as a token, as in a budget. `--dry-run` measures the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from papo.tools.doctor.case import GIB, Case, load_hf_config
from papo.tools.doctor.machine import main_memory
from papo.tools.doctor.shape import Shape, shape_of
from verl.config.config import Config
from verl.config.sizes import compute_sizes
from verl.config.worker import ActorConfig, CriticConfig, FSDPConfig, Offload, OptimConfig, OptimStrategy
from verl.workers.rollout.base import EngineLoad, Term

FLOAT = 4
STEP_COPIES = 8  # float32 values per weight that a step of CompensatedAdamW holds, of one parameter at a time
LOGIT_BYTES = {"sampled": 10, "exact": 30}  # per logit of a chunk: copies in compute dtype and float32, both directions
# What no arithmetic gives, each per process: CUDA context, NCCL and allocator; Python with torch and transformers.
GPU_PROCESS, CPU_PROCESS = GIB, GIB * 3 // 4
GENERATION = ("generation", "engine's GPUs")  # the phases in which an engine is awake


@dataclass(frozen=True)
class Model:
    """Memory of one model on a rank's device: `states` through the whole step, `gradients` and `work` beside them in
    forward and backward, `gradients` and `step` in the optimizer's step. `away` is kept in main memory instead; what is
    `parked` has its states there while it does not work."""

    states: list[Term] = field(default_factory=list)
    gradients: list[Term] = field(default_factory=list)
    work: list[Term] = field(default_factory=list)
    step: list[Term] = field(default_factory=list)
    away: int = 0
    parked: bool = False

    @property
    def idle(self) -> int:
        """Bytes on the device while others work."""
        return 0 if self.parked else total(self.states)

    @property
    def in_main_memory(self) -> int:
        return self.away + (total(self.states) if self.parked else 0)


@dataclass(frozen=True)
class Phase:
    """A part of a step, and the bytes that each role has on the device meanwhile."""

    name: str
    parts: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Estimate:
    """Memory of a run.

    Attributes:
        capacity: Bytes of one GPU, or on CPU of the machine.
        roles: By name the terms of one process, and how many such processes share the memory.
        cache: Bytes that vLLM has left for its KV cache; None for hf. One token takes `token` of them.
        offloaded: Bytes that all ranks of a node keep in main memory in place of their GPUs.
    """

    device: str
    capacity: int
    roles: dict[str, tuple[list[Term], int]]
    phases: list[Phase]
    cache: int | None
    token: int
    offloaded: int


def shapes_of(case: Case) -> dict[str, Shape]:
    """The shape of each role's model."""
    worker = case.config.worker
    shape, path = shape_of(case.hf_config, worker.actor.model.lora), worker.ref.model_path
    other = shape_of(load_hf_config(path, case.config)) if path and case.requirements.reference else shape
    return {"actor": shape, "reference": other, "critic": replace(shape, adapter=0)}


def estimate(case: Case, config: Config, shapes: dict[str, Shape]) -> Estimate:
    """The memory of `config` on the machine of `case`. Raises ValueError where its sizes do not fit together."""
    from verl.single_controller.resources import plan_replicas
    from verl.workers.rollout.engines import ENGINES, choose_engine

    sizes, rollout, on_gpu = compute_sizes(config), config.worker.rollout, case.device == "cuda"
    if rollout.name == "auto":  # the check of the config, which chooses, has stopped at an error
        rollout.name = choose_engine(rollout)
    capacity = min(gpu.memory for gpu in case.gpus) if on_gpu else main_memory()
    replicas = plan_replicas(sizes.ranks, rollout) if on_gpu else rollout.data_parallel_size or 1
    models = {} if config.trainer.val_only else models_of(case, config, shapes, sizes.ranks)
    shape, width = shapes["actor"], compute_bytes(config.worker.actor.fsdp, case.device)
    load = EngineLoad(
        weights=width * shape.parameters,
        kv_token=shape.kv_bytes(width),
        state=4 * shape.state,  # in float32
        token_work=width * (3 * shape.text.intermediate + 2 * shape.text.hidden),
        prompt=config.data.max_prompt_length,
        response=config.data.max_response_length,
        vocabulary=shape.vocabulary,
        capacity=capacity if on_gpu else None,
    )
    engine, cache = ENGINES[rollout.name].memory(rollout, load)
    ranks = 1 if on_gpu else sizes.ranks
    roles = {}
    for name, model in models.items():
        parts = {"": model.states, ", update": model.gradients + model.work, ", optimizer step": model.step}
        roles |= {name + part: (terms, ranks) for part, terms in parts.items() if terms}
    roles["engine"] = (engine, 1 if on_gpu else replicas)
    trainers = [*on_device(models)]
    if on_gpu:
        phases = _on_gpus(trainers, total(engine), len(models), shares=rollout.dedicated_gpus == 0)
    else:
        fixed = {"engine": replicas * total(engine)}
        fixed["processes"] = (2 + ranks * len(models) + replicas) * CPU_PROCESS
        phases = [Phase(p.name, {role: ranks * size for role, size in p.parts.items()} | fixed) for p in trainers]
    away = config.trainer.n_gpus_per_node * sum(model.in_main_memory for model in models.values())
    return Estimate(case.device, capacity, roles, phases, cache, load.kv_token, away)


def on_device(models: dict[str, Model]) -> Iterator[Phase]:
    """Phases of a step, with what each model has on one rank's device."""
    rest = {name: model.idle for name, model in models.items()}
    yield Phase(GENERATION[0], rest)
    for name in ("critic", "actor"):
        if name in models:
            model, prefix = models[name], "critic's " if name == "critic" else ""
            for phase, terms in (("update", model.work), ("optimizer step", model.step)):
                yield Phase(prefix + phase, rest | {name: total(model.states + model.gradients + terms)})


def _on_gpus(trainers: list[Phase], engine: int, processes: int, shares: bool) -> list[Phase]:
    """Phases on one of the trainer's GPUs; an engine there is asleep but for generation."""
    phases = []
    for phase in trainers:
        awake = shares and phase.name == GENERATION[0]
        count = processes + shares  # vLLM's own context comes on top of its share
        phases.append(Phase(phase.name, phase.parts | ({"engine": engine} if awake else {})))
        phases[-1].parts["processes"] = count * GPU_PROCESS
    return phases if shares else [*phases, Phase(GENERATION[1], {"engine": engine})]


def models_of(case: Case, config: Config, shapes: dict[str, Shape], ranks: int) -> dict[str, Model]:
    """The models that a run trains or refers to, as one of so many ranks has them."""
    actor, critic, needs = config.worker.actor, config.worker.critic, case.requirements
    size, kind = actor.logits_chunk_size, "exact" if needs.exact or needs.early_exact else "sampled"
    vocabulary, each = shapes["actor"].vocabulary, LOGIT_BYTES[kind]
    head = Term("logits of a chunk", size * vocabulary * each, f"{size} tokens x {vocabulary} x {each} bytes")
    own = _trained(shapes["actor"], config, actor, ranks, case.device, actor.model.enable_gradient_checkpointing)
    found = {"actor": replace(own, work=[*own.work, head])}
    if needs.reference and not config.worker.actor_is_reference:
        fsdp = config.worker.ref.fsdp
        states = _states(shapes["reference"], config, fsdp, ranks, case.device)
        found["reference"] = _placed(Model(states), fsdp, case.device)
    if needs.critic:
        checkpointing = critic.enable_gradient_checkpointing
        found["critic"] = _trained(shapes["critic"], config, critic, ranks, case.device, checkpointing)
    return found


def _trained(
    shape: Shape, config: Config, role: ActorConfig | CriticConfig, ranks: int, device: str, checkpointing: bool
) -> Model:
    """The actor or the critic on one of its ranks."""
    kept, width, count = weight_bytes(role.optim), compute_bytes(role.fsdp, device), trainable(shape, config)
    states = _states(shape, config, role.fsdp, ranks, device, role.optim)
    gradients = [_share("gradients", FLOAT, count, ranks)]
    # AdamW is fused; CompensatedAdamW works on one parameter at a time, of which the head is the largest.
    step = [] if kept == FLOAT else [_share("copies of the head", STEP_COPIES * FLOAT, shape.head, ranks)]
    work = [_gathered(shape, role.fsdp, width), _activations(shape, role, width, checkpointing)]
    return _placed(Model(states, gradients, work, step), role.fsdp, device)


def _placed(model: Model, fsdp: FSDPConfig, device: str) -> Model:
    """The model with what `fsdp.offload` moves to main memory there."""
    if device == "cuda" and fsdp.offload == Offload.always:
        return Model(work=model.work, away=total([*model.states, *model.gradients, *model.step]))
    return replace(model, parked=device == "cuda" and fsdp.offload == Offload.between_phases)


def trainable(shape: Shape, config: Config) -> int:
    """Parameters that get gradients."""
    frozen = shape.vision_parameters if config.worker.actor.model.freeze_vision_tower else 0
    return shape.adapter or shape.parameters - frozen


def _states(
    shape: Shape, config: Config, fsdp: FSDPConfig, ranks: int, device: str, optim: OptimConfig | None = None
) -> list[Term]:
    """Weights and, with `optim`, the optimizer's states. Frozen weights are kept as the forward computes."""
    width = compute_bytes(fsdp, device)
    kept = weight_bytes(optim) if optim else width
    frozen = width if shape.adapter else kept
    how = f"{frozen} bytes x {billions(shape.parameters)}"
    how += f" + {kept} x {billions(shape.adapter)}" if shape.adapter else ""
    weights = Term("weights", (frozen * shape.parameters + kept * shape.adapter) // ranks, f"({how}) / {ranks}")
    if not optim:
        return [weights]
    number = 2 if kept == FLOAT else 3  # in bfloat16 also what rounding has lost
    return [weights, _share("optimizer states", number * kept, trainable(shape, config), ranks)]


def _gathered(shape: Shape, fsdp: FSDPConfig, width: int) -> Term:
    """Weights in compute dtype as FSDP gathers them, the root's and a block with the one behind it, and the gradients
    of the same."""
    part = shape.root(fsdp.min_block_params) + 2 * shape.largest_block(fsdp.min_block_params)
    weights = part if fsdp.reshard_after_forward else shape.parameters + shape.adapter
    gradients = 0 if shape.adapter else part
    how = f"{width} bytes x ({billions(weights)} + gradients of {billions(gradients)})"
    return Term("gathered", width * (weights + gradients), how)


def _activations(shape: Shape, settings: ActorConfig | CriticConfig, width: int, checkpointing: bool) -> Term:
    """With checkpointing a block keeps its input, and makes the rest again when backward comes to it."""
    tokens, text = settings.max_tokens_per_micro_batch, shape.text
    block, moment = block_bytes(shape, width), moment_bytes(shape, width)
    each, extra = (width * text.hidden, block + moment) if checkpointing else (block, moment)
    how = f"{tokens} tokens x ({text.layers} layers x {each} + {extra}) bytes"
    return Term("activations", tokens * (text.layers * each + extra), how)


def block_bytes(shape: Shape, width: int) -> int:
    """Bytes per token that one block of the language model keeps for backward: 4 of MLP width, 8 of hidden width,
    and the float32 inputs of both norms."""
    return width * (4 * shape.text.intermediate + 8 * shape.text.hidden) + 2 * FLOAT * shape.text.hidden


def moment_bytes(shape: Shape, width: int) -> int:
    """Bytes per token that a block's backward needs for a moment, beside what is kept."""
    return width * (3 * shape.text.intermediate + shape.text.hidden)


def saved_bytes(case: Case) -> tuple[int, int]:
    """Bytes of the model that a run leaves (merged in float32 with LoRA, else as weights are kept) and of a
    checkpoint."""
    config, shapes = case.config, shapes_of(case)
    shape, kept = shapes["actor"], weight_bytes(config.worker.actor.optim)
    model = FLOAT * shape.parameters + kept * shape.adapter if shape.adapter else kept * shape.parameters
    checkpoint = 0
    for name in ("actor", "critic")[: 1 + case.requirements.critic]:
        role = getattr(config.worker, name)
        states = _states(shapes[name], config, role.fsdp, 1, case.device, role.optim)
        checkpoint += total(states[:1] if config.trainer.save_model_only else states)
    return model, checkpoint


def compute_bytes(fsdp: FSDPConfig, device: str) -> int:
    """Bytes of a value in the compute dtype."""
    return FLOAT if fsdp.compute_dtype == "float32" or (fsdp.compute_dtype == "auto" and device == "cpu") else 2


def weight_bytes(optim: OptimConfig) -> int:
    """Bytes of a trained weight, and of each of its optimizer states."""
    return 2 if optim.strategy == OptimStrategy.adamw_bf16 else FLOAT


def _share(name: str, width: int, count: int, ranks: int) -> Term:
    return Term(name, width * count // ranks, f"{width} bytes x {billions(count)} / {ranks}")


def total(terms: list[Term]) -> int:
    return sum(term.bytes for term in terms)


def billions(count: int) -> str:
    """A number of parameters as one reads it."""
    return f"{count / 1e9:.2f}B" if count >= 1e7 else f"{count / 1e6:.2f}M"
