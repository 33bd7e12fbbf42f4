"""The table of EasyR1's keys: what each is here. The perception keys of PAPO are a plugin's (papo/legacy.py).

Names and defaults are those of EasyR1 up to 0.3.3 and of its fork PAPO, from their documented configs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from verl.config.compose import CONFIG_DIR
from verl.legacy.rule import Changes, Old, Rule, choice, no_effect, only, refusal, renamed, same

STORED = "what weights are kept in follows from worker.actor.optim.strategy, and a reference's from its compute dtype"
LORA = "worker.actor.model.lora"
MICRO_BATCH = "worker.actor.micro_batch_size_per_device_for_"
TEMPLATES = os.path.join(os.path.dirname(CONFIG_DIR), "examples", "format_prompt")
UNLIMITED = 1_000_000  # generations for a step; a run that needs so many never ends anyway


def _advantage(old: Old) -> Changes:
    name = old["algorithm.adv_estimator"]
    changes = {"algorithm.adv_estimator": "grpo" if name == "dapo" else name}  # upstream's dapo is a copy of grpo
    return {**changes, **_critic(old["worker.critic"])} if name == "gae" else changes


def tokens_of_rows(rows: Any) -> str:
    """A micro-batch of so many rows as the tokens of that many longest ones (see verl.config.compose)."""
    return f"${{tokens_of_rows:{int(rows)}}}"


def _critic(given: Mapping[str, Any]) -> Changes:
    """The critic's keys that mean the same here; refuses the others."""
    names = ("cliprange_value", "max_grad_norm", "ppo_epochs", "loss_avg_mode")
    nested = {
        "model": {"model_path": "model_path"},
        "optim": {n: f"optim.{n}" for n in ("lr", "betas", "weight_decay", "strategy")},
        "offload": dict.fromkeys(("offload_params", "offload_optimizer"), "fsdp.offload"),
    }
    changes = {}
    for name, value in given.items():
        inner = value if name in nested else {name: value}
        known = nested.get(name, {n: n for n in names})
        for key, own in inner.items():
            if key == "micro_batch_size_per_device_for_update":
                changes["worker.critic.max_tokens_per_micro_batch"] = tokens_of_rows(own)
            if key.startswith("micro_batch_size_per_device_for_"):
                continue
            if key not in known:
                where = f"worker.critic.{name}.{key}" if name in nested else f"worker.critic.{key}"
                raise refusal(where, own, "leave it out: the critic's other settings are the actor's")
            if name == "offload":
                own = "between_phases" if own else changes.get("worker.critic.fsdp.offload", "none")
            changes[f"worker.critic.{known[key]}"] = own
    return changes


def _resume(old: Old) -> Changes:
    """Checkpoints in upstream's own format are another matter: they are refused when they are opened, by name."""
    if old["trainer.load_checkpoint_path"]:
        return {"trainer.resume": old["trainer.load_checkpoint_path"]}
    return {"trainer.resume": "auto" if old["trainer.find_last_checkpoint"] else "never"}


def _reference_kl(old: Old) -> Changes:
    if old["algorithm.disable_kl"]:
        return {}
    if not old["algorithm.use_kl_loss"]:
        return _reward_kl(old)
    if old["algorithm.kl_penalty"] != "low_var_kl":
        raise refusal("algorithm.kl_penalty", old["algorithm.kl_penalty"], "the term ref_kl is k3, low_var_kl alone")
    return {"/term@algorithm.terms.ref_kl": "ref_kl", "algorithm.terms.ref_kl.coef": old["algorithm.kl_coef"]}


def _reward_kl(old: Old) -> Changes:
    """Upstream's KL in the reward."""
    estimators, penalty = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}, old["algorithm.kl_penalty"]
    if penalty not in estimators:
        raise refusal("algorithm.kl_penalty", penalty, f"in the reward it is one of {', '.join(estimators)}")
    where = "algorithm.reward_kl"
    changes = {f"{where}.coef": old["algorithm.kl_coef"], f"{where}.estimator": estimators[penalty]}
    if old["algorithm.kl_type"] != "fixed":
        changes |= {f"{where}.controller": old["algorithm.kl_type"], f"{where}.target": old["algorithm.kl_target"]}
        changes[f"{where}.horizon"] = int(old["algorithm.kl_horizon"])
    return changes


def _policy(old: Old) -> Changes:
    kinds = {"default": "policy", "gspo": "gspo", "gspo_token": "gspo", "cispo": "cispo"}
    kind = kinds.get(old["worker.actor.loss_type"])
    if kind is None:
        raise refusal("worker.actor.loss_type", old["worker.actor.loss_type"], f"known are {', '.join(kinds)}")
    names = ["clip_ratio_low", "clip_ratio_high", *(["clip_ratio_dual"] if kind == "policy" else [])]
    clips = {f"algorithm.terms.policy.{name}": old[f"worker.actor.{name}"] for name in names}
    return {"/term@algorithm.terms.policy": kind, **clips}


def _lora(old: Old) -> Changes:
    """Upstream takes names of layers with commas between them too, and leaves those out that another key names."""
    targets, excluded = old[f"{LORA}.target_modules"], old[f"{LORA}.exclude_modules"]
    if excluded and old[f"{LORA}.rank"] and "visual" not in excluded:
        raise refusal(f"{LORA}.exclude_modules", excluded, f"name the layers that are trained in {LORA}.target_modules")
    if isinstance(targets, str) and "," in targets:
        targets = [name.strip() for name in targets.split(",")]
    return {f"{LORA}.target_modules": targets, **{key: old[key] for key in (f"{LORA}.rank", f"{LORA}.alpha")}}


def _lora_differs(old: Old) -> str:
    if not old[f"{LORA}.rank"] or old[f"{LORA}.exclude_modules"]:
        return ""
    return f"{LORA} trains layers of the language model; {LORA}.vision_tower=true those of the vision tower as well"


def _wording(old: Old) -> str:
    """The templates in examples/ stand in for upstream's, under their names."""
    path = old["data.format_prompt"]
    if not path or os.path.dirname(os.path.abspath(path)) != TEMPLATES:
        return ""
    return (
        f"{path} has this project's own wording, so prompts are others than theirs; for theirs, give the file of that "
        "name in a checkout of EasyR1 or PAPO as data.format_prompt"
    )


def _warmup(old: Old) -> Changes:
    """Upstream counts steps of the run, this framework optimizer updates."""
    steps = old["worker.actor.optim.lr_warmup_steps"]
    if steps is None:
        return {"worker.actor.optim.lr_warmup_ratio": old["worker.actor.optim.lr_warmup_ratio"]}
    updates = old["data.rollout_batch_size"] // old["worker.actor.global_batch_size"] * old["worker.actor.ppo_epochs"]
    return {"worker.actor.optim.lr_warmup_steps": steps * updates}


def _filter_workers(old: Old) -> Changes:
    key = "data.filter_overlong_prompts_workers"
    return {} if old[key] == 16 else {key: old[key]}  # upstream's default fits few machines; here it is the cores


def _mini_batch(old: Old) -> Changes:
    key = "data.mini_rollout_batch_size"
    return {key: old[key]} if old["algorithm.online_filtering"] else {}


def _val_batch(old: Old) -> Changes:
    key = "data.val_batch_size"
    return {key: old[key]} if old[key] and old[key] > 0 else {}


def _epochs(old: Old) -> Changes:
    episodes = old["trainer.total_episodes"]
    return {"trainer.total_epochs": old["trainer.total_epochs"] if episodes is None else episodes}


def _logger(names: str | list[str]) -> list[str]:
    given = ["jsonl" if name == "file" else name for name in ([names] if isinstance(names, str) else names)]
    return list(dict.fromkeys([*given, "jsonl"]))  # the run's curves are drawn from it


def _validation(old: Old) -> Changes:
    given = old["worker.rollout.val_override_config"] or {}
    known = ("n", "temperature", "top_p", "top_k")
    for name, value in given.items():
        if name not in known:
            key = f"worker.rollout.val_override_config.{name}"
            raise refusal(key, value, f"validation can change {', '.join(known)}")
    return {f"worker.rollout.val_override_config.{name}": value for name, value in given.items()}


def _reward_function(old: Old) -> Changes:
    function = old["worker.reward.reward_function"] or old["worker.reward.score_function"]
    if function and ":" not in function:
        function += ":main"
    return {"worker.reward.reward_function": function}


def _offload(role: str, old: Old) -> Changes:
    """Upstream's `offload` parks states between phases; its `enable_cpu_offload` lets the optimizer work there."""
    parked = old[f"worker.{role}.offload.offload_params"] or old[f"worker.{role}.offload.offload_optimizer"]
    always = old[f"worker.{role}.fsdp.enable_cpu_offload"]
    return {f"worker.{role}.fsdp.offload": "always" if always else "between_phases" if parked else "none"}


def _fsdp(role: str) -> list[Rule]:
    where = f"worker.{role}.fsdp"
    precise = {"bf16": "auto", "bfloat16": "auto", "fp32": "float32", "float32": "float32"}
    return [
        renamed(f"{where}.enable_full_shard", f"{where}.reshard_after_forward", True),
        Rule(
            {
                f"{where}.enable_cpu_offload": False,
                f"worker.{role}.offload.offload_params": False,
                f"worker.{role}.offload.offload_optimizer": False,
            },
            partial(_offload, role),
            alone=True,
        ),
        no_effect(f"{where}.enable_rank0_init", True, "rank 0 reads the weights and gives the others their shards"),
        no_effect(f"{where}.use_orig_params", False, "FSDP2 always does"),
        no_effect(f"{where}.torch_dtype", None, STORED),
        renamed(f"{where}.fsdp_size", f"{where}.shard_size", -1, lambda size: None if size == -1 else size),
        choice(f"{where}.mp_param_dtype", f"{where}.compute_dtype", "bf16", precise, "bf16 and fp32 are known"),
        only(f"{where}.mp_reduce_dtype", "fp32", ("fp32", "float32"), "gradients are reduced in float32"),
        no_effect(f"{where}.mp_buffer_dtype", "fp32", "buffers keep the model's own precision"),
        no_effect(f"worker.{role}.strategy", "fsdp", "it is FSDP2"),
    ]


DATA = [
    same("data.train_files", None),
    same("data.val_files", None),
    same("data.prompt_key", "prompt"),
    same("data.answer_key", "answer"),
    same("data.image_key", "images"),
    no_effect("data.video_key", "videos", "there are images and no videos"),
    no_effect("data.video_fps", 2.0, "there are images and no videos"),
    same("data.image_dir", None),
    same("data.max_prompt_length", 512),
    same("data.max_response_length", 512),
    same("data.rollout_batch_size", 512),
    Rule({"data.mini_rollout_batch_size": None}, _mini_batch, "one generation fills a step without online_filtering"),
    Rule({"data.val_batch_size": -1}, _val_batch, "all at once is not possible, and the size changes no result"),
    Rule(
        {"data.format_prompt": None},
        lambda old: {"data.format_prompt": old["data.format_prompt"]},
        differs=_wording,
    ),
    only(
        "data.override_chat_template", None, (None,), "put the template into the model's folder (chat_template.jinja)"
    ),
    same("data.shuffle", True),
    same("data.seed", 1),
    same("data.min_pixels", 262144),
    same("data.max_pixels", 4194304),
    same("data.filter_overlong_prompts", True),
    Rule({"data.filter_overlong_prompts_workers": 16}, _filter_workers),
]

ALGORITHM = [
    Rule({"algorithm.adv_estimator": "grpo", "worker.critic": {}}, _advantage),
    same("algorithm.gamma", 1.0),
    same("algorithm.lam", 1.0),
    Rule(
        {
            "algorithm.disable_kl": False,
            "algorithm.use_kl_loss": False,
            "algorithm.kl_penalty": "kl",
            "algorithm.kl_coef": 1e-3,
            "algorithm.kl_type": "fixed",
            "algorithm.kl_horizon": 10000.0,
            "algorithm.kl_target": 0.1,
        },
        _reference_kl,
        why="no reference model, no term ref_kl",
        plain={"algorithm.kl_coef": "algorithm.terms.ref_kl.coef"},
    ),
    same("algorithm.online_filtering", False),
    same("algorithm.filter_key", "overall"),
    same("algorithm.filter_low", 0.01),
    same("algorithm.filter_high", 0.99),
]

ACTOR = [
    Rule(
        {
            "worker.actor.loss_type": "default",
            "worker.actor.clip_ratio_low": 0.2,
            "worker.actor.clip_ratio_high": 0.3,
            "worker.actor.clip_ratio_dual": 3.0,
        },
        _policy,
        plain={f"worker.actor.{n}": f"algorithm.terms.policy.{n}" for n in ("clip_ratio_low", "clip_ratio_high")}
        | {"worker.actor.clip_ratio_dual": "algorithm.terms.policy.clip_ratio_dual"},
    ),
    # The entropy as a metric, as in every preset; nothing of the old names it.
    Rule({}, lambda old: {"/term@algorithm.terms.entropy": "entropy"}),
    same("worker.actor.global_batch_size", 256),
    renamed(f"{MICRO_BATCH}update", "worker.actor.max_tokens_per_micro_batch", 4, tokens_of_rows),
    no_effect(f"{MICRO_BATCH}experience", 16, "passes without gradient take four times max_tokens_per_micro_batch"),
    same("worker.actor.max_grad_norm", 1.0),
    Rule(
        {"worker.actor.loss_avg_mode": "token"},
        lambda old: {"worker.actor.loss_avg_mode": old["worker.actor.loss_avg_mode"]},
        differs=lambda old: (
            "every mean of a loss is taken over all rows of an update, theirs over the rows of each micro-batch of a "
            "rank, so that it depends on its size; that cannot be had here"
        ),
    ),
    same("worker.actor.ppo_epochs", 1),
    no_effect("worker.actor.padding_free", True, "how rows are padded changes no result"),
    no_effect(
        "worker.actor.dynamic_batching", False, "the loss does not depend on micro-batches; they have a fixed size"
    ),
    no_effect("worker.actor.use_torch_compile", True, "nothing is compiled"),
    only("worker.actor.ulysses_size", 1, (1,), "a sequence stays on one GPU"),
    only("worker.actor.ulysses_sequence_parallel_size", 1, (1,), "a sequence stays on one GPU"),
    same("worker.actor.model.model_path", None),
    only("worker.actor.model.tokenizer_path", None, (None,), "the tokenizer is the one in the model's folder"),
    only("worker.actor.model.override_config", {}, ({}, None), "change config.json in the model's folder"),
    same("worker.actor.model.enable_gradient_checkpointing", True),
    # Upstream's default is true; code from the hub runs here only where somebody asks for it.
    same("worker.actor.model.trust_remote_code", False),
    same("worker.actor.model.freeze_vision_tower", False),
    Rule(
        {
            f"{LORA}.rank": 0,
            f"{LORA}.alpha": 16,
            f"{LORA}.target_modules": "all-linear",
            f"{LORA}.exclude_modules": None,
        },
        _lora,
        differs=_lora_differs,
        plain={f"{LORA}.{name}": f"{LORA}.{name}" for name in ("rank", "alpha", "target_modules")},
    ),
    same("worker.actor.optim.lr", 1e-6),
    same("worker.actor.optim.betas", [0.9, 0.999]),
    same("worker.actor.optim.weight_decay", 1e-2),
    same("worker.actor.optim.strategy", "adamw"),
    Rule({"worker.actor.optim.lr_warmup_steps": None, "worker.actor.optim.lr_warmup_ratio": 0.0}, _warmup),
    renamed("worker.actor.optim.min_lr_ratio", "worker.actor.optim.min_lr_ratio", None, lambda ratio: ratio or 0.0),
    same("worker.actor.optim.lr_scheduler_type", "constant"),
    Rule(
        {"worker.actor.optim.warmup_style": None},
        lambda old: (
            {"worker.actor.optim.lr_scheduler_type": old["worker.actor.optim.warmup_style"]}
            if old["worker.actor.optim.warmup_style"]
            else {}
        ),
    ),
]

ROLLOUT = [
    # Upstream's defaults of these two suit one engine and one version of it: where a file is silent, ours hold.
    same("worker.rollout.name", "auto"),
    same("worker.rollout.enable_chunked_prefill", None),
    *(same(f"worker.rollout.{name}", default) for name, default in {
        "n": 1, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "seed": 1, "limit_images": 0,
        "gpu_memory_utilization": 0.6, "enforce_eager": False,
        "tensor_parallel_size": 2, "max_model_len": None, "max_num_batched_tokens": 8192,
    }.items()),
    no_effect("worker.rollout.dtype", "bf16", "the engine computes as the trainer does"),
    same("worker.rollout.ignore_eos", False),
    only("worker.rollout.stop_token_ids", None, (None,), "responses end at the model's own end tokens"),
    only("worker.rollout.stop_words", None, (None,), "responses end at the model's own end tokens"),
    no_effect("worker.rollout.disable_log_stats", True, "the engine is quiet"),
    no_effect("worker.rollout.disable_tqdm", False, "the engine is quiet"),
    Rule({"worker.rollout.val_override_config": {}}, _validation, "validation draws one response as training does"),
]  # fmt: skip

REWARD = [
    same("worker.reward.reward_type", "batch"),
    Rule({"worker.reward.reward_function": None, "worker.reward.score_function": None}, _reward_function),
    same("worker.reward.reward_function_kwargs", {}),
    only("worker.reward.skip_special_tokens", True, (True,), "responses are decoded without special tokens"),
    no_effect("worker.reward.num_cpus", 1, "worker.reward.num_workers says how many processes grade"),
]

TRAINER = [
    Rule({"trainer.total_epochs": 15, "trainer.total_episodes": None}, _epochs),
    same("trainer.max_steps", None),
    same("trainer.project_name", "easy_r1"),
    same("trainer.experiment_name", "demo"),
    renamed("trainer.logger", "trainer.logger", ["console", "wandb"], _logger),
    same("trainer.nnodes", 1),
    same("trainer.n_gpus_per_node", 8),
    renamed("trainer.max_try_make_batch", "trainer.max_try_make_batch", 20, lambda n: UNLIMITED if n < 0 else n),
    same("trainer.critic_warmup", 0),
    renamed("trainer.val_freq", "trainer.val_freq", -1, lambda steps: max(steps, 0)),
    same("trainer.val_before_train", True),
    same("trainer.val_only", False),
    same("trainer.val_generations_to_log", 0),
    renamed("trainer.save_freq", "trainer.save_freq", -1, lambda steps: max(steps, 0)),
    renamed("trainer.save_limit", "trainer.save_limit", -1, lambda number: max(number, 0)),
    same("trainer.save_model_only", False),
    renamed("trainer.save_best_checkpoint", "trainer.save_best", False, lambda best: "val/reward" if best else None),
    Rule(
        {"trainer.save_checkpoint_path": None},
        lambda old: {"trainer.output_dir": path} if (path := old["trainer.save_checkpoint_path"]) else {},
        "a run's folder is trainer.output_dir",
    ),
    Rule({"trainer.load_checkpoint_path": None, "trainer.find_last_checkpoint": True}, _resume),
    no_effect("worker.hybrid_engine", True, "where engines run follows from the GPUs"),
]

RULES = [*DATA, *ALGORITHM, *ACTOR, *_fsdp("actor"), *_fsdp("ref"), *ROLLOUT, *REWARD, *TRAINER]


def register_rules(rules: Iterable[Rule]) -> None:
    """Add a plugin's rows. They are applied behind verl's own, and so have the last word.

    Raises:
        ValueError: a key has a row already.
    """
    for rule in rules:
        for key in rule.defaults:
            if any(key in other.defaults for other in RULES):
                raise ValueError(f"the old key '{key}' has a row already")
        RULES.append(rule)
