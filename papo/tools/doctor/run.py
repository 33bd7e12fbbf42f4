"""Checks of a run: keys that fit together, model, data, reward."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from papo.tools.doctor.case import Case, Finding, error, in_gib, in_short, load_hf_config, ok, warning
from papo.tools.doctor.machine import disk_usage
from papo.tools.doctor.packages import installed_version
from papo.tools.doctor.weights import Weights, inspect

if TYPE_CHECKING:
    from verl.models.families.base import Family

KERNELS = ("flash-linear-attention", "causal-conv1d")
SAMPLED_ROWS = 64  # all over a file; their prompts are counted, ...
ENCODED_ROWS = 4  # ... and of the first of them also the images decoded


def check_config(case: Case) -> Iterator[Finding]:
    """Check what the trainer checks before it opens a file."""
    from verl.config.sizes import compute_sizes
    from verl.trainer.plan import check, check_engine

    config, rollout = case.config, case.config.worker.rollout
    elsewhere = case.imagined and rollout.name in ("auto", "vllm")
    if elsewhere:
        rollout.name = "auto"  # vLLM is asked for there, and need not be installed here
    may_choose = rollout.name == "auto"
    try:
        check(config)
        if elsewhere:
            rollout.name = "vllm"
        if family := _family(case):
            check_engine(config, family, case.device, may_choose)
        yield ok("config", f"all keys fit together; rollout engine {rollout.name}")
    except (ValueError, FileNotFoundError) as reason:
        yield error("config", str(reason))
    try:
        for line in compute_sizes(config).in_words().splitlines():
            yield ok("batch", line)
    except ValueError:
        return  # the check above has said it
    for name in case.requirements.inert:
        text = f"loss term '{name}' can give no gradient: it reads only stored columns"
        yield warning("loss", text, f"set grad=true on its view, or algorithm.terms.{name}.coef=0")


def _family(case: Case) -> Family | None:
    """The family of the actor's model; None where that does not load, which check_model says."""
    from verl.models.families import family_of

    try:
        return family_of(case.hf_config)
    except (ValueError, OSError):
        return None


def check_devices(case: Case) -> Iterator[Finding]:
    """Check that there are enough GPUs, and that they can be shared out."""
    from verl.single_controller.resources import plan_replicas

    trainer, rollout = case.config.trainer, case.config.worker.rollout
    ranks, there = trainer.nnodes * trainer.n_gpus_per_node, len(case.gpus)
    if case.device == "cpu":
        if rollout.dedicated_gpus:
            text = f"worker.rollout.dedicated_gpus={rollout.dedicated_gpus}, and this run is on CPU"
            yield error("devices", text, "set it to 0")
        else:
            yield ok("devices", f"CPU: {ranks} training rank(s), {rollout.data_parallel_size or 1} engine(s)")
        return
    if not there:
        yield error("devices", "trainer.device=cuda, and there is no GPU", "trainer.device=auto")
        return
    wanted = trainer.n_gpus_per_node + (rollout.dedicated_gpus if trainer.nnodes == 1 else 0)
    if wanted > there:
        text = f"trainer.n_gpus_per_node={trainer.n_gpus_per_node}"
        if rollout.dedicated_gpus:
            text += f" and worker.rollout.dedicated_gpus={rollout.dedicated_gpus}"
        fix = f"trainer.n_gpus_per_node={max(1, there - rollout.dedicated_gpus)}"
        yield error("devices", f"{text}: {wanted} GPUs are wanted, {there} are there", fix)
    try:
        replicas = plan_replicas(ranks, rollout)
    except ValueError as reason:
        yield error("devices", str(reason))
        return
    width = f" over {rollout.tensor_parallel_size} GPUs each" if rollout.tensor_parallel_size > 1 else ""
    if wanted <= there:
        yield ok("devices", f"{ranks} training rank(s), one per GPU; {replicas} engine(s){width}")


def check_model(case: Case) -> Iterator[Finding]:
    """config.json, processor and weights of the actor's model, and of the reference's where it is another one."""
    model, ref = case.config.worker.actor.model, case.config.worker.ref
    yield from _check_folder(case, model.model_path)
    try:
        case.vision  # noqa: B018 - loading it is the check
        yield ok("processor", "tokenizer, image processor and chat template load")
    except (ValueError, OSError) as reason:
        yield error(
            "processor", str(reason).splitlines()[0], "copy the model's folder whole: its *.json and *.jinja files too"
        )
    if ref.model_path and case.requirements.reference:
        yield from _check_folder(case, ref.model_path)


def check_adapter(case: Case) -> Iterator[Finding]:
    """The layers that LoRA names are there."""
    from papo.tools.doctor.memory import billions
    from papo.tools.doctor.shape import shape_of

    lora = case.config.worker.actor.model.lora
    if not lora.rank or case.config.trainer.val_only:
        return
    hf_config = case.hf_config
    try:
        trained = shape_of(hf_config, lora).adapter
        yield ok("adapter", f"LoRA of rank {lora.rank}: {billions(trained)} parameters to train")
    except ValueError as reason:
        yield error("adapter", str(reason))


def _check_folder(case: Case, path: str) -> Iterator[Finding]:
    from papo.tools.doctor.memory import billions
    from papo.tools.doctor.shape import shape_of

    try:
        shape = shape_of(load_hf_config(path, case.config))
    except (ValueError, FileNotFoundError) as reason:
        yield error("model", str(reason).splitlines()[0], "name a folder of a model, or its name on the hub")
        return
    yield ok(
        "model", f"{path}: {billions(shape.parameters)} parameters, {billions(shape.vision_parameters)} of them vision"
    )
    missing = [package for package in KERNELS if not installed_version(package)]
    if shape.state and missing and case.device == "cuda" and not case.imagined:
        text = "its linear attention would run in plain torch, more than ten times slower than by the kernels"
        yield warning("model", text, f"pip install {' '.join(missing)}")
    folder = path if os.path.isdir(path) else _hub_folder(path)
    if folder is None:
        _, free = disk_usage(_hub_cache())
        text = (
            f"not downloaded yet: about {in_gib(2 * shape.parameters)}, and {in_gib(free)} are free in {_hub_cache()}"
        )
        finding = warning if free > 2 * shape.parameters else error
        yield finding("weights", text, f"hf download {path} (HF_HOME chooses the disk)")
        return
    try:
        yield from _check_weights(inspect(folder), shape.parameters, shape.head, shape.tied)
    except (ValueError, FileNotFoundError) as reason:
        yield error("weights", str(reason), "download or copy the model again")


def _check_weights(weights: Weights, parameters: int, head: int, tied: bool) -> Iterator[Finding]:
    found = sum(weights.elements.values())
    if found not in (parameters, parameters + head if tied else parameters):
        text = f"the files hold {found:,} values, and config.json describes {parameters:,}: they do not belong together"
        yield error("weights", text, "download or copy the model again")
    else:
        yield ok("weights", f"{weights.files} file(s), {in_gib(weights.bytes)}, complete")


def _hub_cache() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    return HF_HUB_CACHE


def _hub_folder(name: str) -> str | None:
    """The model's folder in the hub's cache; None where it has no weights of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    return folder if any("safetensors" in file for file in os.listdir(folder)) else None


def check_output(case: Case) -> Iterator[Finding]:
    """Room for the model that the run leaves and for its checkpoints, with the optimizer's states."""
    from papo.tools.doctor.memory import saved_bytes

    trainer = case.config.trainer
    if trainer.val_only:
        return
    try:
        model, checkpoint = saved_bytes(case)
    except ValueError:
        return  # the checks of config and model have said it
    # One more than are kept: the oldest goes when the newest is whole.
    kept = trainer.save_limit + 1 + bool(trainer.save_best) if trainer.save_limit else 2
    count = kept if trainer.save_freq or trainer.save_best else 0
    needed = model * trainer.save_model + checkpoint * count
    if not needed:
        return
    parts = [f"the trained model takes {in_gib(model)}"] * trainer.save_model
    parts += [f"{count} checkpoints of {in_gib(checkpoint)} are there at a time"] * bool(count)
    _, free = disk_usage(trainer.output_dir)
    text = f"{', '.join(parts)}, {in_gib(free)} are free for {trainer.output_dir}"
    if needed > free:
        fix = "make room, or set trainer.output_dir to another disk, trainer.save_limit=1, trainer.save_freq=0 or "
        yield error("disk", text, fix + "trainer.save_model=false")
    else:
        yield ok("disk", text)


def check_data(case: Case) -> Iterator[Finding]:
    """Files open, all rows have their columns and images, and some of them become prompts."""
    from verl.data.checks import Fault, count_images, refuse
    from verl.data.dataset import PromptDataset
    from verl.data.overlong import count_prompts

    data, trainer = case.config.data, case.config.trainer
    views, vision = case.config.algorithm.views, case.vision
    columns = sorted({views[view].column for view in case.requirements.views} - {None})
    wanted = [("data.train_files", data.train_files, columns)] if not trainer.val_only else []
    for key, reference, view_columns in [*wanted, ("data.val_files", data.val_files, [])]:
        if reference is None:
            continue
        try:
            unfiltered = replace(data, filter_overlong_prompts=False, truncation=None)
            dataset = PromptDataset(reference, key, unfiltered, vision, view_columns)
            every = max(1, len(dataset) // SAMPLED_ROWS)
            sample = list(range(0, len(dataset), every))[:SAMPLED_ROWS]
            counted = [count_prompts(dataset.rows, vision, index, [dataset.rows[index]])[0] for index in sample]
            refuse(dataset.rows, [found for found in counted if isinstance(found, Fault)])
            lengths = [length for length in counted if isinstance(length, int)]
            for index, length in list(zip(sample, lengths, strict=True))[:ENCODED_ROWS]:
                if length <= data.max_prompt_length:
                    dataset[index]
        except (ValueError, OSError) as reason:
            yield error("data", str(reason) if key in str(reason) else f"{key}: {reason}")
            continue
        images = max(count_images(dataset.rows.table, data.image_key))
        if key == "data.train_files":
            case.images_per_row, case.longest_prompt = max(1, images), min(max(lengths), data.max_prompt_length)
        text = f"{key}: {len(dataset)} rows with up to {images} image(s); "
        text += f"{len(lengths)} that were read have {min(lengths)} to {max(lengths)} tokens"
        yield from _judge(key, text, len(dataset), lengths, case)


def _judge(key: str, text: str, rows: int, lengths: list[int], case: Case) -> Iterator[Finding]:
    """Enough rows for a step, and prompts that fit."""
    data = case.config.data
    size = data.mini_rollout_batch_size or data.rollout_batch_size
    longer = sum(length > data.max_prompt_length for length in lengths)
    if key == "data.train_files" and rows < size:
        yield error("data", f"{text}; one step takes {size}", f"lower data.rollout_batch_size to {rows} or less")
    elif longer and not data.filter_overlong_prompts:
        fix = "raise it, lower data.max_pixels, or set data.filter_overlong_prompts=true"
        yield error("data", f"{text}, {longer} of them more than data.max_prompt_length={data.max_prompt_length}", fix)
    elif longer:
        fix = "raise data.max_prompt_length or lower data.max_pixels"
        yield warning("data", f"{text}; {longer} of them are too long and will be dropped", fix)
    else:
        yield ok("data", text)


def check_reward(case: Case) -> Iterator[Finding]:
    """The functions import. They are not called: what they cost or do is not known."""
    from verl.workers.reward.functions import load_functions

    try:
        functions = load_functions(case.config.worker.reward)
    except Exception as reason:  # the user's file runs on import and may raise anything
        known = isinstance(reason, (ValueError, FileNotFoundError))
        text = str(reason) if known else f"{case.config.worker.reward.reward_function}: {in_short(reason)}"
        yield error("reward", text, "worker.reward.reward_function=path/to/file.py:function")
        return
    for function in functions.values():
        yield ok("reward", f"{function.name} imports ({function.type})")
