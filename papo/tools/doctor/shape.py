"""The numbers of a model that its memory follows from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verl.config.worker import LoRAConfig


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
    """`parameters` counts a tied head once, as memory does, and `adapter` those of LoRA's matrices, which come on top.
    `kv_layers` of the language model's layers keep keys and values; the others, linear attention, keep together `state`
    values of each response. `pixels` are the values of one patch, `merge` patches make a token along each axis."""

    parameters: int
    vision_parameters: int
    text: Tower
    vision: Tower
    vocabulary: int
    tied: bool
    kv_heads: int
    head_dim: int
    kv_layers: int
    state: int
    patch: int
    merge: int
    pixels: int
    adapter: int = 0

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
        return 2 * self.kv_layers * self.kv_heads * self.head_dim * width


def shape_of(config: Any, lora: LoRAConfig | None = None) -> Shape:
    """The shape of the model with this Hugging Face config, counted on the meta device: no weight is made or read.

    Raises ValueError for targets of `lora` that it does not have.
    """
    from verl.models.families import family_of
    from verl.models.loading import outline
    from verl.models.lora import adapter_parameters

    family, model = family_of(config), outline(config)
    text, sees, tower = config.get_text_config(), family.has_vision, family.tower(model)
    blocks = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    in_tower = {id(module) for module in tower.modules()} if sees else set()
    largest = {of: max((_count(b) for b in blocks if (id(b) in in_tower) == of), default=0) for of in (False, True)}
    heads = text.num_attention_heads
    linear = (getattr(text, "layer_types", None) or []).count("linear_attention")
    memory = linear and text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim
    return Shape(
        parameters=_count(model),
        vision_parameters=_count(tower) if sees else 0,
        text=Tower(text.num_hidden_layers, text.hidden_size, text.intermediate_size, heads, largest[False]),
        vision=_vision_tower(config.vision_config, largest[True]) if sees else Tower(0, 0, 0, 1, 0),
        vocabulary=text.vocab_size,
        tied=bool(config.tie_word_embeddings),
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        kv_layers=text.num_hidden_layers - linear,
        state=linear * memory,
        patch=family.patch_size(config) if sees else 1,
        merge=family.merge(config) if sees else 1,
        pixels=_patch_values(config.vision_config, family.patch_size(config)) if sees else 0,
        adapter=adapter_parameters(model, lora) if lora is not None and lora.rank else 0,
    )


def _vision_tower(vision: Any, block: int) -> Tower:
    # Qwen2-VL calls the tower's width embed_dim; its hidden_size is what the tower hands on.
    hidden = getattr(vision, "embed_dim", None) or vision.hidden_size
    intermediate = getattr(vision, "intermediate_size", None) or int(hidden * vision.mlp_ratio)
    layers = getattr(vision, "depth", None) or vision.num_hidden_layers
    heads = getattr(vision, "num_heads", None) or vision.num_attention_heads
    return Tower(layers, hidden, intermediate, heads, block)


def _patch_values(vision: Any, patch: int) -> int:
    return 3 * getattr(vision, "temporal_patch_size", 1) * patch**2


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
