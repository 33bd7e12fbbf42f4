"""Family: what differs between kinds of models. This is the text-only one; families that see override its methods."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids. Each of `eos` ends a response; those in `banned` stand for images, video or audio, and no response may
    hold one."""

    pad: int
    eos: tuple[int, ...]
    banned: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Images:
    """The images of one prompt as tensors; only the family knows what is in them.

    Attributes:
        items: For each image its tensors, by the name under which the model takes them. Tensors of several images are
            joined along their first dimension.
        digests: For each image a name of its content: images with the same digest are the same.
        counts: For each image the number of its patches.
    """

    items: tuple[dict[str, torch.Tensor], ...] = ()
    digests: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    @classmethod
    def of(
        cls, items: Sequence[dict[str, torch.Tensor]], digests: Sequence[str] | None = None, each: int = 1
    ) -> Images:
        """Images with these tensors; digests are by default those of the tensors. A row of an image's longest tensor
        holds `each` patches."""
        names = map(_digest, items) if digests is None else digests
        return cls(tuple(items), tuple(names), tuple(each * max(map(len, item.values()), default=0) for item in items))

    @property
    def patches(self) -> int:
        """The number of patches of all images."""
        return sum(self.counts)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of all images; {} without images."""
        return join_tensors(self.items)


def join_tensors(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors of all `items`, by name, joined along their first dimension."""
    return {name: torch.cat([item[name] for item in items]) for name in (items[0] if items else ())}


def join_images(rows: Sequence[Images]) -> tuple[dict[str, torch.Tensor] | None, list[int]]:
    """The tensors of the *different* images of all rows, or None without images; and for each image place, in the order
    of rows and of images in a row, which of them it shows."""
    numbers: dict[str, int] = {}
    items, owner = [], []
    for images in rows:
        for item, digest in zip(images.items, images.digests, strict=True):
            if digest not in numbers:
                numbers[digest] = len(items)
                items.append(item)
            owner.append(numbers[digest])
    return (join_tensors(items) if items else None), owner


def _digest(item: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(item.items()):
        found.update(f"{name}{tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


class Family:
    """A tested kind of model.

    Attributes:
        name: As people call it.
        has_vision: Whether it has a vision tower.
        packs_images: Whether its tower takes the patches of all images as one row, in segments.
        linear_attention: Whether some layers of its language model are linear attention.
        tower_name: The tower's full name in the Hugging Face model.
        vision_names: The tower, and the modules between it and the language model.
        auto_class: The class of transformers that loads it.
    """

    has_vision = packs_images = linear_attention = False
    tower_name = ""
    vision_names: tuple[str, ...] = ()
    auto_class: Any = AutoModelForCausalLM
    modality_tokens = (
        *("<|image_pad|>", "<|video_pad|>", "<|audio_pad|>"),
        *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    )

    def __init__(self, name: str) -> None:
        self.name = name

    def tower(self, inner: nn.Module) -> nn.Module | None:
        """The vision tower of the Hugging Face model `inner`."""
        return inner.get_submodule(self.tower_name) if self.has_vision else None

    def special_tokens(self, config: Any, tokenizer: Any, generation: Any = None) -> SpecialTokens:
        """The special token ids of a model and its tokenizer.

        Args:
            generation: The model's GenerationConfig, where it has one: chat models list ends there that the tokenizer
                does not name (<|endoftext|> beside <|im_end|>).
        """
        vocabulary = tokenizer.get_vocab()
        banned = {vocabulary[token] for token in self.modality_tokens if token in vocabulary}
        banned |= {getattr(config, f"{kind}_token_id", None) for kind in ("image", "video", "audio")} - {None}
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        more = getattr(generation, "eos_token_id", None) or []
        ends = dict.fromkeys([eos, *(more if isinstance(more, (list, tuple)) else [more])])
        return SpecialTokens(pad if pad is not None else eos, tuple(ends), tuple(sorted(banned)))

    def prepare(self, inner: nn.Module) -> None:
        """Let layers of the Hugging Face model `inner` that attention's interface does not reach read packed rows."""

    def image_limits(self, image_processor: Any, min_pixels: int, max_pixels: int) -> dict[str, Any]:
        """Settings of the image processor, by name, that keep an image within these numbers of pixels."""
        raise NotImplementedError

    def split_images(self, encoded: dict[str, Any], processor: Any) -> list[dict[str, torch.Tensor]]:
        """The tensors of each image from what the Hugging Face `processor`, or its image processor alone, makes of
        several."""
        raise ValueError(f"a {self.name} model reads text only, and the prompt has images")

    def positions(self, ids: torch.Tensor, images: Images, config: Any) -> torch.Tensor:
        """Rotary positions [3, P] int64 of a prompt [P] without padding; of text the same three times."""
        return torch.arange(len(ids)).expand(3, -1)

    def image_spans(self, ids: torch.Tensor, images: Images, config: Any, uid: str) -> list[tuple[int, int]]:
        """(first position, number of tokens) of each image of a prompt [P] without padding.

        Args:
            uid: Names the prompt in the error.

        Raises:
            ValueError: The image tokens are not those that the images take, one run for each.
        """
        if images:
            raise ValueError(f"{uid}: the prompt has {len(images)} image(s), and {self.name} reads text only")
        return []

    def image_features(
        self, inner: nn.Module, tensors: dict[str, torch.Tensor] | None, owner: Sequence[int], device: torch.device
    ) -> tuple[Any, torch.Tensor | None]:
        """(features of every image place, graph anchor), the tower having seen each different image once.

        Without images the tower still runs, on one black image that counts 0, and the anchor is a 0 that holds it in
        the graph: on another rank it may have images, and FSDP's collectives wait for all ranks. A text-only model has
        no tower, on any rank.

        Args:
            inner: The Hugging Face model, head included.
            tensors, owner: As `join_images` returns them.
        """
        return None, None

    def forward_arguments(self, position_ids: torch.Tensor, features: Any) -> dict[str, Any]:
        """The arguments of the model beneath the head, besides tokens and mask.

        Args:
            position_ids: [B, 3, L].
            features: As `image_features` returns them.
        """
        return {"position_ids": position_ids[:, 0]}

    def patches_per_row(self, config: Any) -> int:
        """The number of patches in a row of the longest of an image's tensors."""
        return 1

    def patch_size(self, config: Any) -> int:
        """Pixels along each side of a patch."""
        raise NotImplementedError

    def merge(self, config: Any) -> int:
        """Patches along each side of the square that makes a token."""
        raise NotImplementedError

    def engine_tensors(self, images: Images, config: Any) -> dict[str, torch.Tensor]:
        """The tensors under which vLLM takes the images."""
        return images.tensors()

    def image_tokens(self, processor: Any, width: int, height: int) -> int:
        """The number of prompt tokens that stand in place of an image of this size in pixels, by arithmetic alone.

        Raises ValueError for sides of a ratio that the model does not take.
        """
        raise NotImplementedError

    def resize(self, image_processor: Any, image: Image.Image) -> Image.Image:
        """The RGB `image` in the size, and with the resampling, in which the model sees it."""
        raise NotImplementedError

    def side_unit(self, image_processor: Any) -> int:
        """Pixels of which both sides of a resized image are multiples."""
        raise NotImplementedError


def positions_of_response(prompt_positions: torch.Tensor, length: int) -> torch.Tensor:
    """Positions [B, 3, length] of the response behind prompts with positions [B, 3, P]: text that counts on."""
    start = prompt_positions.amax(dim=(1, 2)) + 1
    return (start[:, None] + torch.arange(length))[:, None, :].expand(-1, 3, -1)
