"""`worker.*`: actor, reference, rollout and reward."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import II, MISSING

from verl.config.algorithm import LossAverage


class LRSchedule(StrEnum):
    """Shape of the learning rate after the warm-up."""

    constant = "constant"
    cosine = "cosine"


class OptimStrategy(StrEnum):
    """What weights, gradients and optimizer states are kept in."""

    adamw = "adamw"  # float32
    adamw_bf16 = "adamw_bf16"  # bfloat16, with a third state for what the weights cannot take


class ComputeDtype(StrEnum):
    """Precision of forward and backward; what weights are kept in is `optim.strategy`."""

    auto = "auto"  # bfloat16 on GPUs, float32 on CPU
    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass
class LoRAConfig:
    """Low-rank adapters (arXiv 2106.09685): W + alpha / rank * B A with W frozen. `rank` 0 trains all weights instead.

    `target_modules`: all-linear, or one or a list of names or regular expressions, which a linear layer's full name
    ends with; of the language model alone, with `vision_tower` also of that, and never the head. There is no dropout:
    it would make the policy that is updated another one than the policy that answered.
    """

    rank: int = 0
    alpha: int = 16
    target_modules: Any = "all-linear"
    vision_tower: bool = False


@dataclass
class ModelConfig:
    """`model_path`: a Hugging Face folder or hub name."""

    model_path: str = MISSING
    trust_remote_code: bool = False
    attn_implementation: str = "sdpa"
    enable_gradient_checkpointing: bool = True
    freeze_vision_tower: bool = False
    lora: LoRAConfig = field(default_factory=LoRAConfig)


@dataclass
class OptimConfig:
    """AdamW. The warm-up is linear, over `lr_warmup_steps` optimizer updates, or the share `lr_warmup_ratio` of all."""

    strategy: OptimStrategy = OptimStrategy.adamw
    lr: float = 1e-6
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 1e-2
    lr_warmup_steps: int = 0
    lr_warmup_ratio: float = 0.0
    lr_scheduler_type: LRSchedule = LRSchedule.constant
    min_lr_ratio: float = 0.0


@dataclass
class FSDPConfig:
    """`reshard_after_forward` frees gathered weights between forward and backward: less memory, more traffic.

    Blocks with fewer than `min_block_params` parameters are not sharded on their own but with the whole, since
    a gather costs more than it saves on small blocks.

    `cpu_offload` keeps weights, gradients and optimizer states in main memory, and the optimizer's step runs there:
    much less GPU memory, slower updates.
    """

    compute_dtype: ComputeDtype = ComputeDtype.auto
    reshard_after_forward: bool = True
    min_block_params: int = 0
    cpu_offload: bool = False


@dataclass
class ActorConfig:
    """`global_batch_size` counts prompts per optimizer update, micro-batch sizes count responses per device.

    `logits_chunk_size` is the number of tokens whose logits exist at one time.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    fsdp: FSDPConfig = field(default_factory=FSDPConfig)
    global_batch_size: int = 128
    micro_batch_size_per_device_for_update: int = 4
    micro_batch_size_per_device_for_experience: int = 16
    ppo_epochs: int = 1
    max_grad_norm: float = 1.0
    max_skipped_updates: int = 5
    loss_avg_mode: LossAverage = LossAverage.token
    logits_chunk_size: int = 1024


@dataclass
class RefConfig:
    """The frozen reference, by default the actor's model as it begins. It is built only if a loss term reads its
    log-probs, and not where it is the actor without its adapter."""

    model_path: str | None = None
    fsdp: FSDPConfig = field(default_factory=FSDPConfig)


@dataclass
class CriticConfig:
    """The critic of adv_estimator=gae, by default made from the actor's model. Its mini-batches are the actor's.

    Micro-batch sizes count responses per device. `cliprange_value`: see verl/algorithms/losses/value.py.
    """

    model_path: str | None = None
    enable_gradient_checkpointing: bool = True
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))
    fsdp: FSDPConfig = field(default_factory=FSDPConfig)
    micro_batch_size_per_device_for_update: int = II("worker.actor.micro_batch_size_per_device_for_update")
    micro_batch_size_per_device_for_experience: int = II("worker.actor.micro_batch_size_per_device_for_experience")
    ppo_epochs: int = 1
    max_grad_norm: float = 1.0
    max_skipped_updates: int = 5
    loss_avg_mode: LossAverage = LossAverage.token
    cliprange_value: float = 0.5


@dataclass
class SamplingOverride:
    """What validation samples otherwise than training; unset fields are taken from `worker.rollout`."""

    n: int | None = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


@dataclass
class RolloutConfig:
    """`name`: vllm, hf, or auto: vllm where it is installed. `n` responses per prompt; `top_k` -1 keeps all tokens.
    With `ignore_eos` every response of training is as long as it may be: for measurements.

    Where engines run: on CPU `data_parallel_size` of them (default 1); with GPUs as many as fit, each over
    `tensor_parallel_size` GPUs. They share the trainer's GPUs and sleep while it works, or have `dedicated_gpus`
    besides those of the trainer. `cpu_threads` limits each engine's threads on CPU.

    vllm: `gpu_memory_utilization` is the share of a GPU that it takes while awake, `max_num_seqs` counts responses at
    one time, `max_model_len` defaults to the longest prompt and response, `enable_chunked_prefill` to true on GPUs,
    `limit_images` 0 is no limit, and `engine_kwargs` are further arguments of vllm.EngineArgs.
    hf: `max_batch_size` counts responses at one time.

    `weight_sync`: object_store, ipc (same GPU or machine), collective (other GPUs), or auto; in buckets of
    `sync_bucket_mb`. After `max_failures` failures of engines in a row the run stops.
    """

    name: str = "auto"
    n: int = 5
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    seed: int = II("trainer.seed")
    ignore_eos: bool = False
    limit_images: int = 0
    tensor_parallel_size: int = 1
    data_parallel_size: int | None = None
    dedicated_gpus: int = 0
    cpu_threads: int | None = None
    gpu_memory_utilization: float = 0.6
    enforce_eager: bool = False
    enable_chunked_prefill: bool | None = None
    max_model_len: int | None = None
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    engine_kwargs: dict[str, Any] = field(default_factory=dict)
    max_batch_size: int = 64
    weight_sync: str = "auto"
    sync_bucket_mb: int = 256
    max_failures: int = 3
    val_override_config: SamplingOverride = field(default_factory=SamplingOverride)


class RewardType(StrEnum):
    """What a reward function takes: the whole batch, list[RewardInput] -> list[RewardScore], or one response at a time,
    RewardInput -> RewardScore."""

    batch = "batch"
    sequential = "sequential"


@dataclass
class RewardFunctionConfig:
    """`reward_function`: `path/to/file.py:function`; it may be `async`. `reward_type` is that of functions whose file
    does not say `REWARD_TYPE = "..."` itself. `weight` is that of its `overall` in the sum."""

    reward_function: str = MISSING
    reward_function_kwargs: dict[str, Any] = field(default_factory=dict)
    reward_type: RewardType = RewardType.batch
    weight: float = 1.0


@dataclass
class RewardConfig(RewardFunctionConfig):
    """The reward, and further ones by name in `extra` (`+reward@worker.reward.extra.NAME=function` adds one): the
    overall reward is the weighted sum of all.

    They run in `num_workers` processes (null: half the cores of the node, from 1 to 8). One response may take
    `timeout_s` of work and a process `max_memory_gb`; a batch function's one call for all may take `batch_timeout_s`.
    An async function has `async_concurrency` calls under way in each process. A response that could not be graded is
    left out of the update; more than the share `max_failure_frac` of the responses of a step, or of a whole validation,
    stop the run (0: any; else at least 4).
    """

    extra: dict[str, RewardFunctionConfig] = field(default_factory=dict)
    num_workers: int | None = None
    timeout_s: float = 30.0
    batch_timeout_s: float = 300.0
    max_memory_gb: float = 4.0
    async_concurrency: int = 16
    max_failure_frac: float = 0.1

    def functions(self) -> dict[str, RewardFunctionConfig]:
        """Every reward by its config key, the main one first."""
        extra = {f"worker.reward.extra.{name}": function for name, function in self.extra.items()}
        return {"worker.reward": self, **extra}


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
