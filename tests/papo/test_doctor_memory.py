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
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer

from papo.tools.doctor.case import GPU, Case
from papo.tools.doctor.memory import LOGIT_BYTES, STEP_COPIES, block_bytes, estimate, moment_bytes, total
from papo.tools.doctor.shape import Shape, shape_of
from tests.fakes.models import qwen_3b, qwen_7b
from verl.config.compose import compose_config
from verl.config.worker import LoRAConfig
from verl.models.log_probs import chunked_entropy, chunked_kl, chunked_log_probs
from verl.workers.training.compensated_adamw import CompensatedAdamW

GIB = 2**30

PARAMETERS = 8_292_166_656  # of the 7B model
HEAD = 152064 * 3584


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


def test_copies_of_a_bfloat16_step_are_those_that_torch_makes():
    layer = torch.nn.Linear(500, 400, bias=False, dtype=torch.bfloat16)
    layer.weight.grad = torch.randn_like(layer.weight)
    optimizer = CompensatedAdamW(layer.parameters(), 1e-6, (0.9, 0.999), 1e-8, 0.01)
    assert peak(optimizer.step, layer) / (4 * 400 * 500) == pytest.approx(STEP_COPIES, rel=0.05)


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
    assert kept(text, layer) - masks == pytest.approx(tokens * block_bytes(shape, width), rel=0.05)
    moment = block_bytes(shape, width) + moment_bytes(shape, width)
    assert peak(lambda: text().sum().backward(), layer) - masks == pytest.approx(tokens * moment, rel=0.1)


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
    bound = LOGIT_BYTES["sampled" if kind == "log_probs" else "exact"]
    assert needed <= 1.1 * bound and (kind == "entropy" or needed >= 0.9 * bound)


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
    assert 0.9 * block_bytes(shape, width) < (kept(text, layer) - masks) / tokens < block_bytes(shape, width)
    moment = block_bytes(shape, width) + moment_bytes(shape, width)
    assert 0.8 * moment < (peak(lambda: text().sum().backward(), layer) - masks) / tokens < moment


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


def estimate_7b(*more: str, preset: str = "papo_grpo", shape: Shape | None = None, gpus: int = 8):
    """Of a run on 8 imagined GPUs with 80 GiB each."""
    config = compose_config(preset, overrides(*more))
    case = Case([GPU("a GPU", 80 * GIB, 80 * GIB)] * gpus, imagined=True, config=config)
    shape = shape or shape_of(qwen_7b())
    return estimate(case, config, {"actor": shape, "reference": shape, "critic": replace(shape, adapter=0)})


def sizes(found) -> dict[tuple[str, str], int]:
    return {(role, term.name): term.bytes for role, (terms, _) in found.roles.items() for term in terms}


def parts(found) -> dict[str, dict[str, int]]:
    return {phase.name: phase.parts for phase in found.phases}


def test_terms_of_the_7b_model_on_8_gpus_by_hand():
    """4 bytes of weight and gradient and 8 of AdamW; blocks are gathered one behind the other."""
    block = (3584 * 3584 + 3584) + 2 * (3584 * 512 + 512) + 3584 * 3584 + 3 * 3584 * 18944 + 2 * 3584
    vision_block = 4 * 1280 * 1280 + 4 * 1280 + 3 * 1280 * 3420 + 2 * 3420 + 1280 + 2 * 1280
    small = "worker.actor.fsdp.min_block_params=0"
    found = sizes(estimate_7b(small, "worker.actor.max_tokens_per_micro_batch=1000"))
    assert found["actor", "weights"] == PARAMETERS // 2 and found["actor", "optimizer states"] == PARAMETERS
    assert found["actor, update", "gradients"] == PARAMETERS // 2
    root = PARAMETERS - 28 * block - 32 * vision_block
    assert found["actor, update", "gathered"] == 2 * 2 * (root + 2 * block)
    kept, moment = 2 * (4 * 18944 + 8 * 3584) + 8 * 3584, 2 * (3 * 18944 + 3584)
    assert found["actor, update", "activations"] == 1000 * (28 * 2 * 3584 + kept + moment)
    assert found["actor, update", "logits of a chunk"] == 1024 * 152064 * LOGIT_BYTES["sampled"]
    assert found["reference", "weights"] == PARAMETERS // 4  # kept as its forward computes
    options = (
        "worker.actor.fsdp.reshard_after_forward=false",
        "worker.actor.model.enable_gradient_checkpointing=false",
    )
    exact = "algorithm.terms.entropy.estimator=full"
    found = sizes(estimate_7b(small, *options, exact, "worker.actor.max_tokens_per_micro_batch=1000"))
    assert found["actor, update", "gathered"] == 2 * (PARAMETERS + root + 2 * block)
    assert found["actor, update", "activations"] == 1000 * (28 * kept + moment)
    assert found["actor, update", "logits of a chunk"] == 1024 * 152064 * LOGIT_BYTES["exact"]
    frozen = sizes(estimate_7b("worker.actor.model.freeze_vision_tower=true"))
    assert frozen["actor, update", "gradients"] == (PARAMETERS - vision_by_hand(3584)) // 2


def test_states_in_bfloat16_and_in_main_memory():
    narrow = "worker.actor.optim.strategy=adamw_bf16"
    found = sizes(estimate_7b(narrow))
    assert found["actor", "weights"] == PARAMETERS // 4
    assert found["actor, update", "gradients"] == PARAMETERS // 2  # micro-batches add up in float32
    assert found["actor", "optimizer states"] == 3 * 2 * PARAMETERS // 8
    assert found["actor, optimizer step", "copies of the head"] == STEP_COPIES * 4 * HEAD // 8
    away = estimate_7b("worker.actor.fsdp.offload=always", "worker.ref.fsdp.offload=always")
    assert not any(
        role in parts(away)["generation"] for role in ("actor", "reference") if parts(away)["generation"][role]
    )
    assert away.offloaded == 8 * (16 * PARAMETERS // 8 + PARAMETERS // 4)
    critic = estimate_7b("algorithm.adv_estimator=gae", "worker.critic.fsdp.offload=always")
    assert critic.offloaded == 16 * PARAMETERS


def test_states_parked_between_phases_are_on_the_gpu_where_their_model_works():
    found = estimate_7b("worker.actor.fsdp.offload=between_phases", "worker.ref.fsdp.offload=between_phases")
    kept = estimate_7b()
    assert parts(found)["generation"]["actor"] == parts(found)["generation"]["reference"] == 0
    assert parts(found)["update"]["actor"] == parts(kept)["update"]["actor"]
    assert parts(found)["update"]["reference"] == 0
    assert found.offloaded == 8 * (12 * PARAMETERS // 8 + PARAMETERS // 4) and kept.offloaded == 0


def test_phases_of_the_shipped_preset_add_up():
    found = estimate_7b()
    terms, states, reference = sizes(found), 12 * PARAMETERS // 8, PARAMETERS // 4
    update = sum(size for (role, _), size in terms.items() if role == "actor, update")
    assert parts(found) == {
        "generation": {"actor": states, "reference": reference, "engine": int(0.6 * 80 * GIB), "processes": 3 * GIB},
        "update": {"actor": states + update, "reference": reference, "processes": 3 * GIB},
        "optimizer step": {"actor": states + PARAMETERS // 2, "reference": reference, "processes": 3 * GIB},
    }
    assert found.cache == terms["engine", "KV cache"] and total(found.roles["engine"][0]) == int(0.6 * 80 * GIB)


def test_roles_follow_from_the_config():
    alone = estimate_7b("~term@algorithm.terms.ref_kl")
    assert not any("reference" in phase for phase in parts(alone).values())
    apart = parts(estimate_7b("trainer.n_gpus_per_node=4", "worker.rollout.dedicated_gpus=4"))
    assert set(apart["engine's GPUs"]) == {"engine"} and "engine" not in apart["generation"]
    wide = estimate_7b("worker.rollout.tensor_parallel_size=4")
    assert sizes(wide)["engine", "weights"] == 2 * PARAMETERS // 4


def test_a_critic_holds_what_the_actor_does_and_has_phases_of_its_own():
    tokens = "worker.actor.max_tokens_per_micro_batch=4000", "worker.critic.max_tokens_per_micro_batch=2000"
    found = estimate_7b("algorithm.adv_estimator=gae", *tokens)
    terms, states = sizes(found), 12 * PARAMETERS // 8
    assert parts(found)["generation"]["critic"] == parts(found)["update"]["critic"] == states
    assert parts(found)["critic's update"]["actor"] == states
    own = sum(size for (role, _), size in terms.items() if role == "critic, update")
    assert parts(found)["critic's update"]["critic"] == states + own
    assert terms["critic, update", "activations"] == terms["actor, update", "activations"] // 2
    assert ("critic, update", "logits of a chunk") not in terms


def test_lora_trains_adapters_alone_and_has_no_reference_of_its_own(shape_7b):
    shape = shape_of(qwen_7b(), LoRAConfig(rank=64, alpha=64))
    by_hand = 28 * 64 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert shape.adapter == by_hand == 161_480_704 and replace(shape, adapter=0) == shape_7b
    rank = "worker.actor.model.lora.rank=64"
    terms = sizes(estimate_7b(rank, shape=shape))
    assert terms["actor", "weights"] == (2 * PARAMETERS + 4 * by_hand) // 8  # the frozen ones in bfloat16
    assert terms["actor", "optimizer states"] == by_hand
    assert terms["actor, update", "gradients"] == by_hand // 2
    assert ("reference", "weights") not in terms and terms["engine", "weights"] == 2 * PARAMETERS
    assert "reference" in estimate_7b(rank, "worker.ref.model_path=another", shape=shape).roles
    critic = sizes(estimate_7b(rank, "algorithm.adv_estimator=gae", shape=shape))
    assert critic["critic", "weights"] == PARAMETERS // 2 and critic["critic", "optimizer states"] == PARAMETERS


def test_on_cpu_all_ranks_share_main_memory(shape_7b):
    found = estimate_7b("trainer.device=cpu", "trainer.n_gpus_per_node=2", preset="grpo", gpus=0)
    step = parts(found)["optimizer step"]
    assert step["actor"] == pytest.approx(4 * 4 * PARAMETERS, abs=8)  # weights, gradients and AdamW's two
    assert found.device == "cpu" and found.roles["actor"][1] == 2
