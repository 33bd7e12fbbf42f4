"""Folders of large models that take no room: every header true, every weight a hole in a sparse file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, InternVLConfig, Qwen2_5_VLConfig, Qwen3_5Config

# config.json of Qwen2.5-VL-3B-Instruct and -7B-Instruct, the numbers that its size follows from.
TEXT_3B = {
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "intermediate_size": 11008,
    "vocab_size": 151936,
}
TEXT_7B = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
}
VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}


def qwen(text: dict[str, int], tied: bool) -> Qwen2_5_VLConfig:
    """The config of a Qwen2.5-VL."""
    vision = {**VISION, "out_hidden_size": text["hidden_size"]}
    ties = {"tie_word_embeddings": tied}
    return Qwen2_5_VLConfig(text_config={**text, **ties}, vision_config=vision, **ties)


def qwen_3b() -> Qwen2_5_VLConfig:
    return qwen(TEXT_3B, tied=True)


def qwen_7b() -> Qwen2_5_VLConfig:
    return qwen(TEXT_7B, tied=False)


# By size: width, layers, heads, heads of keys, and width of the MLP; of the language models.
QWEN3_5 = {"2b": (2048, 24, 8, 2, 6144), "4b": (2560, 32, 16, 4, 9216), "9b": (4096, 32, 16, 4, 12288)}
INTERNVL3_5 = {"2b": (2048, 28, 16, 8, 6144), "4b": (2560, 36, 32, 8, 9728), "8b": (4096, 36, 32, 8, 12288)}
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def qwen3_5(size: str) -> Qwen3_5Config:
    """The config of a Qwen3.5: every fourth layer is full attention."""
    text, tied = dict(zip(SIZES, QWEN3_5[size], strict=True)), {"tie_word_embeddings": size != "9b"}
    text |= {"linear_num_value_heads": 16 if size == "2b" else 32}
    vision = {"out_hidden_size": text["hidden_size"]}
    if size == "2b":
        vision |= {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
    return Qwen3_5Config(text_config={**text, **tied}, vision_config=vision, **tied)


def internvl3_5(size: str) -> InternVLConfig:
    """The config of an InternVL3.5: a tower of 300 million parameters before a Qwen3."""
    tied = {"tie_word_embeddings": size != "8b"}
    text = dict(zip(SIZES, INTERNVL3_5[size], strict=True)) | {"head_dim": 128, "vocab_size": 151936, **tied}
    return InternVLConfig(text_config={**text, "model_type": "qwen3"}, **tied)


def write_hollow_model(folder: Path, config: Any, processor: Path, shards: int = 2, width: int = 2) -> Path:
    """Write config.json, the processor of another model, and `shards` safetensors files with an index."""
    folder.mkdir(parents=True)
    for file in processor.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copy(file, folder)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    names = sorted(shapes)
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        own = {name: shapes[name] for name in names[shard::shards]}
        write_hollow_weights(folder / file, own, width)
        index |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def write_hollow_weights(path: Path, shapes: dict[str, list[int]], width: int) -> None:
    """A safetensors file of these tensors, `width` bytes a value, whose data is a hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + width * int(torch.Size(shape).numel())
        header[name] = {"dtype": {2: "BF16", 4: "F32"}[width], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
