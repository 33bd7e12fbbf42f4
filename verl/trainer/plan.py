"""Plan of a run: everything that can be checked before a worker starts."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from verl.algorithms.losses.compose import LossTerm, build_terms
from verl.algorithms.requirements import Requirements, required_before_updates, requirements_of
from verl.config.algorithm import ViewStage
from verl.config.config import Config
from verl.config.option import check_options
from verl.config.sizes import Sizes, compute_sizes
from verl.data.collate import PromptCollator
from verl.data.dataset import PromptDataset
from verl.data.loader import train_loader, validation_loader
from verl.data.vision import VisionProcessor
from verl.models.families.base import Family
from verl.models.loading import outline
from verl.models.lora import adapter_parameters, find_targets
from verl.single_controller.resources import Layout, plan_layout
from verl.single_controller.rollout_group import choose_carrier
from verl.tracking import check_trackers
from verl.workers.reward.functions import load_functions
from verl.workers.rollout.engines import ENGINES, choose_engine

logger = logging.getLogger(__name__)

VALIDATION = "-validation"  # behind the name of the run's folder, for what trainer.val_only writes


@dataclass
class Plan:
    """A checked config, its data and its sizes."""

    config: Config
    terms: list[LossTerm]
    requirements: Requirements
    sizes: Sizes
    layout: Layout
    vision: VisionProcessor
    train_loader: StatefulDataLoader | None
    val_loader: StatefulDataLoader | None
    total_steps: int


def make_plan(config: Config) -> Plan:
    """Check the config and open its files. Raises ValueError or FileNotFoundError naming the key, file or row."""
    may_choose = config.worker.rollout.name == "auto"
    requirements = check(config)
    make_paths_absolute(config)
    if config.trainer.val_only:
        config.trainer.output_dir += VALIDATION
    load_functions(config.worker.reward)
    layout = plan_layout(config.trainer, config.worker.rollout)
    choose_carrier(config.worker.rollout.weight_sync, layout)
    if layout.device == "cpu":
        torch.set_num_threads(1)  # the driver's image processing runs beside the workers
    sizes = compute_sizes(config)
    if not config.trainer.val_only:
        logger.info("%s", sizes.in_words())
        log_requirements(config, requirements)
    data, model = config.data, config.worker.actor.model
    vision = VisionProcessor(model.model_path, data.min_pixels, data.max_pixels, model.trust_remote_code)
    check_engine(config, vision.family, layout.device, may_choose)
    check_vision(config, requirements, vision)
    check_reference_and_critic(config, requirements, vision)
    check_adapter(config, vision)
    collator = PromptCollator(vision.special.pad)
    train, val, total_steps = None, None, 0
    if not config.trainer.val_only:
        views = {*requirements.views, config.algorithm.rollout_view.view} - {None}
        columns = {config.algorithm.views[view].column for view in views} - {None}
        train_data = PromptDataset(data.train_files, "data.train_files", data, vision, sorted(columns))
        size = data.mini_rollout_batch_size or data.rollout_batch_size
        train = train_loader(train_data, size, data.shuffle, data.seed, data.num_workers, collator)
        per_epoch = max(1, len(train) * size // data.rollout_batch_size)
        total_steps = config.trainer.max_steps or config.trainer.total_epochs * per_epoch
        logger.info("%d steps, %d per epoch", total_steps, per_epoch)
    if data.val_files is not None:
        val_data = PromptDataset(data.val_files, "data.val_files", data, vision)
        val = validation_loader(val_data, data.val_batch_size, data.num_workers, collator)
    return Plan(
        config, build_terms(config.algorithm.terms), requirements, sizes, layout, vision, train, val, total_steps
    )


def check_engine(config: Config, family: Family, device: str, may_choose: bool) -> None:
    """Raise ValueError for a rollout engine that cannot serve the run, or take `hf` where the choice is free."""
    rollout = config.worker.rollout
    if (reason := ENGINES[rollout.name].unfit(config, family, device)) is None:
        return
    if not may_choose:
        raise ValueError(reason)
    logger.info("rollout engine: hf, not %s: %s", rollout.name, reason)
    rollout.name = "hf"
    choose_engine(rollout)  # raises ValueError where the run needs what only the other has


def check_vision(config: Config, requirements: Requirements, vision: VisionProcessor) -> None:
    """Raise ValueError for what a text-only model has no use for; warn of squares that are not the tower's patches."""
    if vision.family.has_vision:
        for view in requirements.views:
            options, patch = config.algorithm.views[view], vision.family.patch_size(vision.config)
            if options.stage == ViewStage.resized and getattr(options, "patch_size", patch) % patch:
                logger.warning(
                    "algorithm.views.%s has stage=resized and patch_size=%d, and %s has patches of %d pixels: squares "
                    "will not be patches; set patch_size=%d",
                    view,
                    options.patch_size,
                    vision.family.name,
                    patch,
                    patch,
                )
        return
    reads = f"worker.actor.model.model_path holds a {vision.family.name} model, which reads text only"
    if requirements.views:
        raise ValueError(
            f"algorithm.views.{requirements.views[0]} shows other images, and {reads}: choose a vision model, or a "
            "preset without views, such as grpo or dapo"
        )
    if config.worker.actor.model.freeze_vision_tower:
        raise ValueError(f"worker.actor.model.freeze_vision_tower=true: {reads}; leave it out")


def check_reference_and_critic(config: Config, requirements: Requirements, vision: VisionProcessor) -> None:
    """Raise ValueError where the reference or the critic is a model that would read the actor's tokens or images as
    something else."""
    roles = {"ref": requirements.reference, "critic": requirements.critic}
    for role in (role for role, used in roles.items() if used):
        path = getattr(config.worker, role).model_path
        if path is None:
            continue
        own = VisionProcessor(
            path, config.data.min_pixels, config.data.max_pixels, config.worker.actor.model.trust_remote_code
        )
        differs = {
            "model type": own.family != vision.family,
            "vocabulary": own.tokenizer.get_vocab() != vision.tokenizer.get_vocab(),
            "image token": own.special.banned != vision.special.banned,
            "image processing": vision.family.has_vision
            and own.family.has_vision
            and own.image_processor.to_dict() != vision.image_processor.to_dict(),
        }
        for what in (what for what, differ in differs.items() if differ):
            raise ValueError(
                f"worker.{role}.model_path='{path}': its {what} is not that of worker.actor.model.model_path, whose "
                "tokens and images it would read; choose a model of the same kind"
            )


def check_adapter(config: Config, vision: VisionProcessor) -> None:
    """Say what LoRA trains; raise ValueError for targets that the model does not have."""
    lora = config.worker.actor.model.lora
    if lora.rank and not config.trainer.val_only:
        inner = outline(vision.config)
        layers, trained = len(find_targets(inner, lora)), adapter_parameters(inner, lora)
        where = "both towers" if lora.vision_tower else "the language model"
        text = "LoRA of rank %d on %d linear layers of %s: %.2fM parameters to train"
        logger.info(text, lora.rank, layers, where, trained / 1e6)


def make_paths_absolute(config: Config) -> None:
    """Replace relative paths that workers open: a worker may start in another folder than the driver."""
    worker = config.worker
    actor, ref, critic = worker.actor.model, worker.ref, worker.critic
    actor.model_path = _absolute(actor.model_path)
    ref.model_path = ref.model_path and _absolute(ref.model_path)
    critic.model_path = critic.model_path and _absolute(critic.model_path)
    for part in worker.reward.functions().values():
        part.reward_function = _absolute(part.reward_function)


def _absolute(path: str) -> str:
    """`path` as it is, where its part before a colon is no file or folder here (a hub name, or a mistake)."""
    return os.path.abspath(path) if os.path.exists(path.rpartition(":")[0] or path) else path


def check(config: Config) -> Requirements:
    """Check the config and every name in it, and derive which passes the run needs.

    Raises:
        ValueError: names the key, its value and the way out.
        FileNotFoundError: a file that a key names does not exist.
    """
    check_options(config)
    sizes = compute_sizes(config)
    rollout = config.worker.rollout
    rollout.name = choose_engine(rollout)
    check_trackers(config.trainer.logger)
    before = required_before_updates(config.algorithm)
    if config.trainer.critic_warmup and not any("values" in columns for columns in before.values()):
        raise ValueError(
            f"trainer.critic_warmup={config.trainer.critic_warmup}: there is no critic to warm up; "
            "algorithm.adv_estimator=gae has one"
        )
    if rollout.n < 2 and any("group" in columns for columns in before.values()):
        raise ValueError(
            f"worker.rollout.n={rollout.n}: {config.algorithm.adv_estimator} compares responses to one prompt, it "
            "needs 2 or more"
        )
    return requirements_of(config.algorithm, sizes.updates_per_step)


def log_requirements(config: Config, requirements: Requirements) -> None:
    """Say which terms and passes a run has, and warn of every term that trains nothing."""
    logger.info("loss: %s", ", ".join(f"{n} ({t.kind}, coef {t.coef:g})" for n, t in config.algorithm.terms.items()))
    passes = ["old log-probs"] * requirements.old_pass
    kind = "reference log-probs" + " (the actor without its adapter)" * config.worker.actor_is_reference
    passes += [kind] * requirements.reference
    passes += ["values"] * requirements.critic
    passes += [f"log-probs of view '{view}' (no gradient)" for view in requirements.stored_views]
    logger.info("passes before the updates: %s", ", ".join(passes) or "none")
    for view in requirements.live_views:
        logger.info("view '%s' has its forward in the update: gradient flows through it", view)
    if (view := config.algorithm.rollout_view).view is not None:
        logger.info("%.0f %% of each prompt's responses are drawn under the view '%s'", 100 * view.share, view.view)
    for view in sorted(set(config.algorithm.views) - {*requirements.views, config.algorithm.rollout_view.view}):
        logger.warning("view '%s' is declared and no loss term reads it: it is not computed", view)
    for name in requirements.inert:
        logger.warning(
            "loss term '%s' has coefficient %g and can give no gradient: it reads only stored columns. It trains "
            "nothing. Set grad=true on its view, or its coefficient to 0 to keep it as a metric",
            name,
            config.algorithm.terms[name].coef,
        )
