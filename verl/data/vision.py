"""The only image preprocessing: whatever sees a prompt, engine or trainer or view, sees it through this file."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GenerationConfig
from transformers.image_utils import SizeDict

from verl.models.families import SpecialTokens, family_of, positions_of_prompt, special_tokens
from verl.models.paths import check_model_path


class VisionProcessor:
    """A model's processor, with this run's pixel limits: prompts and images to token ids and tensors.

    A text-only model has a tokenizer instead; what needs a picture raises ValueError there.
    """

    def __init__(self, model_path: str, min_pixels: int, max_pixels: int, trust_remote_code: bool = False) -> None:
        self.processor = load_processor(model_path, trust_remote_code)
        self.config = load_config(model_path, trust_remote_code)
        self.family = family_of(self.config)
        self.tokenizer = tokenizer_of(self.processor)
        if self.family.has_vision:
            self.image_processor.size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
        self.special = special_tokens(self.config, self.tokenizer, load_generation_config(model_path))

    @property
    def image_processor(self) -> Any:
        if not self.family.has_vision:
            raise ValueError(
                f"worker.actor.model.model_path holds a {self.family.name} model, which reads text only: it has no "
                "image processor"
            )
        return self.processor.image_processor

    @cached_property
    def media_tokens(self) -> tuple[str, ...]:
        """What stands for images and videos in a text; a problem that holds it would be taken for a picture."""
        ids = {getattr(self.config, f"{kind}_token_id", None) for kind in ("image", "video")}
        return tuple(token for token, i in self.tokenizer.get_added_vocab().items() if i in ids)

    def chat_text(self, text: str, marker: str = "<image>") -> str:
        """The whole prompt as text: one user message whose `marker`s stand for images, then the model's turn."""
        content: list[dict[str, str]] = []
        for i, piece in enumerate(text.split(marker)):
            if i:
                content.append({"type": "image"})
            if piece:
                content.append({"type": "text", "text": piece})
        # Templates of text-only models join strings and know no parts.
        messages = [{"role": "user", "content": content if self.family.has_vision else text}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    @cached_property
    def turn_start(self) -> str:
        """What the template writes of the model's own turn: "<think>" for models that always think, else nothing."""
        tail = self.chat_text("PROBE").rpartition("PROBE")[2]
        return tail[tail.index("<think>") :] if "<think>" in tail else ""

    def encode_prompt(self, chat_text: str, images: list[Image.Image]) -> dict[str, Any]:
        """Token ids [P], positions [3, P] and `mm_inputs` ({} without images): the image tensors, and `image_ids`, a
        name of each image's content by which an engine knows one that it has encoded before."""
        pictures = {"images": images} if images else {}
        encoded = self.processor(text=[chat_text], **pictures, return_tensors="pt")
        ids = encoded["input_ids"][0]
        mm_inputs: dict[str, Any] = {}
        if images:
            mm_inputs = {k: encoded[k] for k in ("pixel_values", "image_grid_thw")}
            mm_inputs["image_ids"] = image_ids(**mm_inputs)
        positions = positions_of_prompt(ids, mm_inputs.get("image_grid_thw"), self.config)
        return {"prompt_ids": ids, "prompt_positions": positions, "mm_inputs": mm_inputs}

    def encode_images(self, images: list[Image.Image], do_resize: bool = True) -> dict[str, torch.Tensor]:
        """The `mm_inputs` of `images`, as `encode_prompt` would make them; `do_resize=False` for what `resize` made."""
        encoded = self.image_processor(images=images, do_resize=do_resize, return_tensors="pt")
        return {"pixel_values": encoded["pixel_values"], "image_grid_thw": encoded["image_grid_thw"]}

    def resize(self, image: Image.Image) -> Image.Image:
        """The RGB `image` in the size, and with the resampling, in which the model will see it."""
        image_processor = self.image_processor
        resized = image_processor.resize(
            torch.from_numpy(np.array(image)).permute(2, 0, 1),
            size=SizeDict(**dict(image_processor.size)),
            resample=image_processor.resample,
            factor=image_processor.patch_size * image_processor.merge_size,
        )
        return Image.fromarray(resized.permute(1, 2, 0).numpy())

    def num_image_tokens(self, width: int, height: int) -> int:
        """How many prompt tokens an image of this size takes, by arithmetic alone.

        Raises ValueError for sides of a ratio that the model does not take.
        """
        image_processor = self.image_processor
        try:
            patches = image_processor.get_number_of_image_patches(height, width, {})
        except ValueError as error:
            raise ValueError(
                f"an image of {width}x{height} pixels is none for {self.family.name}: {error}; crop it, or leave such "
                "rows out"
            ) from error
        return patches // image_processor.merge_size**2

    def count_tokens(self, chat_texts: list[str]) -> list[int]:
        """How many tokens each text has, an image counting as one."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return [len(encoding.ids) for encoding in backend.encode_batch_fast(chat_texts)]


def image_ids(pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> tuple[str, ...]:
    """A digest of each image's patches and shape.

    Args:
        pixel_values: [patches of all images, values per patch].
        image_grid_thw: [images, 3].
    """
    pieces = pixel_values.split(image_grid_thw.prod(dim=1).tolist())
    return tuple(
        hashlib.sha256(str(grid).encode() + piece.contiguous().numpy().tobytes()).hexdigest()
        for grid, piece in zip(image_grid_thw.tolist(), pieces, strict=True)
    )


def load_config(model_path: str, trust_remote_code: bool = False) -> Any:
    """The model's config. Raises FileNotFoundError or ValueError naming `worker.actor.model.model_path`."""
    check_model_path(model_path)
    try:
        return AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"worker.actor.model.model_path='{model_path}': its config does not load: {error}") from error


def load_generation_config(model_path: str) -> GenerationConfig | None:
    """The model's generation_config.json; None where it has none."""
    try:
        return GenerationConfig.from_pretrained(model_path)
    except OSError:
        return None


def load_processor(model_path: str, trust_remote_code: bool = False) -> Any:
    """The AutoProcessor of a folder or hub name, or, of a text-only model, its AutoTokenizer.

    Raises ValueError naming `worker.actor.model.model_path`.
    """
    family = family_of(load_config(model_path, trust_remote_code))
    try:
        auto = AutoProcessor if family.has_vision else AutoTokenizer
        processor = auto.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ValueError(
            f"worker.actor.model.model_path='{model_path}': its processor does not load: {error}"
        ) from error
    if family.has_vision and not hasattr(processor, "image_processor"):
        raise ValueError(f"worker.actor.model.model_path='{model_path}' has no image processor, and {family.name} sees")
    return processor


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer that `load_processor` has loaded, alone or as a part."""
    return getattr(processor, "tokenizer", processor)


def load_special_tokens(model_path: str, trust_remote_code: bool = False) -> SpecialTokens:
    """The special token ids of the model in a folder or on the hub."""
    tokenizer = tokenizer_of(load_processor(model_path, trust_remote_code))
    return special_tokens(load_config(model_path, trust_remote_code), tokenizer, load_generation_config(model_path))
