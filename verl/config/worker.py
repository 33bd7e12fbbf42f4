"""`worker.*`: actor, reference, critic, rollout and reward."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import II, MISSING

from verl.config.algorithm import LossAverage
from verl.config.option import option

BUDGET = "worker.actor.max_tokens_per_micro_batch"
PASS_BUDGET = 4  # times as many tokens in a pass without gradient, which keeps no activations


class LRSchedule(StrEnum):
    """Shape of the learning rate after the warm-up."""

    constant = "constant"
    cosine = "cosine"
    linear = "linear"


class OptimStrategy(StrEnum):
    """Precision in which weights, gradients and optimizer states are stored."""

    adamw = "adamw"  # float32
    adamw_bf16 = "adamw_bf16"  # bfloat16, with a third state for the digits that bfloat16 weights lose


class ComputeDtype(StrEnum):
    """Precision of forward and backward; that of the stored weights is `optim.strategy`."""

    auto = "auto"  # bfloat16 on GPUs, float32 on CPU
    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass
class LoRAConfig:
    """Low-rank adapters (arXiv 2106.09685): W + alpha / rank * B A with W frozen. There is no dropout: it would make
    the policy that is updated another one than the policy that answered."""

    rank: int = option(0, "rank of the adapters; 0: train all weights instead", least=0)
    alpha: int = option(16, "scale of the adapters, times 1 / rank", above=0)
    target_modules: Any = option(
        "all-linear", "all-linear, or one or a list of names or regular expressions that a layer's full name ends with"
    )
    vision_tower: bool = option(False, "adapters in the vision tower too; never in the head")

    def check(self, key: str) -> None:
        targets = self.target_modules
        names = [targets] if isinstance(targets, str) else targets
        if not (names and isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"{key}.target_modules={targets}: all-linear, or a list of names of linear layers")
        for name in names:
            try:
                re.compile(name)
            except re.error as error:
                raise ValueError(f"{key}.target_modules: '{name}' is no regular expression: {error}") from error


@dataclass
class ModelConfig:
    """The policy's model."""

    model_path: str = option(MISSING, "Hugging Face folder or hub name")
    trust_remote_code: bool = option(False, "run code from the model's folder")
    attn_implementation: str = option("sdpa", "attention of the vision tower and of the engine hf")
    enable_gradient_checkpointing: bool = option(True, "compute activations again in backward: less memory, more time")
    freeze_vision_tower: bool = option(False, "do not train the vision tower")
    lora: LoRAConfig = field(default_factory=LoRAConfig)

    def check(self, key: str) -> None:
        if self.lora.vision_tower and self.freeze_vision_tower:
            raise ValueError(f"{key}.lora.vision_tower=true trains what {key}.freeze_vision_tower=true freezes")


@dataclass
class OptimConfig:
    """AdamW with a linear warm-up."""

    strategy: OptimStrategy = option(OptimStrategy.adamw, "adamw (float32) or adamw_bf16 (12 bytes a weight, not 16)")
    lr: float = option(1e-6, "learning rate", above=0)
    betas: list[float] = option(lambda: [0.9, 0.999], "decay rates of both moments")
    eps: float = option(1e-8, "added to the root of the second moment")
    weight_decay: float = option(1e-2, "decoupled weight decay")
    lr_warmup_steps: int = option(0, "optimizer updates of the warm-up", least=0)
    lr_warmup_ratio: float = option(0.0, "or its share of all updates", least=0, most=1)
    lr_scheduler_type: LRSchedule = option(LRSchedule.constant, "after the warm-up: constant, cosine or linear")
    min_lr_ratio: float = option(0.0, "last learning rate of cosine and linear, as a share of lr")


class Offload(StrEnum):
    """The times at which a model's weights and states are in main memory."""

    none = "none"
    between_phases = "between_phases"
    always = "always"


@dataclass
class FSDPConfig:
    """Sharding of a model over all training ranks (FSDP2)."""

    compute_dtype: ComputeDtype = option(
        ComputeDtype.auto, "precision of forward and backward: auto (bfloat16 on GPUs), float32, bfloat16"
    )
    reshard_after_forward: bool = option(True, "free gathered weights before backward: less memory, more traffic")
    min_block_params: int = option(0, "blocks with fewer parameters are sharded with the whole: fewer gathers", least=0)
    offload: Offload = option(
        Offload.none,
        "weights and optimizer in main memory: none; between_phases, while engines or other models have the GPU; "
        "always, where the optimizer then works, much slower",
    )
    shard_size: int | None = option(
        None, "ranks over which one copy of the weights is spread; null: those of a node, each node a copy", least=1
    )


@dataclass
class ActorConfig:
    """The policy and its updates."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    fsdp: FSDPConfig = field(default_factory=FSDPConfig)
    global_batch_size: int = option(128, "prompts per optimizer update", above=0)
    max_tokens_per_micro_batch: int = option(
        16384,
        "tokens that a rank's forward and backward compute at a time, four image patches as one; passes without "
        "gradient take four times as many",
        above=0,
    )
    ppo_epochs: int = option(1, "times that a step's rows are trained on", above=0)
    max_grad_norm: float = option(1.0, "gradient norm above which gradients are scaled down", above=0)
    max_skipped_updates: int = option(5, "updates in a row that may be not finite before the run stops", above=0)
    loss_avg_mode: LossAverage = option(
        LossAverage.token,
        "mean over tokens (token), of sequences' means (seq), of sums / max_response_length (seq_sum)",
    )
    logits_chunk_size: int = option(1024, "tokens whose logits exist at one time", above=0)

    def check(self, key: str) -> None:
        _check_precision(key, self.optim, self.fsdp)


@dataclass
class RefConfig:
    """The frozen reference, built only if something reads its log-probs; with LoRA it is the actor without adapter."""

    model_path: str | None = option(None, "another model than the actor's first one")
    fsdp: FSDPConfig = field(default_factory=FSDPConfig)


@dataclass
class CriticConfig:
    """The critic of adv_estimator=gae. Its mini-batches are the actor's."""

    model_path: str | None = option(None, "another model than the actor's")
    enable_gradient_checkpointing: bool = option(True, "compute activations again in backward")
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))
    fsdp: FSDPConfig = field(default_factory=FSDPConfig)
    max_tokens_per_micro_batch: int = option(II(BUDGET), "as worker.actor.max_tokens_per_micro_batch", above=0)
    ppo_epochs: int = option(1, "times that a step's rows are trained on", above=0)
    max_grad_norm: float = option(1.0, "gradient norm above which gradients are scaled down", above=0)
    max_skipped_updates: int = option(5, "updates in a row that may be not finite", above=0)
    loss_avg_mode: LossAverage = option(LossAverage.token, "as worker.actor.loss_avg_mode")
    cliprange_value: float = option(0.5, "most that a value counts as moved from before the updates", above=0)

    def check(self, key: str) -> None:
        _check_precision(key, self.optim, self.fsdp)


@dataclass
class SamplingOverride:
    """Sampling of validation, where it differs from training; null: as in `worker.rollout`."""

    n: int | None = option(1, "responses per prompt", least=1)
    temperature: float | None = option(None, "temperature; 0: the likeliest token", least=0)
    top_p: float | None = option(None, "as worker.rollout.top_p", above=0, most=1)
    top_k: int | None = option(None, "as worker.rollout.top_k", least=-1)

    def check(self, key: str) -> None:
        _check_top_k(key, self.top_k)


@dataclass
class RolloutConfig:
    """Generation. On GPUs there are as many engines as fit; they share the trainer's GPUs and sleep while it works,
    or have GPUs of their own."""

    name: str = option("auto", "engine: vllm, hf, or auto (vllm where it is installed)")
    n: int = option(5, "responses per prompt", above=0)
    temperature: float = option(1.0, "temperature of sampling, and of every log-prob", above=0)
    top_p: float = option(1.0, "share of probability that is sampled from", above=0, most=1)
    top_k: int = option(-1, "likeliest tokens that are sampled from; -1: all", least=-1)
    seed: int = option(II("trainer.seed"), "seed of the responses")
    ignore_eos: bool = option(False, "every response of training as long as it may be: for measurements")
    limit_images: int = option(0, "most images of a prompt (vllm); 0: no limit", least=0)
    tensor_parallel_size: int = option(1, "GPUs of an engine", above=0)
    data_parallel_size: int | None = option(None, "engines on CPU; null: 1, and on GPUs as many as fit", least=1)
    dedicated_gpus: int = option(0, "GPUs of the engines besides the trainer's; 0: they share", least=0)
    cpu_threads: int | None = option(None, "threads of an engine on CPU", least=1)
    gpu_memory_utilization: float = option(0.6, "share of a GPU that vllm takes while awake", above=0, most=1)
    sleep_level: int = option(
        1,
        "while the trainer works, vllm on its GPUs keeps the weights in main memory (1) or drops them (2), which has "
        "corrupted vision-language models",
        least=1,
        most=2,
    )
    enforce_eager: bool | None = option(
        None, "no CUDA graphs and no compiled layers (vllm); null: on CPU, where compiling takes half a minute"
    )
    enable_chunked_prefill: bool | None = option(None, "prefill in pieces (vllm); null: on GPUs")
    max_model_len: int | None = option(None, "longest sequence (vllm); null: the longest prompt and response")
    max_num_batched_tokens: int = option(8192, "tokens of an engine's step (vllm)", above=0)
    max_num_seqs: int = option(256, "responses at one time (vllm)", above=0)
    engine_kwargs: dict[str, Any] = option(dict, "further arguments of vllm.EngineArgs")
    max_batch_size: int = option(64, "responses at one time (hf)", above=0)
    weight_sync: str = option(
        "auto", "carrier of weights: object_store, ipc (same GPU or machine), collective (other GPUs), auto"
    )
    sync_bucket_mb: int = option(256, "MiB of weights that are sent at one time", above=0)
    max_failures: int = option(3, "failures of engines in a row that stop the run", above=0)
    val_override_config: SamplingOverride = field(default_factory=SamplingOverride)

    def check(self, key: str) -> None:
        _check_top_k(key, self.top_k)
        validation = self.val_override_config
        copies = self.n if validation.n is None else validation.n
        if validation.temperature == 0 and copies > 1:
            where = f"{key}.val_override_config"
            raise ValueError(
                f"{where}.temperature=0 takes the likeliest token, so its n={copies} responses to a prompt would be "
                f"one and the same: set {where}.n=1"
            )


class RewardType(StrEnum):
    """Input of a reward function: the whole batch, list[RewardInput] -> list[RewardScore], or one response at a time,
    RewardInput -> RewardScore."""

    batch = "batch"
    sequential = "sequential"


@dataclass
class RewardFunctionConfig:
    """One reward function."""

    reward_function: str = option(MISSING, "path/to/file.py:function; it may be async")
    reward_function_kwargs: dict[str, Any] = option(dict, "its keyword arguments")
    reward_type: RewardType = option(
        RewardType.batch, "batch or sequential, of functions whose file has no REWARD_TYPE of its own"
    )
    weight: float = option(1.0, "weight of its `overall` in the sum")


@dataclass
class RewardConfig(RewardFunctionConfig):
    """The reward, the weighted sum of all functions. A response that could not be graded is left out of the update."""

    extra: dict[str, RewardFunctionConfig] = field(default_factory=dict)
    num_workers: int | None = option(None, "processes; null: half the node's cores, from 1 to 8", least=1)
    timeout_s: float = option(30.0, "seconds of work that a response may take", above=0)
    batch_timeout_s: float = option(300.0, "seconds that a batch function's one call may take", above=0)
    max_memory_gb: float = option(4.0, "GiB that a process may take", above=0)
    async_concurrency: int = option(16, "calls of an async function under way in each process", above=0)
    max_failure_frac: float = option(
        0.1, "share of a step's or validation's responses that may fail (0: none; else at least 4)", least=0, below=1
    )

    def functions(self) -> dict[str, RewardFunctionConfig]:
        """Every reward by its config key, the main one first."""
        extra = {f"worker.reward.extra.{name}": function for name, function in self.extra.items()}
        return {"worker.reward": self, **extra}

    def check(self, key: str) -> None:
        for name in self.extra:
            if name in ("overall", "main") or "." in name or "/" in name:
                raise ValueError(f"{key}.extra.{name}: choose a name without . and /, other than overall and main")


@dataclass
class WorkerConfig:
    actor: ActorConfig = field(default_factory=ActorConfig)
    ref: RefConfig = field(default_factory=RefConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)

    @property
    def actor_is_reference(self) -> bool:
        """Whether the reference is the actor with its adapter switched off, and needs no worker."""
        return self.actor.model.lora.rank > 0 and self.ref.model_path is None


def _check_precision(key: str, optim: OptimConfig, fsdp: FSDPConfig) -> None:
    if optim.strategy == OptimStrategy.adamw_bf16 and fsdp.compute_dtype == ComputeDtype.float32:
        raise ValueError(
            f"{key}.optim.strategy=adamw_bf16 keeps weights in bfloat16, which {key}.fsdp.compute_dtype=float32 cannot "
            "make finer: use auto or bfloat16, or strategy=adamw"
        )


def _check_top_k(key: str, top_k: int | None) -> None:
    if top_k == 0:
        raise ValueError(f"{key}.top_k=0: -1 (all tokens) or a value above 0 is needed")
