"""Memory of a run in bytes, by arithmetic alone.

The counts of activations are those of Qwen2.5-VL's blocks in transformers with SDPA, in tensors that autograd keeps:
tests measure the same blocks and compare. What cannot be counted (allocator, CUDA context, NCCL) is one constant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from papo.tools.doctor.shape import Shape
from verl.workers.rollout.base import Term

FLOAT = 4
STEP_COPIES = 8  # float32 values per weight that a step of CompensatedAdamW holds, of one parameter at a time

# Bytes per logit of a chunk: its copies in compute dtype and float32, forward and backward.
LOGIT_BYTES = {"log_probs": 17, "entropy": 21, "kl": 30}
LOGIT_BYTES_NO_GRAD = 10


@dataclass(frozen=True)
class Load:
    """Load of a run on each device.

    `width` is the bytes of a value in compute dtype. `update_rows` and `pass_rows` are responses per micro-batch,
    `update_views` how many looks at them one forward takes, `patches` the image patches of a row at most.
    `kept` is the bytes
    of a weight, a gradient and an optimizer state, float32 whatever the compute dtype, or bfloat16 and then one state
    more; `offload` says that all these are in main memory.
    """

    ranks: int
    width: int
    prompt: int
    response: int
    patches: int
    update_rows: int
    pass_rows: int
    update_views: int
    chunk: int
    logits: str = "log_probs"
    checkpointing: bool = True
    frozen_vision: bool = False
    reshard: bool = True
    min_block: int = 0
    kept: int = FLOAT
    offload: bool = False

    @property
    def length(self) -> int:
        return self.prompt + self.response


def trainable(shape: Shape, load: Load) -> int:
    """Parameters that get gradients."""
    if shape.adapter:
        return shape.adapter
    return shape.parameters - (shape.vision_parameters if load.frozen_vision else 0)


def state_terms(shape: Shape, load: Load) -> list[Term]:
    """Weights and optimizer states: what the actor always has."""
    if load.offload:
        return []
    width = load.width if shape.adapter else load.kept  # below adapters they are frozen
    weights = Term(
        "weights",
        (width * shape.parameters + load.kept * shape.adapter) // load.ranks,
        f"{width} bytes x {billions(shape.parameters)} / {load.ranks}"
        if not shape.adapter
        else f"({width} bytes x {billions(shape.parameters)} + {load.kept} x {billions(shape.adapter)}) / {load.ranks}",
    )
    states = 2 if load.kept == FLOAT else 3
    return [
        weights,
        _share("optimizer states", states * load.kept, trainable(shape, load), load, f"{states} x {load.kept}"),
    ]


def gradient_terms(shape: Shape, load: Load) -> list[Term]:
    return [] if load.offload else [_share("gradients", load.kept, trainable(shape, load), load)]


def optimizer_step_terms(shape: Shape, load: Load) -> list[Term]:
    """AdamW works on all parameters at one time and needs one more copy of them, CompensatedAdamW on one, of which the
    head is the largest."""
    if load.offload:
        return []
    if load.kept == FLOAT:
        return [_share("copy for AdamW", FLOAT, trainable(shape, load), load)]
    return [_share("copies of the head", STEP_COPIES * FLOAT, shape.head, load)]


def offloaded(shape: Shape, load: Load) -> int:
    """Bytes that a rank has in main memory in place of the GPU's, at their peak."""
    there = replace(load, offload=False)
    return total([*state_terms(shape, there), *gradient_terms(shape, there), *optimizer_step_terms(shape, there)])


def _share(name: str, width: int, count: int, load: Load, written: str | None = None) -> Term:
    """`width` bytes for each of `count` parameters, shared by the ranks."""
    how = f"{written or width} bytes x {billions(count)} / {load.ranks}"
    return Term(name, width * count // load.ranks, how)


def gathered_term(shape: Shape, load: Load, reshard: bool) -> Term:
    """Weights in compute dtype as FSDP gathers them: the root's, and a block with the one behind it."""
    if not reshard:
        every = shape.parameters + shape.adapter
        return Term("gathered weights", load.width * every, f"{load.width} bytes x {billions(every)}")
    root, block = shape.root(load.min_block), shape.largest_block(load.min_block) + _adapter_of_block(shape)
    how = f"{load.width} bytes x ({billions(root)} outside blocks + 2 x {billions(block)})"
    return Term("gathered weights", load.width * (root + 2 * block), how)


def gathered_gradient_term(shape: Shape, load: Load) -> Term:
    """Gradients before they are reduced: the root's until the end of backward, a block's with its float32 copy, and
    the head's once more, since it gets one gradient per chunk of logits."""
    if shape.adapter:
        block = _adapter_of_block(shape)
        return Term("gathered gradients", (load.width + FLOAT) * block, f"adapters of one block, {billions(block)}")
    root, block = shape.root(load.min_block), shape.largest_block(load.min_block)
    if load.frozen_vision:
        root -= shape.vision_parameters - shape.vision.layers * shape.vision.block
    total = load.width * (root + shape.head) + (load.width + FLOAT) * block
    how = f"{load.width} bytes x ({billions(root)} + head {billions(shape.head)}) + one block"
    return Term("gathered gradients", total, how)


def _adapter_of_block(shape: Shape) -> int:
    return shape.adapter // shape.text.layers


def text_kept(shape: Shape, width: int) -> int:
    """Bytes per token that one block of the language model keeps for backward: 4 of MLP width, 8 of hidden width,
    and the float32 inputs of both norms."""
    hidden, intermediate = shape.text.hidden, shape.text.intermediate
    return width * (4 * intermediate + 8 * hidden) + 2 * FLOAT * hidden


def vision_kept(shape: Shape, width: int) -> int:
    """Bytes per patch that one block of the vision tower keeps."""
    hidden, intermediate = shape.vision.hidden, shape.vision.intermediate
    return width * (4 * intermediate + 11 * hidden) + 2 * FLOAT * hidden


def text_working(shape: Shape, width: int, grad: bool) -> int:
    """Bytes per token that a block needs for a moment, beside what it keeps. Without gradient an adapter's output is
    one more; with it the gradients of frozen weights' inputs are fewer, and the bound stays."""
    wide = 4 if shape.adapter and not grad else 3
    return width * (wide * shape.text.intermediate + (1 if grad else 2) * shape.text.hidden)


def vision_working(shape: Shape, width: int, grad: bool) -> int:
    """The same per patch. Rotary positions are applied in float32, which in bfloat16 outweighs the MLP."""
    hidden, intermediate = shape.vision.hidden, shape.vision.intermediate
    if grad:
        return width * (3 * intermediate + 7 * hidden)
    return max(width * (3 * intermediate + 3 * hidden), 34 * hidden)


def activation_terms(shape: Shape, load: Load) -> list[Term]:
    """Activations that forward keeps for backward, at their peak, in one micro-batch of an update."""
    rows = load.update_rows * load.update_views
    tokens, patches = rows * load.length, rows * load.patches
    towers = (
        ("language model", shape.text, tokens, text_kept, text_working, "tokens"),
        ("vision tower", shape.vision, 0 if load.frozen_vision else patches, vision_kept, vision_working, "patches"),
    )
    terms = []
    for name, tower, count, kept, working, unit in towers:
        block, moment = kept(shape, load.width), working(shape, load.width, True)
        # With checkpointing a block keeps its input, and makes the rest again when backward comes to it.
        each, extra = (load.width * tower.hidden, block + moment) if load.checkpointing else (block, moment)
        how = f"{count} {unit} x ({tower.layers} layers x {each} + {extra}) bytes"
        terms.append(Term(f"activations, {name}", count * (tower.layers * each + extra), how))
    images = patches * shape.pixels * (FLOAT + load.width)
    terms.append(Term("pixels", images, f"{patches} patches x {shape.pixels} values"))
    return terms


def logits_term(shape: Shape, load: Load, grad: bool) -> Term:
    per_logit = LOGIT_BYTES[load.logits] if grad else LOGIT_BYTES_NO_GRAD
    how = f"{load.chunk} tokens x {shape.vocabulary} x {per_logit} bytes"
    return Term("logits of a chunk", load.chunk * shape.vocabulary * per_logit, how)


def pass_terms(shape: Shape, load: Load, reshard: bool) -> list[Term]:
    """A forward without gradient, over one micro-batch of experience."""
    tokens, patches = load.pass_rows * load.length, load.pass_rows * load.patches
    text, vision = text_working(shape, load.width, False), vision_working(shape, load.width, False)
    images = patches * shape.pixels * (FLOAT + load.width)
    # The vision tower is done before the language model begins.
    in_text, in_vision = tokens * text, patches * vision
    how = f"{tokens} tokens x {text} bytes" if in_text >= in_vision else f"{patches} patches x {vision} bytes"
    return [
        gathered_term(shape, load, reshard),
        Term("one block", max(in_text, in_vision), how),
        Term("pixels", images, f"{patches} patches x {shape.pixels} values"),
        logits_term(shape, load, False),
    ]


def update_terms(shape: Shape, load: Load) -> list[Term]:
    """Forward and backward of one micro-batch, beside states and gradients."""
    return [
        gathered_term(shape, load, load.reshard),
        gathered_gradient_term(shape, load),
        *activation_terms(shape, load),
        logits_term(shape, load, True),
    ]


def total(terms: list[Term]) -> int:
    return sum(term.bytes for term in terms)


def billions(count: int) -> str:
    """A number of parameters as one reads it."""
    return f"{count / 1e9:.2f}B" if count >= 1e7 else f"{count / 1e6:.2f}M"
