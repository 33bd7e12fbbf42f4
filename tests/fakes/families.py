"""A tiny random model of each supported family, saved as an ordinary Hugging Face folder."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

MODELS: dict[str, type[PreTrainedModel]] = {
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
    "qwen3_5": Qwen3_5ForConditionalGeneration,
    "internvl": InternVLForConditionalGeneration,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
}
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
VISION = (*QWEN, "internvl")
TIED = ("qwen3_vl", "qwen3_5", "qwen2")  # as their small members are
# Large enough that a picture shows in the log-probs of untrained weights.
SPREAD = 0.1
# The turn of a Thinking model begins inside its thoughts.
THINKING = "assistant\n<think>\n"
INTERN_TOKENS = {"start_image": "<img>", "end_image": "</img>", "context_image": "<IMG_CONTEXT>", "video": "<video>"}


def picture(width: int, height: int, seed: int = 0) -> dict[str, Any]:
    """Noise, every patch of which is different, as a row holds it."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def mixed_rows(model_type: str) -> list[dict[str, Any]]:
    """Four prompts of different lengths, the first two without images, and where the model sees one and two."""
    rows = [
        {"images": [], "problem": "1+1?", "answer": "2"},
        {"images": [], "problem": "How much is 2+3? Think.", "answer": "5"},
        {"images": [picture(96, 64)], "problem": "<image>Add the digits.", "answer": "7"},
        {"images": [picture(64, 128, 1), picture(40, 40, 2)], "problem": "<image>+<image>?", "answer": "9"},
    ]
    if model_type not in VISION:
        rows = [{**row, "images": [], "problem": row["problem"].replace("<image>", "one")} for row in rows]
    return rows


def make_model(folder: Path, model_type: str, processor_folder: Path) -> Path:
    """A model of `model_type` with two layers, whose vocabulary is that of the Qwen2.5-VL in `processor_folder`."""
    original = AutoProcessor.from_pretrained(processor_folder)
    tokenizer = original.tokenizer
    template = original.chat_template
    if model_type in ("qwen3_vl", "qwen3_5"):
        template = template.replace("assistant\n", THINKING)
    if model_type == "internvl":
        template = template.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\\n")
        extra = {f"{name}_token": token for name, token in INTERN_TOKENS.items()}
        tokenizer = AutoTokenizer.from_pretrained(processor_folder, extra_special_tokens=extra)
    torch.manual_seed(5)
    model = MODELS[model_type](config_of(model_type, tokenizer))
    with torch.no_grad():  # rotary positions alone would hide an image's place from untrained biases and norms
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(SPREAD * torch.randn_like(weight))
    model.save_pretrained(folder)
    if model_type in VISION:
        processor_of(model_type, tokenizer, template).save_pretrained(folder)
    else:
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    return folder


def processor_of(model_type: str, tokenizer: Any, template: str) -> Any:
    if model_type == "internvl":
        pictures = GotOcr2ImageProcessor(size=TILE, max_patches=12)
        options = {"image_seq_length": (TILE["height"] // 28) ** 2, "chat_template": template}
        return InternVLProcessor(pictures, tokenizer, InternVLVideoProcessor(size=TILE), **options)
    kind, videos, patch = {
        "qwen2_vl": (Qwen2VLProcessor, Qwen2VLVideoProcessor, 14),
        "qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor, 14),
        "qwen3_vl": (Qwen3VLProcessor, Qwen3VLVideoProcessor, 16),
        "qwen3_5": (Qwen3VLProcessor, Qwen3VLVideoProcessor, 16),
    }[model_type]
    patches = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    if patch == 16:
        patches |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return kind(
        image_processor=Qwen2VLImageProcessor(**patches),
        tokenizer=tokenizer,
        video_processor=videos(**patches),
        chat_template=template,
    )


def config_of(model_type: str, tokenizer: Any) -> Any:
    """Heads of 32 are the smallest that vLLM runs on a CPU."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": SPREAD,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": model_type in TIED,
        "dtype": "float32",
    }
    if model_type.startswith("qwen3"):
        text["head_dim"] = 32
    if model_type == "qwen2":
        return Qwen2Config(**text)
    if model_type == "qwen3":
        return Qwen3Config(**text)
    if model_type == "internvl":
        return InternVLConfig(
            text_config={**text, "model_type": "qwen3", "head_dim": 32},
            vision_config=VISION_CONFIGS[model_type],
            image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
            image_seq_length=(TILE["height"] // 28) ** 2,
            tie_word_embeddings=text["tie_word_embeddings"],
            dtype="float32",
        )
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    rope, vision = text["rope_parameters"], VISION_CONFIGS[model_type]
    rope["mrope_section"] = [4, 6, 6]
    if model_type == "qwen3_vl":
        rope |= {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
    if model_type == "qwen3_5":
        rope |= {"mrope_section": [3, 3, 2], "mrope_interleaved": True, "partial_rotary_factor": 0.25}
        text |= LINEAR
    kind = {
        "qwen2_vl": Qwen2VLConfig,
        "qwen2_5_vl": Qwen2_5_VLConfig,
        "qwen3_vl": Qwen3VLConfig,
        "qwen3_5": Qwen3_5Config,
    }[model_type]
    return kind(
        text_config=text,
        vision_config={"num_heads": 2, "depth": 3, "initializer_range": SPREAD, "spatial_merge_size": 2, **vision},
        tie_word_embeddings=text["tie_word_embeddings"],
        initializer_range=SPREAD,
        dtype="float32",
        **ids,
    )


# Heads of 128 are those that vLLM's linear attention runs with on a CPU.
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 64,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
}
TILE = {"height": 56, "width": 56}
VISION_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2, "patch_size": 14},
    "qwen2_5_vl": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "out_hidden_size": 64,
        "patch_size": 14,
        "window_size": 28,
        "fullatt_block_indexes": [2],
    },
    "qwen3_vl": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "out_hidden_size": 64,
        "patch_size": 16,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    },
    "qwen3_5": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "out_hidden_size": 64,
        "patch_size": 16,
        "num_position_embeddings": 64,
    },
    "internvl": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "patch_size": 14,
        "image_size": TILE["height"],
        "initializer_range": SPREAD,
    },
}
