"""Rows of the API's table of arguments, and what each sets: from TRL's words to keys of this framework."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from verl.legacy.rule import Changes

TERMS, VIEW = "algorithm.terms", "algorithm.views.masked"
POLICY, OPTIM, ROLLOUT = f"{TERMS}.policy", "worker.actor.optim", "worker.rollout"
NO_DUAL_CLIP = 1e6  # a bound on the ratio that no ratio reaches


@dataclass(frozen=True)
class Argument:
    """One argument.

    Attributes:
        default: TRL's.
        here: The key that it sets, or in words what becomes of it; of one that is refused, the way out.
        apply: From all arguments to the keys that this one sets.
        allowed: The values that are not refused; None: all are taken.
    """

    default: Any
    here: str
    apply: Callable[[Any], Changes] = lambda given: {}
    allowed: tuple[Any, ...] | None = None


Table = dict[str, Argument]


def key(
    name: str, default: Any, *keys: str, convert: Callable[[Any], Any] = lambda value: value, note: str = ""
) -> Table:
    """The argument `name` is `keys` here; None leaves them at their defaults."""

    def apply(given: Any) -> Changes:
        value = getattr(given, name)
        return {} if value is None else dict.fromkeys(keys, convert(value))

    return {name: Argument(default, ", ".join(f"`{one}`" for one in keys) + note, apply)}


def choice(name: str, default: Any, target: str, choices: dict[Any, Any], way_out: str) -> Table:
    """The argument `name` is the key `target`, where only these values have a meaning."""

    def apply(given: Any) -> Changes:
        return {target: choices[getattr(given, name)]}

    words = ", ".join(f"{value}: {ours}" for value, ours in choices.items())
    return {name: Argument(default, f"`{target}` ({words}); {way_out}", apply, tuple(choices))}


def means(name: str, default: Any, here: str, apply: Callable[[Any], Changes] = lambda given: {}) -> Table:
    return {name: Argument(default, here, apply)}


def without_effect(why: str, **defaults: Any) -> Table:
    """Arguments whose value changes nothing here."""
    return {name: Argument(default, f"no effect: {why}") for name, default in defaults.items()}


def refused(way_out: str, *also: Any, **defaults: Any) -> Table:
    """Arguments of which only the default, and the values `also`, say what is the case here."""
    return {name: Argument(d, f"only {d!r}: {way_out}", allowed=(d, *also)) for name, d in defaults.items()}


def sizes(given: Any) -> SimpleNamespace:
    """TRL's batch sizes, which count responses, in prompts: `step`, `update`, and the updates of a step, epochs
    included. Raises ValueError where prompts would be cut."""
    n, each = given.num_generations, given.per_device_train_batch_size * given.ranks
    if given.generation_batch_size is not None and given.steps_per_generation is not None:
        raise ValueError("generation_batch_size and steps_per_generation say the same: give one of them")
    update = each * given.gradient_accumulation_steps
    step = given.generation_batch_size or each * (given.steps_per_generation or given.gradient_accumulation_steps)
    for what, responses in (("a step", step), ("an optimizer update", update)):
        if responses % n:
            raise ValueError(
                f"{what} has {responses} responses (per_device_train_batch_size x {given.ranks} rank(s) x "
                f"accumulation), which is no multiple of num_generations={n}: all responses to a prompt are trained on "
                "in one update; raise gradient_accumulation_steps"
            )
    if step % update:
        raise ValueError(f"a generation of {step} responses is no multiple of an update's {update}")
    return SimpleNamespace(step=step // n, update=update // n, updates=step // update * given.num_iterations)


def in_steps(given: Any, updates: float) -> int:
    """TRL's steps, which are optimizer updates, as steps here, each a generation and all its updates; rounded up."""
    return max(1, math.ceil(updates / sizes(given).updates))


def batches(given: Any) -> Changes:
    found = sizes(given)
    return {"data.rollout_batch_size": found.step, "worker.actor.global_batch_size": found.update}


def length(given: Any) -> Changes:
    if given.max_steps > 0:
        return {"trainer.max_steps": in_steps(given, given.max_steps)}
    if given.num_train_epochs != int(given.num_train_epochs):
        raise ValueError(f"num_train_epochs={given.num_train_epochs}: whole epochs, or max_steps")
    return {"trainer.total_epochs": int(given.num_train_epochs)}


def validation(given: Any) -> Changes:
    """Nothing without an evaluation: `evaluate()` asks for its own."""
    if given.eval_strategy == "no":
        return {
            "trainer.val_freq": 0,
            "trainer.val_before_train": given.eval_on_start,
            "trainer.val_after_train": False,
        }
    every = in_steps(given, given.eval_steps or given.logging_steps)
    return {"trainer.val_freq": every, "trainer.val_before_train": given.eval_on_start}


def saving(given: Any) -> Changes:
    if given.save_strategy == "no":
        return {"trainer.save_freq": 0}
    if given.save_strategy == "best":
        name = (given.metric_for_best_model or "reward").removeprefix("eval_")
        return {"trainer.save_freq": 0, "trainer.save_best": f"val/{name}"}
    return {"trainer.save_freq": in_steps(given, given.save_steps)}


def warmup(given: Any) -> Changes:
    if 0 < given.warmup_steps < 1:
        return {f"{OPTIM}.lr_warmup_ratio": given.warmup_steps}
    return {f"{OPTIM}.lr_warmup_steps": int(given.warmup_steps)}


def schedule(given: Any) -> Changes:
    names = {"linear": "linear", "cosine": "cosine", "cosine_with_min_lr": "cosine"}
    names |= dict.fromkeys(("constant", "constant_with_warmup"), "constant")
    name = str(getattr(given.lr_scheduler_type, "value", given.lr_scheduler_type))  # a text, or transformers' enum
    options = given.lr_scheduler_kwargs or {}
    if name not in names or set(options) - {"min_lr", "min_lr_rate"}:
        raise ValueError(
            f"lr_scheduler_type={name} with {options}: one of {', '.join(names)}, with min_lr or min_lr_rate"
        )
    least = options.get("min_lr_rate", options.get("min_lr", 0.0) / given.learning_rate)
    return {f"{OPTIM}.lr_scheduler_type": names[name], f"{OPTIM}.min_lr_ratio": least}


def policy(given: Any) -> Changes:
    """The policy loss: PPO's clip for each token, or for whole sequences (GSPO)."""
    kinds = {"token": "policy", "sequence": "gspo"}
    if given.importance_sampling_level not in kinds:
        raise ValueError(f"importance_sampling_level={given.importance_sampling_level}: token or sequence")
    kind = kinds[given.importance_sampling_level]
    high = given.epsilon if given.epsilon_high is None else given.epsilon_high
    changes = {f"/term@{POLICY}": kind, f"{POLICY}.clip_ratio_low": given.epsilon, f"{POLICY}.clip_ratio_high": high}
    if kind == "policy":
        changes[f"{POLICY}.clip_ratio_dual"] = NO_DUAL_CLIP if given.delta is None else given.delta
    elif given.delta is not None:
        raise ValueError("delta bounds the ratio of a token: with importance_sampling_level='sequence' leave it out")
    return changes | _engine_correction(given)


def _engine_correction(given: Any) -> Changes:
    modes = {f"{level}_{form}": level for level in ("token", "sequence") for form in ("mask", "truncate")}
    if given.vllm_importance_sampling_mode not in modes:
        raise ValueError(f"vllm_importance_sampling_mode={given.vllm_importance_sampling_mode}: {', '.join(modes)}")
    if not given.use_vllm or not given.vllm_importance_sampling_correction:
        return {}
    cap = given.vllm_importance_sampling_clip_max
    return {
        f"{POLICY}.tis": modes[given.vllm_importance_sampling_mode],
        f"{POLICY}.tis_cap": 2.0 if cap is None else cap,
    }


def perception(given: Any) -> Changes:
    """The masked view and the terms that read it; none where neither has a weight."""
    changes: Changes = {
        f"/term@{TERMS}.entropy": "entropy",
        f"{TERMS}.entropy.coef": given.der_loss_weight1,
        f"{TERMS}.entropy.estimator": "full",
    }
    if not given.perception_loss_weight and not given.der_loss_weight2:
        return changes
    kinds = {"random": "pixel", "patch": "block", "grid": "grid"}
    if given.mask_type not in kinds:
        raise ValueError(f"mask_type={given.mask_type}: one of {', '.join(kinds)}")
    return changes | {
        f"/view@{VIEW}": kinds[given.mask_type],
        f"{VIEW}.prob": given.mask_ratio,
        f"{VIEW}.grad": True,
        f"/term@{TERMS}.perception_kl": "perception_kl",
        f"{TERMS}.perception_kl.coef": given.perception_loss_weight,
        f"{TERMS}.perception_kl.cap": 0.2,
        f"/term@{TERMS}.masked_entropy": "entropy",
        f"{TERMS}.masked_entropy.view": "masked",
        f"{TERMS}.masked_entropy.coef": given.der_loss_weight2,
        f"{TERMS}.masked_entropy.estimator": "full",
    }


def reference(given: Any) -> Changes:
    return {f"/term@{TERMS}.ref_kl": "ref_kl", f"{TERMS}.ref_kl.coef": given.beta} if given.beta else {}


def model_options(given: Any) -> Changes:
    options = dict(given.model_init_kwargs or {})
    changes: Changes = {}
    if "attn_implementation" in options:
        changes["worker.actor.model.attn_implementation"] = options.pop("attn_implementation")
    if options.pop("trust_remote_code", given.trust_remote_code):
        changes["worker.actor.model.trust_remote_code"] = True
    dtypes = [str(options.pop(name)).removeprefix("torch.") for name in ("dtype", "torch_dtype") if name in options]
    if dtypes == ["bfloat16"]:
        changes[f"{OPTIM}.strategy"] = "adamw_bf16"
    if options or not set(dtypes) <= {"bfloat16", "float32", "auto", "None"}:
        left = ", ".join([*options, *dtypes])
        raise ValueError(f"model_init_kwargs has {left}: attn_implementation, dtype and trust_remote_code are known")
    return changes


def trackers(given: Any) -> Changes:
    names = [given.report_to] if isinstance(given.report_to, str) else list(given.report_to or [])
    return {"trainer.logger": ["console", "jsonl", *(name for name in names if name != "none")]}
