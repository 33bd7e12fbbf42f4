"""The arithmetic of memory: against numbers worked out by hand, and against what torch really keeps."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer, Qwen2_5_VLVisionBlock

from papo.tools.doctor.case import GPU, Case
from papo.tools.doctor.fit import compute
from papo.tools.doctor.memory import (
    LOGIT_BYTES,
    LOGIT_BYTES_NO_GRAD,
    STEP_COPIES,
    Load,
    activation_terms,
    gathered_gradient_term,
    gathered_term,
    gradient_terms,
    logits_term,
    offloaded,
    optimizer_step_terms,
    pass_terms,
    state_terms,
    text_kept,
    text_working,
    total,
    vision_kept,
    vision_working,
)
from papo.tools.doctor.shape import Shape, shape_of
from tests.fakes.models import qwen_3b, qwen_7b
from verl.config.compose import compose_config
from verl.config.worker import LoRAConfig
from verl.models.log_probs import chunked_entropy, chunked_kl, chunked_log_probs
from verl.workers.training.compensated_adamw import CompensatedAdamW

GIB = 2**30

# The paper's 7B setting on 8 GPUs with a live masked view: 4 + 4 rows of 6144 tokens, each with one picture of 1003520
# pixels, which are 5120 patches of 14 x 14.
LOAD = Load(
    ranks=8,
    width=2,
    prompt=4096,
    response=2048,
    patches=5120,
    update_rows=4,
    pass_rows=16,
    update_views=2,
    chunk=1024,
)


@pytest.fixture(scope="module")
def shape_7b() -> Shape:
    return shape_of(qwen_7b())


@pytest.fixture(scope="module")
def shape_3b() -> Shape:
    return shape_of(qwen_3b())


def parameters_by_hand(hidden: int, layers: int, kv: int, intermediate: int, vocabulary: int, tied: bool) -> int:
    """Qwen2.5-VL from its architecture: attention with biases on q, k, v, a gated MLP, RMS norms."""
    block = (
        (hidden * hidden + hidden) + 2 * (hidden * kv + kv) + hidden * hidden + 3 * hidden * intermediate + 2 * hidden
    )
    text = vocabulary * hidden * (1 if tied else 2) + layers * block + hidden
    return text + vision_by_hand(hidden)


def vision_by_hand(out: int, hidden: int = 1280, intermediate: int = 3420) -> int:
    """32 blocks, all linear layers with biases; patches of 3 x 2 x 14 x 14 values; a merger of four patches."""
    attention = 3 * (hidden * hidden + hidden) + (hidden * hidden + hidden)
    mlp = 2 * (hidden * intermediate + intermediate) + (intermediate * hidden + hidden)
    merger = hidden + (4 * hidden) ** 2 + 4 * hidden + 4 * hidden * out + out
    return 32 * (attention + mlp + 2 * hidden) + 1176 * hidden + merger


def test_parameters_of_the_3b_and_7b_models(shape_3b, shape_7b):
    assert shape_3b.parameters == parameters_by_hand(2048, 36, 256, 11008, 151936, tied=True) == 3_754_622_976
    assert shape_7b.parameters == parameters_by_hand(3584, 28, 512, 18944, 152064, tied=False) == 8_292_166_656
    assert shape_3b.vision_parameters == vision_by_hand(2048)
    assert shape_7b.vision_parameters == vision_by_hand(3584)
    assert (shape_3b.tied, shape_7b.tied) == (True, False)


def test_kv_cache_per_token(shape_3b, shape_7b):
    assert shape_3b.kv_bytes(2) == 2 * 36 * 2 * 128 * 2 == 36_864
    assert shape_7b.kv_bytes(2) == 2 * 28 * 4 * 128 * 2 == 57_344


def test_states_of_the_7b_model_on_8_gpus(shape_7b):
    weights, optimizer = state_terms(shape_7b, LOAD)
    assert weights.bytes == 4 * 8_292_166_656 // 8 == 4_146_083_328
    assert optimizer.bytes == 8_292_166_656
    assert total(gradient_terms(shape_7b, LOAD)) == total(optimizer_step_terms(shape_7b, LOAD)) == 4_146_083_328
    frozen = replace(LOAD, frozen_vision=True)
    assert total(gradient_terms(shape_7b, frozen)) == 4 * (8_292_166_656 - vision_by_hand(3584)) // 8
    assert state_terms(shape_7b, frozen)[0].bytes == weights.bytes


def test_states_in_bfloat16_and_in_main_memory(shape_7b):
    narrow = replace(LOAD, kept=2)
    weights, optimizer = state_terms(shape_7b, narrow)
    assert weights.bytes == total(gradient_terms(shape_7b, narrow)) == 2 * 8_292_166_656 // 8
    assert optimizer.bytes == 3 * 2 * 8_292_166_656 // 8 and optimizer.how == "3 x 2 bytes x 8.29B / 8"
    (copies,) = optimizer_step_terms(shape_7b, narrow)
    assert copies.bytes == STEP_COPIES * 4 * 152064 * 3584 // 8
    away = replace(narrow, offload=True)
    kinds = (state_terms, gradient_terms, optimizer_step_terms)
    assert not any(kind(shape_7b, away) for kind in kinds)
    assert offloaded(shape_7b, away) == 5 * weights.bytes + copies.bytes


def test_copies_of_a_bfloat16_step_are_those_that_torch_makes():
    layer = torch.nn.Linear(500, 400, bias=False, dtype=torch.bfloat16)
    layer.weight.grad = torch.randn_like(layer.weight)
    optimizer = CompensatedAdamW(layer.parameters(), 1e-6, (0.9, 0.999), 1e-8, 0.01)
    assert peak(optimizer.step, layer) / (4 * 400 * 500) == pytest.approx(STEP_COPIES, rel=0.05)


def test_gathered_weights_and_gradients(shape_7b):
    block = (3584 * 3584 + 3584) + 2 * (3584 * 512 + 512) + 3584 * 3584 + 3 * 3584 * 18944 + 2 * 3584
    vision_block = 4 * 1280 * 1280 + 4 * 1280 + 3 * 1280 * 3420 + 2 * 3420 + 1280 + 2 * 1280
    root = 8_292_166_656 - 28 * block - 32 * vision_block
    head = 152064 * 3584
    assert shape_7b.root(0) == root and shape_7b.largest_block(0) == block
    assert gathered_term(shape_7b, LOAD, reshard=True).bytes == 2 * (root + 2 * block)
    assert gathered_term(shape_7b, LOAD, reshard=False).bytes == 2 * 8_292_166_656
    assert gathered_gradient_term(shape_7b, LOAD).bytes == 2 * (root + head) + 6 * block
    # Vision blocks below the limit are gathered with the root.
    assert shape_7b.root(100_000_000) == root + 32 * vision_block


def test_activations_of_the_7b_model(shape_7b):
    tokens, patches = 2 * 4 * 6144, 2 * 4 * 5120
    block = 2 * (4 * 18944 + 8 * 3584) + 8 * 3584
    vision_block = 2 * (4 * 3420 + 11 * 1280) + 8 * 1280
    moment, vision_moment = 2 * (3 * 18944 + 3584), 2 * (3 * 3420 + 7 * 1280)
    text, vision, pixels = activation_terms(shape_7b, LOAD)
    assert text.bytes == tokens * (28 * 2 * 3584 + block + moment) == 27_481_079_808
    assert vision.bytes == patches * (32 * 2 * 1280 + vision_block + vision_moment)
    assert pixels.bytes == patches * 1176 * 6
    text, vision, _ = activation_terms(shape_7b, replace(LOAD, checkpointing=False))
    assert text.bytes == tokens * (28 * block + moment)
    assert vision.bytes == patches * (32 * vision_block + vision_moment)
    assert activation_terms(shape_7b, replace(LOAD, frozen_vision=True))[1].bytes == 0


def test_logits_and_passes(shape_7b):
    assert logits_term(shape_7b, LOAD, grad=True).bytes == 1024 * 152064 * LOGIT_BYTES["log_probs"]
    gathered, block, *_, logits = pass_terms(shape_7b, LOAD, reshard=True)
    assert block.bytes == 16 * 6144 * 2 * (3 * 18944 + 2 * 3584)
    assert logits.bytes == 1024 * 152064 * LOGIT_BYTES_NO_GRAD
    # With many pictures and few other tokens the vision tower is the larger one.
    pictures = replace(LOAD, prompt=1280, response=16)
    assert pass_terms(shape_7b, pictures, True)[1].bytes == 16 * 5120 * 34 * 1280


def test_half_the_micro_batch_is_half_the_activations_and_twice_the_gpus_half_the_states(shape_3b):
    half = activation_terms(shape_3b, replace(LOAD, update_rows=2))
    assert 2 * total(half) == total(activation_terms(shape_3b, LOAD))
    assert 2 * total(state_terms(shape_3b, replace(LOAD, ranks=16))) == total(state_terms(shape_3b, LOAD))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_blocks_keep_and_need_is_what_torch_keeps_and_needs(dtype):
    config = small_config()
    shape, width = shape_of(config), dtype.itemsize
    layer = Qwen2_5_VLDecoderLayer(config.text_config, 0).to(dtype)
    rows, length = 2, 48
    hidden = torch.randn(rows, length, 256, dtype=dtype, requires_grad=True)
    angles = torch.randn(rows, length, 64).to(dtype)
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool).tril()

    def text() -> torch.Tensor:
        return layer(hidden, attention_mask=mask, position_embeddings=(angles.cos(), angles.sin()))

    # Beside the mask that SDPA converts, which is a term of its own.
    tokens, masks = rows * length, rows * length**2 * width
    assert kept(text, layer) - masks == pytest.approx(tokens * text_kept(shape, width), rel=0.05)
    moment = text_kept(shape, width) + text_working(shape, width, True)
    assert peak(lambda: text().sum().backward(), layer) - masks == pytest.approx(tokens * moment, rel=0.1)
    assert peak(torch.no_grad()(text), layer) == pytest.approx(tokens * text_working(shape, width, False), rel=0.15)

    block = Qwen2_5_VLVisionBlock(config.vision_config).to(dtype)
    patches = 64
    pixels = torch.randn(patches, 256, dtype=dtype, requires_grad=True)
    angles = torch.randn(patches, 64)
    windows = torch.arange(0, patches + 1, 16, dtype=torch.int32)

    def vision() -> torch.Tensor:
        return block(pixels, cu_seqlens=windows, position_embeddings=(angles.cos(), angles.sin()))

    assert kept(vision, block) == pytest.approx(patches * vision_kept(shape, width), rel=0.06)
    moment = vision_kept(shape, width) + vision_working(shape, width, True)
    assert peak(lambda: vision().sum().backward(), block) == pytest.approx(patches * moment, rel=0.1)
    assert peak(torch.no_grad()(vision), block) == pytest.approx(patches * vision_working(shape, width, False), rel=0.2)


@pytest.mark.parametrize("kind", ["log_probs", "entropy", "kl"])
def test_bytes_per_logit_are_those_that_torch_needs(kind):
    chunk, vocabulary = 32, 4000
    head = torch.nn.Linear(64, vocabulary, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    hidden, other = (torch.randn(3 * chunk, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    targets, banned = torch.randint(0, vocabulary, (3 * chunk,)), torch.tensor([1, 2])

    def values() -> torch.Tensor:
        if kind == "log_probs":
            return chunked_log_probs(hidden, targets, head, 1.0, banned, chunk)
        if kind == "entropy":
            return chunked_entropy(hidden, head, 1.0, banned, chunk)
        return chunked_kl(hidden, other, head, 1.0, banned, chunk, detach_other=False)

    needed = peak(lambda: values().sum().backward(), head) / (chunk * vocabulary)
    assert needed == pytest.approx(LOGIT_BYTES[kind], rel=0.1)
    if kind == "log_probs":
        assert peak(torch.no_grad()(values), head) / (chunk * vocabulary) == pytest.approx(LOGIT_BYTES_NO_GRAD, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_block_with_adapters_keeps_and_needs_no_more_than_is_counted(dtype):
    config = small_config()
    shape, width = replace(shape_of(config), adapter=1), dtype.itemsize
    layer = Qwen2_5_VLDecoderLayer(config.text_config, 0).to(dtype)
    layer = inject_adapter_in_model(LoraConfig(r=8, target_modules=r".*_proj"), layer).to(dtype)
    rows, length = 2, 48
    hidden = torch.randn(rows, length, 256, dtype=dtype, requires_grad=True)
    angles = torch.randn(rows, length, 64).to(dtype)
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool).tril()

    def text() -> torch.Tensor:
        return layer(hidden, attention_mask=mask, position_embeddings=(angles.cos(), angles.sin()))

    tokens, masks = rows * length, rows * length**2 * width
    assert 0.9 * text_kept(shape, width) < (kept(text, layer) - masks) / tokens < text_kept(shape, width)
    moment = text_kept(shape, width) + text_working(shape, width, True)
    assert 0.8 * moment < (peak(lambda: text().sum().backward(), layer) - masks) / tokens < moment
    assert peak(torch.no_grad()(text), layer) == pytest.approx(tokens * text_working(shape, width, False), rel=0.1)


def small_config() -> Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
    text = {"hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"intermediate_size": 704, "vocab_size": 200, "rope_parameters": rope, "pad_token_id": None}
    vision = {"depth": 1, "hidden_size": 256, "intermediate_size": 684, "num_heads": 4, "out_hidden_size": 256}
    config = Qwen2_5_VLConfig(text_config={**text, "bos_token_id": None, "eos_token_id": None}, vision_config=vision)
    config.text_config._attn_implementation = config.vision_config._attn_implementation = "sdpa"
    return config


def kept(forward, module: torch.nn.Module) -> int:
    """Bytes of different storages that autograd keeps, the parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    assert result.requires_grad
    return sum(found.values())


def peak(function, module: torch.nn.Module) -> int:
    """Largest number of bytes in tensors that were alive at one time, gradients of the parameters left out."""
    function()  # gradients of parameters and inputs exist from here on
    with LiveBytes() as live:
        function()
    return live.most


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators return, for as long as they live. What a kernel allocates for itself depends
    on the processor, and is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, weakref.ref] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in before:
                self.add(tensor.untyped_storage())
        return found

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.alive:
            return

        def end(_: weakref.ref) -> None:
            del self.alive[key]
            self.now -= size

        self.alive[key] = weakref.ref(storage, end)
        self.now += size
        self.most = max(self.most, self.now)


def overrides(*more: str) -> list[str]:
    return [
        "worker.actor.model.model_path=x",
        "data.train_files=a",
        "data.val_files=b",
        "worker.rollout.name=vllm",
        *more,
    ]


def compute_7b(shape: Shape, *more: str, preset: str = "papo_grpo"):
    config = compose_config(preset, overrides(*more))
    case = Case([GPU("a GPU", 80 * GIB, 80 * GIB)] * 8, imagined=True, config=config)
    return compute(case, config, (shape, shape), config.data.max_prompt_length)


def test_phases_of_the_shipped_preset_add_up(shape_7b):
    found = compute_7b(shape_7b)
    phases = {phase.name: dict(phase.parts) for phase in found.phases}
    roles = {role.name: total(list(role.terms)) for role in found.roles}
    rest = total(state_terms(shape_7b, LOAD))
    reference = roles["reference"]  # what its pass took is free again
    assert phases["generation"] == {
        "actor": rest,
        "reference": reference,
        "engine": int(0.6 * 80 * GIB),
        "processes": 2 * GIB,
    }
    assert phases["update"] == {
        "actor": rest + roles["actor, update"],
        "reference": reference,
        "processes": 3 * GIB,
    }
    assert total(list(found.roles[-1].terms)) == int(0.6 * 80 * GIB)
    assert found.cache == found.roles[-1].terms[-1].bytes


def test_roles_follow_from_the_config(shape_7b):
    alone = compute_7b(shape_7b, "~term@algorithm.terms.ref_kl")
    assert not any("reference" in dict(phase.parts) for phase in alone.phases)
    apart = compute_7b(shape_7b, "trainer.n_gpus_per_node=4", "worker.rollout.dedicated_gpus=4")
    names = {phase.name: set(dict(phase.parts)) for phase in apart.phases}
    assert names["engine's GPUs"] == {"engine"} and "engine" not in names["generation"]
    wide = compute_7b(shape_7b, "worker.rollout.tensor_parallel_size=4")
    assert wide.roles[-1].terms[0].bytes == 2 * 8_292_166_656 // 4
    one_view = compute_7b(shape_7b, preset="grpo")
    text = {role.name: role.terms for role in one_view.roles}["actor, update"][3]
    assert text.name == "activations, language model" and text.bytes == 27_481_079_808 // 2
    exact = compute_7b(shape_7b, "algorithm.terms.perception_kl.estimator=full")
    logits = {role.name: role.terms for role in exact.roles}["actor, update"][-1]
    assert logits.bytes == 1024 * 152064 * LOGIT_BYTES["kl"]


def test_a_critic_holds_what_the_actor_does_and_has_a_phase_of_its_own(shape_7b):
    found = compute_7b(
        shape_7b, "algorithm.adv_estimator=gae", "worker.critic.micro_batch_size_per_device_for_update=2"
    )
    phases = {phase.name: dict(phase.parts) for phase in found.phases}
    states = total(state_terms(shape_7b, LOAD))
    assert phases["generation"]["critic"] == phases["update"]["critic"] == states
    terms = {role.name: role.terms for role in found.roles}["critic, update"]
    assert phases["critic update"]["critic"] == states + total(list(terms))
    activations = next(term for term in terms if term.name == "activations, language model")
    assert activations.bytes == 27_481_079_808 // 4  # one view of two, two rows of four
    assert not any("logits" in term.name for term in terms)


def test_lora_trains_adapters_alone_and_has_no_reference_of_its_own(shape_7b):
    lora = LoRAConfig(rank=64, alpha=64)
    shape, ranks = shape_of(qwen_7b(), lora), 8
    by_hand = 28 * 64 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert shape.adapter == by_hand == 161_480_704 and replace(shape, adapter=0) == shape_7b
    found = compute_7b(shape, "worker.actor.model.lora.rank=64")
    terms = {(role.name, term.name): term.bytes for role in found.roles for term in role.terms}
    assert terms["actor", "weights"] == (2 * 8_292_166_656 + 4 * by_hand) // ranks  # the frozen ones in bfloat16
    assert terms["actor", "optimizer states"] == 8 * by_hand // ranks
    assert terms["actor, update", "gradients"] == terms["actor, optimizer step", "copy for AdamW"] == by_hand // 2
    assert terms["actor, update", "gathered gradients"] == 6 * (by_hand // 28)
    assert terms["actor, update", "activations, vision tower"] == 0
    assert ("actor, log-probs", "one block") in terms and ("reference", "weights") not in terms
    assert terms["engine", "weights"] == 2 * 8_292_166_656
    another = compute_7b(shape, "worker.actor.model.lora.rank=64", "worker.ref.model_path=another")
    assert any(role.name == "reference" for role in another.roles)
    tower = compute_7b(shape, "worker.actor.model.lora.rank=64", "worker.actor.model.lora.vision_tower=true")
    update = next(role for role in tower.roles if role.name == "actor, update")
    assert next(term for term in update.terms if term.name == "activations, vision tower").bytes > 0
    critic = compute_7b(shape, "worker.actor.model.lora.rank=64", "algorithm.adv_estimator=gae")
    whole = next(role for role in critic.roles if role.name == "critic")
    assert total(list(whole.terms)) == total(state_terms(shape_7b, LOAD))


def test_offloading_and_bfloat16_lighten_the_phases(shape_7b):
    def phases(*more: str) -> dict[str, dict[str, int]]:
        return {phase.name: dict(phase.parts) for phase in compute_7b(shape_7b, *more).phases}

    plain, reference = phases(), 2 * 8_292_166_656 // 8
    assert plain["generation"]["reference"] == reference  # kept as its forward computes
    narrow = phases("worker.actor.optim.strategy=adamw_bf16")
    assert narrow["generation"]["actor"] == 4 * reference
    away = phases("worker.actor.fsdp.cpu_offload=true", "worker.ref.fsdp.cpu_offload=true")
    assert "actor" not in away["generation"] and "reference" not in away["generation"]
    states = 12 * 8_292_166_656 // 8
    assert away["update"]["actor"] == plain["update"]["actor"] - states - 4 * 8_292_166_656 // 8
    assert not set(away["optimizer step"]) - {"processes"}
    found = compute_7b(shape_7b, "worker.actor.fsdp.cpu_offload=true", "worker.ref.fsdp.cpu_offload=true")
    assert found.offloaded == 8 * (20 * 8_292_166_656 // 8 + reference)
    critic = compute_7b(shape_7b, "algorithm.adv_estimator=gae", "worker.critic.fsdp.cpu_offload=true")
    assert critic.offloaded == 20 * 8_292_166_656
    assert "critic" not in dict(critic.phases[0].parts) and "actor" in dict(critic.phases[0].parts)


def test_on_cpu_all_ranks_share_main_memory(shape_7b):
    config = compose_config("grpo", overrides("trainer.device=cpu", "trainer.n_gpus_per_node=2"))
    found = compute(Case([], config=config), config, (shape_7b, shape_7b), 1024)
    step = {phase.name: dict(phase.parts) for phase in found.phases}["optimizer step"]
    assert step["actor"] == pytest.approx(5 * 4 * 8_292_166_656, abs=8)  # weights, gradients, AdamW's two and its copy
    assert found.device == "cpu"
