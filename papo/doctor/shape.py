"""The numbers of a model that its memory follows from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tower:
    """One of the two transformers: `block` is the number of parameters of one of its `layers` blocks."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    block: int


@dataclass(frozen=True)
class Shape:
    """`parameters` counts a tied head once, as memory does. `pixels` are the values of one patch, `merge` patches
    make a token along each axis."""

    parameters: int
    vision_parameters: int
    text: Tower
    vision: Tower
    vocabulary: int
    tied: bool
    kv_heads: int
    head_dim: int
    patch: int
    merge: int
    pixels: int

    @property
    def head(self) -> int:
        """Parameters of the output head."""
        return self.vocabulary * self.text.hidden

    def root(self, min_block: int) -> int:
        """Parameters that FSDP gathers with the root: all outside blocks, and blocks smaller than `min_block`."""
        towers = (tower for tower in (self.text, self.vision) if tower.block >= min_block)
        return self.parameters - sum(tower.layers * tower.block for tower in towers)

    def largest_block(self, min_block: int) -> int:
        """Parameters of the largest block that is sharded on its own, 0 for none."""
        return max((t.block for t in (self.text, self.vision) if t.block >= min_block), default=0)

    def kv_bytes(self, width: int) -> int:
        """Bytes of the KV cache per token, `width` bytes a value."""
        return 2 * self.text.layers * self.kv_heads * self.head_dim * width


def shape_of(config: Any) -> Shape:
    """The shape of the model with this Hugging Face config, counted on the meta device: no weight is made or read."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    text, vision = config.text_config, config.vision_config
    blocks = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    in_tower = {id(module) for module in model.model.visual.modules()}

    def tower(of_vision: bool, part: Any, layers: int, heads: int) -> Tower:
        own = [block for block in blocks if (id(block) in in_tower) == of_vision]
        return Tower(layers, part.hidden_size, part.intermediate_size, heads, max(map(_count, own)))

    return Shape(
        parameters=_count(model),
        vision_parameters=_count(model.model.visual),
        text=tower(False, text, text.num_hidden_layers, text.num_attention_heads),
        vision=tower(True, vision, vision.depth, vision.num_heads),
        vocabulary=text.vocab_size,
        tied=bool(config.tie_word_embeddings),
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        patch=vision.patch_size,
        merge=vision.spatial_merge_size,
        pixels=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
    )


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
