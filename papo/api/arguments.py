"""The table of the API's arguments: names and defaults of TRL 1.7.1's PAPOConfig, and what each is here.

It is also the documentation (in examples/python_api.md) and the check: a value that has no meaning here is refused with
the way out.
"""

from __future__ import annotations

from papo.api.rules import (
    OPTIM,
    POLICY,
    ROLLOUT,
    TERMS,
    VIEW,
    Table,
    batches,
    choice,
    key,
    length,
    means,
    model_options,
    perception,
    policy,
    reference,
    refused,
    saving,
    schedule,
    trackers,
    validation,
    warmup,
    without_effect,
)

OBJECTIVE: Table = {
    **choice(
        "loss_type",
        "dapo",
        "worker.actor.loss_avg_mode",
        {"grpo": "seq", "dapo": "token"},
        "as in TRL's PAPOTrainer, which has these two. TRL's dapo is this mean alone; clip-higher is epsilon_high, "
        "dynamic sampling `algorithm.online_filtering=true`",
    ),
    **means(
        "perception_loss_weight",
        0.1,
        f"`{TERMS}.perception_kl.coef`, k3 with `cap=0.2`, of a live view (`{VIEW}.grad=true`), as TRL computes it; "
        "averaged over the responses' tokens, where TRL took padding in",
        perception,
    ),
    **means("mask_ratio", 0.3, f"`{VIEW}.prob`"),
    **means(
        "mask_type",
        "random",
        "the kind of view: random is `pixel`, patch is `block`, grid is `grid`. TRL's patch and grid changed "
        "nothing on Qwen's flat pixels; here the picture itself is masked, in black. The paper's mask is "
        "`+view@algorithm.views.masked=random_patch`",
    ),
    **means(
        "der_loss_weight1",
        0.03,
        f"`{TERMS}.entropy.coef`, the exact entropy; over the responses' tokens, where TRL took padding in",
    ),
    **means("der_loss_weight2", 0.03, f"`{TERMS}.masked_entropy.coef`, likewise"),
    **means("beta", 0.0, f"`{TERMS}.ref_kl.coef`; 0: no reference model", reference),
    **means("epsilon", 0.2, f"`{POLICY}.clip_ratio_low`", policy),
    **means("epsilon_high", None, f"`{POLICY}.clip_ratio_high`; None: epsilon"),
    **means("delta", None, f"`{POLICY}.clip_ratio_dual`, which is the same bound; None: none"),
    **means(
        "importance_sampling_level", "token", f"the kind of term of `{POLICY}`: token is `policy`, sequence is `gspo`"
    ),
    **choice(
        "scale_rewards",
        "group",
        "algorithm.adv_estimator",
        {"group": "grpo", "none": "dr_grpo", True: "grpo", False: "dr_grpo"},
        "for batch take `algorithm.adv_estimator=reinforce_plus_plus_baseline`",
    ),
    **key("num_iterations", 1, "worker.actor.ppo_epochs"),
    **means("reward_weights", None, "weights of reward_funcs, in order; None: 1 each"),
    **refused("rewards are added up, then normalised", multi_objective_aggregation="sum_then_normalize"),
    **refused(
        "`algorithm.overlong_buffer` is a penalty for responses that come near their limit",
        mask_truncated_completions=False,
    ),
    **refused("the reference stays what it is", sync_ref_model=False),
    **without_effect("the reference is not synchronised", ref_model_mixup_alpha=0.6, ref_model_sync_steps=512),
    **refused(
        "every token counts; `vppo` is a preset that chooses tokens, by their dependence on the image",
        top_entropy_quantile=1.0,
    ),
    **refused(
        "truncated importance weights correct for the engine (vllm_importance_sampling_correction)",
        off_policy_mask_threshold=None,
    ),
    **refused("the k3 estimate of the KL is not reweighted", use_bias_correction_kl=False),
    **without_effect(
        "it belongs to a loss_type that PAPO has not",
        sapo_temperature_neg=1.05,
        sapo_temperature_pos=1.0,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
    ),
}

SAMPLING: Table = {
    **key("num_generations", 8, f"{ROLLOUT}.n"),
    **key("max_completion_length", 256, "data.max_response_length"),
    **key("temperature", 1.0, f"{ROLLOUT}.temperature"),
    **key("top_p", 1.0, f"{ROLLOUT}.top_p"),
    **key("top_k", 0, f"{ROLLOUT}.top_k", convert=lambda k: k or -1, note=" (0, all, is -1)"),
    **means(
        "num_generations_eval",
        None,
        f"`{ROLLOUT}.val_override_config.n`; None: num_generations",
        lambda g: {f"{ROLLOUT}.val_override_config.n": g.num_generations_eval or g.num_generations},
    ),
    **refused(
        "sampling has temperature, top_p and top_k; what else changes the policy would have to change its log-probs"
        " too",
        min_p=None,
        repetition_penalty=1.0,
    ),
    **refused("`+worker.rollout.engine_kwargs.NAME=value` reaches vLLM", None, {}, generation_kwargs=None),
    **refused("the chat template is the model's own", {}, chat_template_kwargs=None),
    **choice(
        "use_vllm",
        False,
        f"{ROLLOUT}.name",
        {False: "hf", True: "vllm"},
        "hf is this framework's engine on transformers",
    ),
    **refused(
        "engines are started by the run, on its GPUs or on `worker.rollout.dedicated_gpus` of their own",
        vllm_mode="colocate",
        vllm_server_base_url=None,
    ),
    **without_effect(
        "there is no server",
        vllm_server_host="0.0.0.0",
        vllm_server_port=8000,
        vllm_server_timeout=240.0,
        vllm_group_port=51216,
    ),
    **key("vllm_gpu_memory_utilization", 0.3, f"{ROLLOUT}.gpu_memory_utilization"),
    **key("vllm_max_model_length", None, f"{ROLLOUT}.max_model_len"),
    **key("vllm_tensor_parallel_size", 1, f"{ROLLOUT}.tensor_parallel_size"),
    **without_effect("engines on the trainer's GPUs always sleep while it works", vllm_enable_sleep_mode=False),
    **refused("vLLM's own models run", vllm_model_impl="vllm"),
    **refused("responses are not constrained", vllm_structured_outputs_regex=None),
    **means("vllm_importance_sampling_correction", True, f"`{POLICY}.tis`, with use_vllm"),
    **means(
        "vllm_importance_sampling_mode",
        "sequence_mask",
        f"`{POLICY}.tis`: token or sequence. Weights above the cap are cut down to it, also where TRL's _mask drops "
        "the response",
    ),
    **means("vllm_importance_sampling_clip_max", 3.0, f"`{POLICY}.tis_cap`"),
    **refused("weights are bounded above alone", vllm_importance_sampling_clip_min=None),
    **refused("its new name is vllm_importance_sampling_clip_max", vllm_importance_sampling_cap=None),
    **refused(
        "`worker.rollout.name` chooses the engine: hf or vllm",
        use_transformers_continuous_batching=False,
        use_transformers_paged=False,
        transformers_continuous_batching_config=None,
        cache_implementation=None,
    ),
    **refused("tools are not called during a response", max_tool_calling_iterations=None),
}

LENGTH: Table = {
    **means(
        "per_device_train_batch_size",
        8,
        "with the accumulation, responses per update: `worker.actor.global_batch_size` x num_generations. How many "
        "run through the model at a time is `worker.actor.max_tokens_per_micro_batch`, and changes no gradient",
        batches,
    ),
    **means("gradient_accumulation_steps", 1, "see per_device_train_batch_size"),
    **means("generation_batch_size", None, "responses per step: `data.rollout_batch_size` x num_generations"),
    **means("steps_per_generation", None, "the same, as a multiple of per_device_train_batch_size x ranks"),
    **means(
        "max_steps",
        -1,
        "`trainer.max_steps`. A step here is a generation with all its updates; TRL counts updates, which are "
        "converted, rounded up, here and in eval_steps and save_steps",
        length,
    ),
    **means("num_train_epochs", 3.0, "`trainer.total_epochs`"),
    **key("shuffle_dataset", True, "data.shuffle"),
    **key("seed", 42, "trainer.seed"),
    **key("data_seed", None, "data.seed"),
    **key("dataloader_num_workers", 0, "data.num_workers"),
    **without_effect(
        "the driver draws whole batches, in an order by its seed",
        dataloader_drop_last=False,
        dataloader_pin_memory=True,
        dataloader_persistent_workers=False,
        dataloader_prefetch_factor=None,
        dataloader_multiprocessing_context=None,
        dataloader_in_order=True,
        length_column_name="length",
        label_names=None,
    ),
    **refused("rows are drawn at random, or in order with shuffle_dataset=False", train_sampling_strategy="random"),
    **refused("a run goes on at the very prompt", ignore_data_skip=False),
    **without_effect("every column reaches the rewards", remove_unused_columns=False),
    **without_effect("rows are packed without padding", pad_to_multiple_of=None),
}

OPTIMIZATION: Table = {
    **key("learning_rate", 1e-6, f"{OPTIM}.lr"),
    **means(
        "lr_scheduler_type",
        "linear",
        f"`{OPTIM}.lr_scheduler_type`: linear, cosine, cosine_with_min_lr, constant, constant_with_warmup",
        schedule,
    ),
    **means("lr_scheduler_kwargs", None, f"`{OPTIM}.min_lr_ratio` (min_lr, min_lr_rate)"),
    **means("warmup_steps", 0, f"`{OPTIM}.lr_warmup_steps`; below 1, `{OPTIM}.lr_warmup_ratio`", warmup),
    **key("weight_decay", 0.0, f"{OPTIM}.weight_decay"),
    **means("adam_beta1", 0.9, f"`{OPTIM}.betas`", lambda g: {f"{OPTIM}.betas": [g.adam_beta1, g.adam_beta2]}),
    **means("adam_beta2", 0.999, f"`{OPTIM}.betas`"),
    **key("adam_epsilon", 1e-8, f"{OPTIM}.eps"),
    **key("max_grad_norm", 1.0, "worker.actor.max_grad_norm"),
    **refused(
        "AdamW is the optimizer; `worker.actor.optim.strategy=adamw_bf16` takes 12 bytes a weight instead of 16",
        "adamw_torch",
        optim="adamw_torch_fused",
    ),
    **refused("AdamW has all its options as arguments", None, "", optim_args=None),
    **refused("one optimizer has all weights", optim_target_modules=None),
    **means(
        "bf16",
        None,
        "`worker.actor.fsdp.compute_dtype`: True bfloat16, False float32, None auto (bfloat16 on GPUs)",
        lambda g: {} if g.bf16 is None else {"worker.actor.fsdp.compute_dtype": "bfloat16" if g.bf16 else "float32"},
    ),
    **refused("bf16 needs no loss scaling", fp16=False, fp16_full_eval=False),
    **without_effect("validation has the precision of training", bf16_full_eval=False, tf32=None),
    **key("gradient_checkpointing", True, "worker.actor.model.enable_gradient_checkpointing"),
    **refused(
        "checkpoints of activations are the non-reentrant ones",
        {"use_reentrant": False},
        gradient_checkpointing_kwargs=None,
    ),
    **means(
        "model_init_kwargs",
        None,
        f"attn_implementation, trust_remote_code, and dtype (bfloat16: `{OPTIM}.strategy=adamw_bf16`)",
        model_options,
    ),
    **means("trust_remote_code", False, "`worker.actor.model.trust_remote_code`"),
    **without_effect(
        "models are trained as in evaluation, so that a policy that is updated is the one that answered",
        disable_dropout=False,
    ),
    **without_effect(
        "log-probs are always computed in float32, a few logits at a time",
        cast_lm_head_to_fp32=False,
        use_liger_kernel=False,
        liger_kernel_config=None,
    ),
    **without_effect("no mixture of experts is among the families", router_aux_loss_coef=0.001),
    **refused("the model is not compiled", torch_compile=False),
    **without_effect("the model is not compiled", torch_compile_backend=None, torch_compile_mode=None),
    **refused("it has no place in this objective", neftune_noise_alpha=None, label_smoothing_factor=0.0),
    **without_effect("the trainer frees what others need", torch_empty_cache_steps=None, use_cache=False),
    **refused(
        "`worker.actor.max_tokens_per_micro_batch` bounds memory, and `papo doctor` says how much it takes",
        auto_find_batch_size=False,
    ),
}

MACHINES: Table = {
    **means("use_cpu", False, "`trainer.device=cpu`", lambda g: {"trainer.device": "cpu"} if g.use_cpu else {}),
    **refused(
        "FSDP2 shards the model over `trainer.n_gpus_per_node` x `trainer.nnodes` ranks; its options are "
        "`worker.actor.fsdp.*`",
        False,
        "",
        [],
        {},
        deepspeed=None,
        fsdp=None,
        fsdp_config=None,
        accelerator_config=None,
        parallelism_config=None,
    ),
    **without_effect(
        "Ray starts the ranks",
        ddp_find_unused_parameters=None,
        ddp_bucket_cap_mb=None,
        ddp_broadcast_buffers=None,
        ddp_static_graph=None,
        ddp_backend=None,
        ddp_timeout=1800,
        local_rank=-1,
        ds3_gather_for_generation=True,
        average_tokens_across_devices=True,
    ),
    **refused("a run is the same from the same seed anyway", full_determinism=False),
}

RECORDS: Table = {
    **means("output_dir", None, "`trainer.output_dir`; None: the model's name with -PAPO"),
    **means("run_name", None, "`trainer.experiment_name`; None: the folder's name"),
    **means("project", "huggingface", "`trainer.project_name`", lambda g: {"trainer.project_name": g.project}),
    **means(
        "report_to", "none", "`trainer.logger`, beside console and jsonl: tensorboard, wandb, mlflow, swanlab", trackers
    ),
    **means(
        "logging_steps",
        10,
        "every how many steps on_log is called and state.log_history grows; metrics.jsonl has every step",
    ),
    **means("logging_first_step", False, "the same for the first step"),
    **refused("steps are logged", logging_strategy="steps"),
    **without_effect(
        "the run's folder has everything",
        logging_nan_inf_filter=True,
        log_on_each_node=True,
        include_num_input_tokens_seen="no",
        log_level="passive",
        log_level_replica="warning",
        disable_tqdm=None,
        skip_memory_metrics=True,
        debug="",
        trackio_space_id=None,
        trackio_bucket_id=None,
        trackio_static_space_id=None,
    ),
    **without_effect(
        "samples.jsonl has some responses of every step (num_completions_to_print)",
        log_completions=False,
        log_unique_prompts=False,
    ),
    **key("num_completions_to_print", None, "trainer.samples_per_step"),
    **refused("samples.jsonl is what to upload", log_completions_hub_repo=None),
    **means(
        "eval_strategy",
        "no",
        "no: `trainer.val_freq=0`; steps: `trainer.val_freq` from eval_steps, and once after the last step",
        validation,
    ),
    **means("eval_steps", None, "`trainer.val_freq`; None: logging_steps"),
    **means("eval_on_start", False, "`trainer.val_before_train`"),
    **refused("validation begins at once", eval_delay=0),
    **without_effect(
        "engines make batches of their own",
        per_device_eval_batch_size=8,
        eval_accumulation_steps=None,
        eval_do_concat_batches=True,
        eval_use_gather_object=False,
        prediction_loss_only=False,
        include_for_metrics=[],
        batch_eval_metrics=False,
        do_train=False,
        do_eval=False,
        do_predict=False,
    ),
    **means(
        "save_strategy", "steps", "no: `trainer.save_freq=0`; steps: from save_steps; best: `trainer.save_best`", saving
    ),
    **means("save_steps", 500, "`trainer.save_freq`"),
    **means(
        "save_total_limit",
        None,
        "`trainer.save_limit`; None: all",
        lambda g: {"trainer.save_limit": g.save_total_limit or 0},
    ),
    **key("save_only_model", False, "trainer.save_model_only"),
    **means("metric_for_best_model", None, "with save_strategy='best', `trainer.save_best=val/NAME`; None: reward"),
    **refused("the larger value is the better one", True, greater_is_better=None),
    **refused("save_strategy='best' keeps it, and `papo export --best` writes it", load_best_model_at_end=False),
    **without_effect(
        "checkpoints have all that is needed",
        save_on_each_node=False,
        restore_callback_states_from_checkpoint=False,
        enable_jit_checkpoint=False,
    ),
    **means("resume_from_checkpoint", None, "as the argument of train()"),
    **refused("call push_to_hub() after train()", push_to_hub=False),
    **means("hub_model_id", None, "the repository of push_to_hub(); None: the folder's name"),
    **refused("the environment variable HF_TOKEN has it", hub_token=None),
    **refused("a new repository is private", True, hub_private_repo=None),
    **refused("push_to_hub() writes to the main branch", hub_revision=None),
    **without_effect("push_to_hub() is called by you", hub_strategy="every_save", hub_always_push=False),
}

SECTIONS = {
    "Objective": OBJECTIVE,
    "Sampling": SAMPLING,
    "Batches and length": LENGTH,
    "Optimization": OPTIMIZATION,
    "Machines": MACHINES,
    "Records": RECORDS,
}
ARGUMENTS: Table = {name: one for section in SECTIONS.values() for name, one in section.items()}
