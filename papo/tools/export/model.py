"""Weights and a config to a model, and a model to a folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

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
