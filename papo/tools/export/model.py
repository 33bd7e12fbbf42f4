"""The exported model: a transformers model from weights, an adapter from them, and the push to the hub."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
import logging

from papo.tools.export.source import Source
from verl.models.adapter_names import adapted_layers, factors, is_adapter, merge, plain_name, save_adapter

WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def dtype_of(name: str) -> torch.dtype:
    """bf16, fp16, fp32 or torch's own names for them. Raises ValueError."""
    import torch

    if DTYPES.get(name, name) not in DTYPES.values():
        raise ValueError(f"--dtype {name}: known are {', '.join(DTYPES)}")
    return getattr(torch, DTYPES.get(name, name))


def build_model(folder: str, weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """The transformers model that the config in `folder` describes, with these weights in `dtype`. Names as older
    versions of transformers had them are translated.

    Raises ValueError where the weights are not those of such a model, naming one.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if kind is None:
        raise ValueError(f"'{folder}/config.json' names the architectures {config.architectures}, which are unknown")
    try:
        model, found = kind.from_pretrained(
            None, config=config, state_dict=dict(weights), dtype=dtype, output_loading_info=True
        )
    except RuntimeError as error:  # the names are in a table that transformers logs
        raise ValueError(
            f"the weights have other shapes than '{folder}/config.json' says (the table above): {error}"
        ) from error
    for problem in ("missing_keys", "unexpected_keys"):
        if found[problem]:
            raise ValueError(
                f"the weights are not those of '{folder}/config.json': {len(found[problem])} "
                f"{problem.removesuffix('_keys')}, such as '{min(found[problem])}'"
            )
    if os.path.isfile(os.path.join(folder, "generation_config.json")):
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def write_model(model: Any, description: str, folder: str) -> None:
    """Write a new Hugging Face folder: weights, in files of a size that hubs take, config, and processor and tokenizer
    as they are in `description`."""
    shutil.copytree(description, folder, ignore=lambda _, names: [n for n in names if n.endswith(WEIGHTS)])
    model.save_pretrained(folder)


def add_weights(model: Any, description: str, config_too: bool) -> None:
    """Write the weights into the Hugging Face folder `description` itself, as EasyR1's merger does; with `config_too`
    the config that goes with their dtype."""
    temporary = f"{description}.tmp{os.getpid()}"
    try:
        model.save_pretrained(temporary)
        names = sorted(os.listdir(temporary), key=lambda name: name.endswith(".json"))  # an index after its files
        for name in names:
            if config_too or name.endswith(WEIGHTS):
                os.replace(os.path.join(temporary, name), os.path.join(description, name))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def merge_adapter(weights: Mapping[str, torch.Tensor], source: Source) -> dict[str, torch.Tensor]:
    """The weights of the model without adapters that computes the same. Without LoRA they are returned as they are."""
    merged = {plain_name(name): weight for name, weight in weights.items() if not is_adapter(name)}
    for layer in adapted_layers(weights):
        lora = _settings(source)
        up, down = (weights[name] for name in factors(layer))
        merged[f"{layer}.weight"] = merge(merged[f"{layer}.weight"], up, down, lora["alpha"] / lora["rank"])
    return merged


def write_adapter(weights: Mapping[str, torch.Tensor], source: Source, dtype: torch.dtype, folder: str) -> None:
    """Write what PeftModel.from_pretrained(MODEL, folder) reads."""
    from peft import LoraConfig, TaskType

    lora = _settings(source)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=source.config["worker"]["actor"]["model"]["model_path"],
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        target_modules=adapted_layers(weights),
        inference_mode=True,
    )
    save_adapter(config, {name: weight.to(dtype) for name, weight in weights.items() if is_adapter(name)}, folder)


def _settings(source: Source) -> dict[str, Any]:
    """`worker.actor.model.lora` of the run. Raises ValueError where nobody kept it."""
    try:
        return source.config["worker"]["actor"]["model"]["lora"]
    except KeyError as error:
        raise ValueError(
            f"'{source.actor}' has an adapter, and the config in its manifest no worker.actor.model.lora: its scale "
            "is not known"
        ) from error


logger = logging.getLogger(__name__)


def upload(folder: str, repo: str) -> None:
    """Make the private repository `repo` where there is none, and upload `folder` to it.

    Raises ValueError saying what is wrong and what is already there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the upload to '{repo}' failed: {reason}. The folder is whole in {folder}; log in with `hf auth login`, "
            f"then: hf upload {repo} {folder}"
        ) from error
    logger.info("uploaded %s to %s", folder, repo)
