"""Image preprocessing, the only one: engines, trainer and views all see a prompt through this file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig

from verl.data.dialogue import Dialogue
from verl.models.families import family_of
from verl.models.families.base import Images, SpecialTokens
from verl.models.loading import load_config


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
            for name, value in self.family.image_limits(self.image_processor, min_pixels, max_pixels).items():
                setattr(self.image_processor, name, value)
        self.special = self.family.special_tokens(self.config, self.tokenizer, load_generation_config(model_path))

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
        """Tokens that stand for images and videos; a problem that holds one would be taken for a picture."""
        return tuple(filter(None, (getattr(self.processor, f"{kind}_token", None) for kind in ("image", "video"))))

    def chat_text(self, text: str, marker: str = "<image>") -> str:
        """The whole prompt as text: one message of the user, or those of a Dialogue, whose `marker`s stand for images,
        then the model's turn."""

        def parts(text: str) -> list[dict[str, str]]:
            content: list[dict[str, str]] = []
            for i, piece in enumerate(text.split(marker)):
                if i:
                    content.append({"type": "image"})
                if piece:
                    content.append({"type": "text", "text": piece})
            return content

        turns = text.messages if isinstance(text, Dialogue) else [("user", text)]
        # Templates of text-only models join strings and know no parts.
        messages = [{"role": role, "content": parts(one) if self.family.has_vision else one} for role, one in turns]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    @cached_property
    def turn_start(self) -> str:
        """The beginning of the model's turn in the template: "<think>" for models that always think, else nothing."""
        tail = self.chat_text("PROBE").rpartition("PROBE")[2]
        return tail[tail.index("<think>") :] if "<think>" in tail else ""

    def encode_prompt(self, chat_text: str, images: list[Image.Image]) -> dict[str, Any]:
        """Token ids [P], positions [3, P] and `mm_inputs`, the Images."""
        pictures = {"images": images} if images else {}
        encoded = self.processor(text=[chat_text], **pictures, return_tensors="pt")
        ids = encoded["input_ids"][0]
        tensors = self._images(encoded) if images else Images()
        positions = self.family.positions(ids, tensors, self.config)
        return {"prompt_ids": ids, "prompt_positions": positions, "mm_inputs": tensors}

    def encode_images(
        self, images: list[Image.Image], do_resize: bool = True, digests: Sequence[str] | None = None
    ) -> Images:
        """The `mm_inputs` of `images`, as `encode_prompt` would make them.

        Args:
            do_resize: False for what `resize` made.
            digests: By default those of the tensors.
        """
        encoded = self.image_processor(images=images, do_resize=do_resize, return_tensors="pt")
        return self._images(encoded, digests)

    def _images(self, encoded: dict[str, Any], digests: Sequence[str] | None = None) -> Images:
        items = self.family.split_images(encoded, self.processor)
        return Images.of(items, digests, self.family.patches_per_row(self.config))

    def resize(self, image: Image.Image) -> Image.Image:
        """The RGB `image` in the size, and with the resampling, in which the model will see it."""
        return self.family.resize(self.image_processor, image)

    def num_image_tokens(self, width: int, height: int) -> int:
        """The number of prompt tokens of an image of this size, by arithmetic alone.

        Raises ValueError for sides of a ratio that the model does not take.
        """
        return self.family.image_tokens(self.processor, width, height)

    def count_tokens(self, chat_texts: list[str]) -> list[int]:
        """The number of tokens of each text, an image counting as one."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return [len(encoding.ids) for encoding in backend.encode_batch_fast(chat_texts)]


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
    config = load_config(model_path, trust_remote_code)
    tokenizer = tokenizer_of(load_processor(model_path, trust_remote_code))
    return family_of(config).special_tokens(config, tokenizer, load_generation_config(model_path))
