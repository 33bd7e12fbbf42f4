"""Checks that no single dataclass can make: files that must exist, values that must fit together."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

from verl.algorithms.advantage import ADVANTAGES
from verl.algorithms.losses.compose import build_terms
from verl.algorithms.requirements import Requirements, find_requirements
from verl.config.config import Config
from verl.config.sizes import compute_sizes

logger = logging.getLogger(__name__)

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
    "worker.rollout.n",
    "worker.rollout.temperature",
    "worker.rollout.max_batch_size",
    "worker.rollout.sync_bucket_mb",
    "trainer.total_epochs",
    "trainer.nnodes",
    "trainer.n_gpus_per_node",
)


def validate(config: Config) -> Requirements:
    """Check the whole config before anything is built, and derive which passes the run needs.

    Raises:
        ValueError: names the key, its value and the way out.
        FileNotFoundError: a file that a key names does not exist.
    """
    _check_positive(config, POSITIVE)
    _check_values(config)
    _check_files(config)
    compute_sizes(config)
    ADVANTAGES[config.algorithm.adv_estimator]
    for name, term in config.algorithm.terms.items():
        term.check(f"algorithm.terms.{name}")
    for name, view in config.algorithm.views.items():
        view.check(f"algorithm.views.{name}")
    terms = build_terms(config.algorithm.terms)
    if not any(term.config.coef for term in terms):
        raise ValueError("algorithm.terms has no term with a coefficient above 0: there is nothing to train on")
    return find_requirements(terms, config.algorithm.views)


def log_requirements(config: Config, requirements: Requirements) -> None:
    """Say which terms and passes a run has, and warn of every term that trains nothing."""
    logger.info("loss: %s", ", ".join(f"{n} ({t.kind}, coef {t.coef:g})" for n, t in config.algorithm.terms.items()))
    passes = ["old log-probs"] * requirements.old + ["reference log-probs"] * requirements.reference
    passes += [f"log-probs of view '{view}' (no gradient)" for view in requirements.stored_views]
    logger.info("passes before the updates: %s", ", ".join(passes) or "none")
    for view in requirements.live_views:
        logger.info("view '%s' has its forward in the update: gradient flows through it", view)
    for view in sorted(set(config.algorithm.views) - set(requirements.views)):
        logger.warning("view '%s' is declared and no loss term reads it: it is not computed", view)
    for name in requirements.inert:
        logger.warning(
            "loss term '%s' has coefficient %g and can give no gradient: it reads only stored columns. It trains "
            "nothing. Set grad=true on its view, or its coefficient to 0 to keep it as a metric",
            name,
            config.algorithm.terms[name].coef,
        )


def _check_positive(config: Config, keys: Iterable[str]) -> None:
    for key in keys:
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        if value <= 0:
            raise ValueError(f"{key}={value}: a value above 0 is needed")


def _check_values(config: Config) -> None:
    rollout, trainer = config.worker.rollout, config.trainer
    if not 0 < rollout.top_p <= 1:
        raise ValueError(f"worker.rollout.top_p={rollout.top_p}: a value above 0 and at most 1 is needed")
    if rollout.top_k == 0 or rollout.top_k < -1:
        raise ValueError(f"worker.rollout.top_k={rollout.top_k}: -1 (all tokens) or a value above 0 is needed")
    if config.algorithm.adv_estimator == "grpo" and rollout.n < 2:
        raise ValueError("worker.rollout.n=1: grpo compares responses to one prompt, it needs 2 or more")
    if config.data.min_pixels > config.data.max_pixels:
        raise ValueError(f"data.min_pixels={config.data.min_pixels} is above data.max_pixels={config.data.max_pixels}")
    if trainer.max_steps is not None and trainer.max_steps < 1:
        raise ValueError(f"trainer.max_steps={trainer.max_steps}: 1 or more, or null for trainer.total_epochs")
    if trainer.val_freq < 0:
        raise ValueError(f"trainer.val_freq={trainer.val_freq}: 0 (only before and after) or more is needed")
    if config.data.val_files is None and (trainer.val_before_train or trainer.val_after_train or trainer.val_freq):
        raise ValueError(
            "data.val_files is not set: set it, or switch validation off with "
            "trainer.val_before_train=false trainer.val_after_train=false trainer.val_freq=0"
        )


def _check_files(config: Config) -> None:
    if config.data.format_prompt and not os.path.isfile(config.data.format_prompt):
        raise FileNotFoundError(
            f"data.format_prompt='{os.path.abspath(config.data.format_prompt)}': there is no such file"
        )
    if config.data.image_dir and not os.path.isdir(config.data.image_dir):
        raise FileNotFoundError(f"data.image_dir='{os.path.abspath(config.data.image_dir)}': there is no such folder")
