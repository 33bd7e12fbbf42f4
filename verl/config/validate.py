"""Checks that no single dataclass can make: files that must exist, values that must fit together."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable

from verl.config.algorithm import OldLogProbs, Truncation
from verl.config.config import Config
from verl.config.sizes import compute_sizes
from verl.config.worker import ComputeDtype, OptimStrategy

POSITIVE = (
    "data.max_prompt_length",
    "data.max_response_length",
    "data.rollout_batch_size",
    "data.val_batch_size",
    "data.min_pixels",
    "worker.actor.global_batch_size",
    "worker.actor.micro_batch_size_per_device_for_update",
    "worker.actor.micro_batch_size_per_device_for_experience",
    "worker.actor.ppo_epochs",
    "worker.actor.max_grad_norm",
    "worker.actor.logits_chunk_size",
    "worker.actor.optim.lr",
    "worker.critic.micro_batch_size_per_device_for_update",
    "worker.critic.micro_batch_size_per_device_for_experience",
    "worker.critic.ppo_epochs",
    "worker.critic.max_grad_norm",
    "worker.critic.cliprange_value",
    "worker.critic.optim.lr",
    "worker.rollout.n",
    "worker.rollout.temperature",
    "worker.rollout.max_batch_size",
    "worker.rollout.max_num_seqs",
    "worker.rollout.max_num_batched_tokens",
    "worker.rollout.tensor_parallel_size",
    "worker.rollout.max_failures",
    "worker.rollout.sync_bucket_mb",
    "worker.reward.timeout_s",
    "worker.reward.batch_timeout_s",
    "worker.reward.max_memory_gb",
    "worker.reward.async_concurrency",
    "trainer.total_epochs",
    "trainer.max_try_make_batch",
    "trainer.nnodes",
    "trainer.n_gpus_per_node",
)


def validate(config: Config) -> None:
    """Check what no single dataclass can, before anything is built.

    Raises:
        ValueError: names the key, its value and the way out.
        FileNotFoundError: a file that a key names does not exist.
    """
    _check_positive(config, POSITIVE)
    _check_values(config)
    _check_optimizers(config)
    _check_rollout(config)
    _check_lora(config)
    _check_reward(config)
    _check_algorithm(config)
    _check_files(config)
    compute_sizes(config)
    for name, term in config.algorithm.terms.items():
        term.check(f"algorithm.terms.{name}")
    for name, view in config.algorithm.views.items():
        view.check(f"algorithm.views.{name}")
    for name, shaper in config.algorithm.shapers.items():
        shaper.check(f"algorithm.shapers.{name}")
    if not any(term.coef for term in config.algorithm.terms.values()):
        raise ValueError("algorithm.terms has no term with a coefficient above 0: there is nothing to train on")


def _check_positive(config: Config, keys: Iterable[str]) -> None:
    for key in keys:
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        if value <= 0:
            raise ValueError(f"{key}={value}: a value above 0 is needed")


def _check_values(config: Config) -> None:
    trainer = config.trainer
    config.data.check()
    if trainer.max_steps is not None and trainer.max_steps < 1:
        raise ValueError(f"trainer.max_steps={trainer.max_steps}: 1 or more, or null for trainer.total_epochs")
    if trainer.critic_warmup < 0:
        raise ValueError(f"trainer.critic_warmup={trainer.critic_warmup}: 0 or more steps")
    if trainer.val_freq < 0:
        raise ValueError(f"trainer.val_freq={trainer.val_freq}: 0 (only before and after) or more is needed")
    for key, none in (("samples_per_step", "none"), ("val_generations_to_log", "none"), ("save_freq", "never")):
        if getattr(trainer, key) < 0:
            raise ValueError(f"trainer.{key}={getattr(trainer, key)}: 0 ({none}) or more is needed")
    _check_saving(config)
    if config.data.train_files is None and not trainer.val_only:
        raise ValueError("data.train_files is not set: it names what to train on (or set trainer.val_only=true)")
    if config.data.val_files is None and trainer.val_only:
        raise ValueError("data.val_files is not set, and trainer.val_only=true needs it")
    if config.data.val_files is None and (trainer.val_before_train or trainer.val_after_train or trainer.val_freq):
        raise ValueError(
            "data.val_files is not set: set it, or switch validation off with "
            "trainer.val_before_train=false trainer.val_after_train=false trainer.val_freq=0"
        )


def _check_saving(config: Config) -> None:
    trainer = config.trainer
    if trainer.save_limit < 0:
        raise ValueError(f"trainer.save_limit={trainer.save_limit}: 0 (keep all) or more is needed")
    if trainer.save_best is not None and not trainer.save_best.startswith("val/"):
        raise ValueError(
            f"trainer.save_best='{trainer.save_best}': a metric of validation is needed, such as val/accuracy"
        )
    if trainer.save_best is not None and not (trainer.val_freq or trainer.val_after_train):
        raise ValueError(
            f"trainer.save_best={trainer.save_best} needs validation: set trainer.val_freq, or leave it out"
        )
    if trainer.val_only and trainer.resume not in ("auto", "never"):
        raise ValueError(
            f"trainer.resume={trainer.resume} with trainer.val_only=true: to validate a checkpoint, export it and "
            "give the folder as worker.actor.model.model_path"
        )


def _check_optimizers(config: Config) -> None:
    for role in ("actor", "critic"):
        part = getattr(config.worker, role)
        if not 0 <= part.optim.lr_warmup_ratio <= 1 or part.optim.lr_warmup_steps < 0:
            raise ValueError(
                f"worker.{role}.optim: lr_warmup_ratio={part.optim.lr_warmup_ratio} is a share from 0 to 1 of all "
                f"updates, and lr_warmup_steps={part.optim.lr_warmup_steps} a number of them"
            )
        if part.optim.strategy == OptimStrategy.adamw_bf16 and part.fsdp.compute_dtype == ComputeDtype.float32:
            raise ValueError(
                f"worker.{role}.optim.strategy=adamw_bf16 keeps weights in bfloat16, which worker.{role}.fsdp."
                "compute_dtype=float32 cannot make finer: use auto or bfloat16, or strategy=adamw"
            )


def _check_rollout(config: Config) -> None:
    rollout, validation = config.worker.rollout, config.worker.rollout.val_override_config
    for key, sampling in (("worker.rollout", rollout), ("worker.rollout.val_override_config", validation)):
        if sampling.top_p is not None and not 0 < sampling.top_p <= 1:
            raise ValueError(f"{key}.top_p={sampling.top_p}: a value above 0 and at most 1 is needed")
        if sampling.top_k is not None and (sampling.top_k == 0 or sampling.top_k < -1):
            raise ValueError(f"{key}.top_k={sampling.top_k}: -1 (all tokens) or a value above 0 is needed")
    if validation.temperature is not None and validation.temperature < 0:
        raise ValueError("worker.rollout.val_override_config.temperature: 0 (the likeliest token) or more is needed")
    if validation.n is not None and validation.n < 1:
        raise ValueError(f"worker.rollout.val_override_config.n={validation.n}: 1 or more is needed")
    copies = rollout.n if validation.n is None else validation.n
    if validation.temperature == 0 and copies > 1:
        raise ValueError(
            f"worker.rollout.val_override_config.temperature=0 takes the likeliest token, so its n={copies} responses "
            "to a prompt would be one and the same: set worker.rollout.val_override_config.n=1"
        )
    if not 0 < rollout.gpu_memory_utilization <= 1:
        raise ValueError(
            f"worker.rollout.gpu_memory_utilization={rollout.gpu_memory_utilization}: a share of the GPU, above 0 and "
            "at most 1"
        )
    for key in ("limit_images", "dedicated_gpus"):
        if getattr(rollout, key) < 0:
            raise ValueError(f"worker.rollout.{key}={getattr(rollout, key)}: 0 or more is needed")
    for key in ("data_parallel_size", "cpu_threads"):
        value = getattr(rollout, key)
        if value is not None and value < 1:
            raise ValueError(f"worker.rollout.{key}={value}: 1 or more, or null")
    longest = config.data.max_prompt_length + config.data.max_response_length
    if rollout.max_model_len is not None and rollout.max_model_len < longest:
        raise ValueError(
            f"worker.rollout.max_model_len={rollout.max_model_len} is below data.max_prompt_length + "
            f"data.max_response_length = {longest}; raise it, or leave it out"
        )


def _check_lora(config: Config) -> None:
    model, key = config.worker.actor.model, "worker.actor.model.lora"
    lora, targets = model.lora, model.lora.target_modules
    if lora.rank < 0:
        raise ValueError(f"{key}.rank={lora.rank}: 1 or more, or 0 to train all weights")
    if lora.alpha <= 0:
        raise ValueError(f"{key}.alpha={lora.alpha}: a value above 0 is needed")
    names = [targets] if isinstance(targets, str) else targets
    if not (names and isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{key}.target_modules={targets}: all-linear, or a list of names of linear layers")
    for name in names:
        try:
            re.compile(name)
        except re.error as error:
            raise ValueError(f"{key}.target_modules: '{name}' is no regular expression: {error}") from error
    if lora.vision_tower and model.freeze_vision_tower:
        raise ValueError(f"{key}.vision_tower=true trains what worker.actor.model.freeze_vision_tower=true freezes")


def _check_reward(config: Config) -> None:
    reward = config.worker.reward
    if reward.num_workers is not None and reward.num_workers < 1:
        raise ValueError(f"worker.reward.num_workers={reward.num_workers}: 1 or more, or null")
    if not 0 <= reward.max_failure_frac < 1:
        raise ValueError(f"worker.reward.max_failure_frac={reward.max_failure_frac}: from 0 to below 1 is needed")
    for key, part in reward.functions().items():
        if not math.isfinite(part.weight):
            raise ValueError(f"{key}.weight={part.weight}: a finite number is needed")
    for name in reward.extra:
        if name in ("overall", "main") or "." in name or "/" in name:
            raise ValueError(f"worker.reward.extra.{name}: choose a name without . and /, other than overall and main")


def _check_algorithm(config: Config) -> None:
    algorithm, data = config.algorithm, config.data
    if not algorithm.filter_low < algorithm.filter_high:
        raise ValueError(
            f"algorithm.filter_low={algorithm.filter_low} is not below algorithm.filter_high={algorithm.filter_high}"
        )
    if not 0 <= algorithm.overlong_buffer <= data.max_response_length:
        raise ValueError(
            f"algorithm.overlong_buffer={algorithm.overlong_buffer}: from 0 (off) to data.max_response_length="
            f"{data.max_response_length} tokens"
        )
    if algorithm.overlong_penalty < 0:
        raise ValueError(f"algorithm.overlong_penalty={algorithm.overlong_penalty}: 0 or more is needed")
    mini = data.mini_rollout_batch_size
    if mini is not None and not (algorithm.online_filtering and mini > 0):
        raise ValueError(
            f"data.mini_rollout_batch_size={mini}: 1 or more, and only with algorithm.online_filtering=true"
        )
    for key in ("gamma", "lam"):
        if not 0 <= getattr(algorithm, key) <= 1:
            raise ValueError(f"algorithm.{key}={getattr(algorithm, key)}: a value from 0 to 1 is needed")
    algorithm.reward_kl.check("algorithm.reward_kl")
    algorithm.watchdog.check("algorithm.watchdog")
    for name, term in config.algorithm.terms.items():
        if algorithm.old_log_probs == OldLogProbs.rollout and getattr(term, "tis", Truncation.off) != Truncation.off:
            raise ValueError(
                f"algorithm.terms.{name}.tis corrects old log-probs of the trainer, and algorithm.old_log_probs="
                "rollout takes the engine's: use one of the two"
            )


def _check_files(config: Config) -> None:
    if config.data.format_prompt and not os.path.isfile(config.data.format_prompt):
        raise FileNotFoundError(
            f"data.format_prompt='{os.path.abspath(config.data.format_prompt)}': there is no such file"
        )
    if config.data.image_dir and not os.path.isdir(config.data.image_dir):
        raise FileNotFoundError(f"data.image_dir='{os.path.abspath(config.data.image_dir)}': there is no such folder")
